"""Trained weights in use: samples, previews, pictures."""
