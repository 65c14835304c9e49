"""Rows as tables, claims, agreement with papers, and the page."""
