"""Step 8: calls of a compiled program; imports no compiler."""
