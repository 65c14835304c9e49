"""Commands for whoever maintains the project: regression, reference, README."""
