"""Layers: their kinds, the adapter module, quantised weights, RoPE scaling, shifted sparse attention."""

from lorary.layers import other_quantizers  # noqa: F401 (registers the quantised layers of other libraries)
