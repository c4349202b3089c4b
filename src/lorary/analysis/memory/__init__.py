"""Prediction of training memory: a step of a shortened model is simulated without data, and extrapolated.

`shorten` keeps a few blocks of a model, `simulation` runs a step of them on the meta device, `predict` extrapolates to
all blocks and adds the constant part (`fixed`); `gpu_fit` compares the result with GPUs.
"""
