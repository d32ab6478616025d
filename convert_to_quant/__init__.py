"""FP8 for diffusion models that keeps the picture: convert, calibrate, patch, check."""

__version__ = "0.1.0"
