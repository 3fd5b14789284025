"""Models: their parameters, their devices, their digests, and how they are called."""
