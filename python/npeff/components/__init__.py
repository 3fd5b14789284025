"""Components: what a decomposition gives, encoded, recovered, grouped into strategies, and stored."""
