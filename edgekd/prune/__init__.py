"""Structured pruning: whole channels go, by the dependency graph of the torch-pruning library."""
