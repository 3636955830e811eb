"""Images on disk: reading, batches, packed data sets, preparation."""
