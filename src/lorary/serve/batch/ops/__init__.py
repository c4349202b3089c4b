"""How the term of an adapter is added to the output of a base layer: a reference, on a CPU, on a GPU."""
