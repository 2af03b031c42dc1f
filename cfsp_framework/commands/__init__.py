"""The commands, a module each. Torch is imported inside them, so that their help answers at once."""
