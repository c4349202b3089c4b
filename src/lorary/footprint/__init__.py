"""What a training step holds in memory, in closed form: from a model's configuration and a plan, in milliseconds.

`architecture` reads the sizes, `adapters` asks the adapted layers what they keep, `block` adds up one block of the
model, `step` all of it, `prediction` the whole run; `room` holds it against GPUs.
"""
