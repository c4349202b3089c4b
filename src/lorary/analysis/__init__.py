"""Measurements: merges, layer importance, long context, memory; pictures and the HTML report."""
