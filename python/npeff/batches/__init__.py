"""Data: batches of examples, read in a fixed order."""
