"""Sites, component interfaces, methods and presets: immutable values that need no model."""
