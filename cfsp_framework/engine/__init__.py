"""Run a model block by block and measure what its feed-forwards compute."""
