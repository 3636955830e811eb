"""Improved denoising diffusion probabilistic models (arXiv 2102.09672)."""
