"""Building blocks of methods and attacks."""
