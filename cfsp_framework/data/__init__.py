"""Read text and cut it into windows of tokens."""
