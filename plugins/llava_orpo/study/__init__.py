"""Studies: one recipe trained over a grid, named variants or a search, each with several seeds, into one table."""
