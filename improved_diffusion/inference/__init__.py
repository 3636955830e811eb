"""Use trained weights: samples, previews, pictures."""
