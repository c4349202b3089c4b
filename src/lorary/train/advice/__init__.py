"""Advice from evidence: the settings of a run from its model, its data and the machine, each with its reason."""
