"""Benchmarks. Nothing of the product imports this package, and it is not installed with it."""
