"""Tell people what became of each site."""
