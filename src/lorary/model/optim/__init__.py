"""A method in your own optimizer and training loop: param_groups and rules."""
