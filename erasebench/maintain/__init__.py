"""Maintenance commands of the project: regression, reference, README."""
