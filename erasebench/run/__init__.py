"""One run: its specification and keys, images, scores, attacks, rows."""
