"""Per-example gradients: rules per operation, a fallback for the rest, a check that they are right."""
