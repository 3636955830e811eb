"""Parts that import nothing of the package."""
