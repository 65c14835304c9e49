"""Parts that methods and attacks are built of."""
