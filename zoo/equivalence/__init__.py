"""How alike models are: weights, then behaviour on held-out text, and what may replace what."""
