"""Images on disk: decoding, batches, packed data sets, preparation."""
