"""Trainers over TRL and Transformers, with checkpoints and exact resume."""
