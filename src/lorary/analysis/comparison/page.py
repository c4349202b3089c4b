"""The page of a comparison: one HTML file."""

from __future__ import annotations

from lorary.analysis.comparison.statistics import Findings


def comparison_page(found: Findings) -> str:
    """The page."""
    raise NotImplementedError
