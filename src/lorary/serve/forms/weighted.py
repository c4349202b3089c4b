"""Several adapters for one request: which of them can be added, with weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lorary.errors import Diagnostic
from lorary.serve.forms.serving_form import ServingForm
from lorary.serve.interface import RequestError
from lorary.spec.fields import is_finite

_FIX = "use it by itself, with weight 1; or serve a sum that `lorary mix` has made"


def check_weights(forms: Mapping[str, ServingForm], weights: Mapping[str, float]) -> None:
    """Refuse weights of a request's adapters with which their updates cannot be added.

    One adapter of weight 1 can be used whatever its form. A weighted sum is one of updates: low-rank terms and shifts.

    Args:
        forms: name -> the form of each adapter.
        weights: name -> its weight, of the same adapters.

    Raises:
        RequestError: every reason.

    Example:
        >>> check_weights({"a": plain, "b": plain}, {"a": 0.7, "b": 0.3})
    """
    problems = [p for name, weight in weights.items() for p in _bad_weight(name, weight)]
    if list(weights.values()) != [1]:
        problems += [p for name in weights for p in _why_not_added(name, forms[name])]
    if problems:
        raise RequestError("cannot add these adapters:", problems)


def _bad_weight(name: str, weight: object) -> Iterator[Diagnostic]:
    if not is_finite(weight):
        yield Diagnostic(name, f"its weight is {weight!r}, not a finite number")


def _why_not_added(name: str, form: ServingForm) -> Iterator[Diagnostic]:
    """Why an adapter has no part in a sum."""
    gains = sum(site.gain is not None for site in form.sites.values())
    if gains:
        yield Diagnostic(name, f"scales the base's output at {gains} layers: such changes have no sum", _FIX)
    if form.overrides:
        what = f"has parameters of its own in {len(form.overrides)} modules, such as {next(iter(form.overrides))}"
        yield Diagnostic(name, f"{what}: they replace the base's", _FIX)
    if form.rotary:
        yield Diagnostic(name, "scales RoPE, which has no sum", _FIX)
