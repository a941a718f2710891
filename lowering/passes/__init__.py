"""Steps 2 to 6: each pass is a file."""
