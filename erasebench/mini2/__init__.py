"""Embedded world, second version: drawing, captions, training, judges and report."""
