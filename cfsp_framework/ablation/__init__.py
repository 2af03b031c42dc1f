"""Ablations: a grid of components, ratios and seeds from one collection per seed, its results kept as they are made."""
