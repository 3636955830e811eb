"""Improved denoising diffusion probabilistic models (arXiv 2102.09672)."""

__version__ = "1.0.0"
