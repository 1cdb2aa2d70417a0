"""Eight bit integers: see :mod:`espalier.compression.quantization.quantizer`."""
