"""Training data: sources, row formats, tokens, masks, order."""
