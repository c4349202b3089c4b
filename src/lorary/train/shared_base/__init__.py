"""Several adapters trained at once on one frozen base: one forward pass for the batches of all of them."""
