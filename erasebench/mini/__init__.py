"""The embedded world: drawings, models and judges made from openly licensed art."""
