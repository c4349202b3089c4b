"""Memory of a training step: one step of a shortened model is simulated without data, and extrapolated to all blocks.

`skeleton` makes a model's shapes from its configuration, `shorten` takes some of its blocks, `simulation` runs a step
of them on the meta device, `predict` extrapolates and adds what stays (`fixed`); `gpu_fit` compares it with GPUs.
"""
