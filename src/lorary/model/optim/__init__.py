"""A method in an optimizer and a training loop."""
