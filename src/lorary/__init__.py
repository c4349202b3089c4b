"""lorary, the LoRA library."""

__version__ = "0.1.0"
