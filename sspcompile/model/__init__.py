"""Whatever runs a decoder: loading, placement, batches of text, hooks, logits and their divergence."""
