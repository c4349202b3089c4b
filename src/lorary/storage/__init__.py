"""How the frozen weights of the base are kept: words of the `storage` axis, and the layers that they pack into."""
