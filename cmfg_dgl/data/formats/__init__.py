"""One module a data format: what its files look like, and how they become a data set."""
