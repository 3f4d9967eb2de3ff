"""Quantization-aware training with quantizers at the producers, in the places where engines run integers."""
