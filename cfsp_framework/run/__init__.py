"""The open run: components, model, data, and the keys of its caches."""
