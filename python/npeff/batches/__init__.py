"""What data is: batches of examples, read in a fixed order."""
