"""How the frozen weights of the base are kept: words of the `storage` axis, and the layers that they pack into."""

from lorary.storage import foreign  # noqa: F401 (makes the packed layers of other libraries known)
