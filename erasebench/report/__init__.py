"""Reports on rows: tables, claims, agreement with papers, and the page."""
