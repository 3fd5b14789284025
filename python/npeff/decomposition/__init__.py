"""Stage 2: factorise Fishers into components."""
