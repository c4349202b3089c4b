"""What computes: kinds of layers, the adapter module, quantised weights, RoPE, shifted attention."""

from lorary.layers import other_quantizers  # noqa: F401 (makes the packed layers of other libraries known)
