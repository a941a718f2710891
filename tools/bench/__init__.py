"""Benchmarks, and the tuning that rests on them."""
