"""Records without NaN and infinity, which JSON lacks."""

from __future__ import annotations

import math
from typing import Any


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record with None for values that are not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
