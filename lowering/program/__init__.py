"""Step 7: the whole program, on its way through IREE."""
