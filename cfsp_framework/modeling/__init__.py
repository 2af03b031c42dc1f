"""Open a model and find its blocks and feed-forwards."""
