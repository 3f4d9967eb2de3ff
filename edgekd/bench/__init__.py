"""Measuring engines: latency, memory, energy, and honest comparisons."""
