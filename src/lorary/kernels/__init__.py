"""Fused paths, each with a plain reference beside it and the same law for both."""
