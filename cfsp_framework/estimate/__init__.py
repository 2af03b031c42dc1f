"""Estimate time and memory of a run from a model's configuration."""
