"""Measure perplexity and task accuracy of a model."""
