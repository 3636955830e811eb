"""Images on disk: packed data sets, and their preparation."""
