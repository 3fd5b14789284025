"""Stage 2: Fishers are factorised into components."""
