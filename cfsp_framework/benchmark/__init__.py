"""Measure how fast a model runs, and set the time beside what the hardware could do."""
