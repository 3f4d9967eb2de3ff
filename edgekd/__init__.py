"""edgekd: from a trained teacher to a small, quantized engine measured on the device it will run on."""

__version__ = "0.1.0"
