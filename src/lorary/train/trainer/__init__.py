"""The training loop: trainers over TRL and Transformers, checkpoints, exact resume."""
