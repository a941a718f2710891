"""Weights on their way into a program, and the archive beside it."""
