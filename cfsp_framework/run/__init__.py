"""What one run works on: components, model, data, and the keys of its caches."""
