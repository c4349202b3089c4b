"""What is done to a model: scan, plan, attach, merge, quantise, load."""
