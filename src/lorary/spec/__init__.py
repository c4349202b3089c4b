"""What is said: sites, component interfaces, methods and presets, as values; nothing here looks at a model."""
