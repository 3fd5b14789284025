"""Components, the result of a decomposition: encode, recover, group into strategies, and store them."""
