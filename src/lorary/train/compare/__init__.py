"""Comparisons: many methods on one base and one task, each with the same search for its learning rate."""
