"""Block-scaled products."""
