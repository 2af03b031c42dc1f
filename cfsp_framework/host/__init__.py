"""Find plugins and turn what they offer into typed registries."""
