"""Single run: specification and keys, images, scores, attacks, rows."""
