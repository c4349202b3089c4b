"""The training data: from files to tokenized, linted rows, and their order."""
