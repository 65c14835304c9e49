"""Embedded world of drawings, models and judges made from openly licensed art."""
