"""The commands compile-to-vmfb and run-vmfb."""
