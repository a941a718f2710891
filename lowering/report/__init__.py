"""What became of each site, for people."""
