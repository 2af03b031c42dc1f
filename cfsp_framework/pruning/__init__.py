"""Plan which channels stay, cut the model, and compensate."""
