"""The verdict on a served adapter: right, no-op, wrong scale, partial, wrong base."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from lorary import __version__
from lorary.adapters.adapter import Adapter
from lorary.adapters.content_hash import content_hash
from lorary.adapters.hub import adapter_folder
from lorary.adapters.save_load import CERTIFICATE, load_adapter
from lorary.adapters.switch import switch
from lorary.analysis.verify.here import Here
from lorary.analysis.verify.hypotheses import Hypothesis, explained, has_factors, is_plain, trial
from lorary.analysis.verify.observed import Engine, Observed, digest, distance, our_values, probe_ids, their_values
from lorary.analysis.verify.server import ENGINES, Server
from lorary.errors import ConfigError, Diagnostic, StateError, not_a
from lorary.files.atomic import atomic_file
from lorary.files.safe_open import checked_path, existing_folder
from lorary.model.ambient import mode_independent
from lorary.model.state import eval_mode, state_of
from lorary.spec.interfaces import Unquantized

FORMAT = 1
_ROUNDING = 0.1  # nats; bf16 moves log-probabilities by some 0.02
_TIMES = 3.0  # the noise of the base, for the tolerance of the adapter


@dataclass(frozen=True)
class Verification:
    """The verdict on a server, or an engine here, and its figures.

    Args:
        verdict: right, no-op, wrong scale, partial, wrong base, unclear or other.
        reason: a sentence.
        figures: in nats, root mean squares over all observed log-probabilities: `base`, the server's base from ours;
            `adapter`, the server's adapter from ours; `effect`, our adapter from our base; `tolerance`; `explained`,
            the server's adapter from the hypothesis in `reason`.
        count: of the log-probabilities of the adapter that were compared.
        record: the contents of the certificate.
    """

    verdict: str
    reason: str
    figures: dict[str, float]
    count: int
    record: dict[str, Any] = field(repr=False)

    @property
    def right(self) -> bool:
        """Whether the server computes the adapter."""
        return self.verdict == "right"

    def __str__(self) -> str:
        figures = "\n".join(f"  {name:<10} {value:.4g}" for name, value in self.figures.items())
        return f"{self.verdict}: {self.reason}\n{figures}"


@mode_independent
def verify(
    folder: str | os.PathLike[str],
    against: str,
    *,
    model: nn.Module,
    tokenizer: Any,
    base_model: str = "",
    adapter_model: str = "",
    tolerance: float | None = None,
    timeout: float = 60.0,
    key: str = "",
    progress: Callable[[str], object] = lambda text: None,
) -> Verification:
    """The verification of a served adapter: whether the server computes it, and what it computes instead.

    An adapter of a quantised base (QLoRA) is computed on the base as it is given: give the one that is served.

    Fixed probes are sent to an OpenAI-compatible server, for its base and for the adapter, and the log-probabilities
    that it gives are compared with those computed here. If they differ, hypotheses are computed and compared too: no
    adapter, other scales, layers left out. The result is written to `certificate.json` in the folder.

    Args:
        folder: the adapter's folder, or a run folder that holds it.
        against: the server's address; or `transformers` or `peft`, for these libraries in this process.
        model: the base, without an adapter, as served; 32 bits show smaller differences.
        tokenizer: of the base.
        base_model: the name of the base on the server; by default found in its list. `none`: it serves no base.
        adapter_model: the name of the adapter on the server, likewise.
        tolerance: in nats, the largest root mean square between the server's base and ours that is rounding; by
            default 0.1. The adapter may be three times as far as the base is, at most this; and more in proportion
            if it changes more than 1 nat.
        timeout: seconds for one request.
        key: of the server; by default LORARY_API_KEY or OPENAI_API_KEY of the environment.
        progress: is told what is being done.

    Raises:
        LoraryError: the server cannot be reached or gives no log-probabilities.
        FileError: there is no adapter, or it does not fit the base.
        StateError: the model has an adapter already.
        ConfigError: an argument is not acceptable.
    """
    _check_arguments(model, tolerance, timeout, key)
    path = existing_folder(checked_path(folder, "cannot verify an adapter:"))
    path = adapter_folder(path) or path
    adapter = load_adapter(path, model=model)
    sha256, quantized = content_hash(adapter), not isinstance(adapter.method.storage, Unquantized)
    adapter = _for_any_storage(adapter)
    rows = probe_ids(tokenizer)
    progress("asking the engine")
    engine: Engine
    if against in ENGINES:
        engine = Here(against, model, path)
    else:
        engine = Server(against, tokenizer, base_model, adapter_model, timeout, key)
    with eval_mode(model):
        found = _compared(adapter, engine, rows, model, tolerance, progress, force=quantized)
    return _certified(path, found, {"adapter_sha256": sha256, "base": adapter.base.name}, engine, rows)


def _for_any_storage(adapter: Adapter) -> Adapter:
    """The adapter without the quantisation of its base: it is computed on the base as it is given."""
    sites = tuple(replace(a, method=a.method.replace(storage=Unquantized())) for a in adapter.sites)
    return replace(adapter, method=adapter.method.replace(storage=Unquantized()), sites=sites)


def _check_arguments(model: object, tolerance: object, timeout: object, key: object) -> None:
    problems = not_a(nn.Module, "a torch.nn.Module", model=model) + not_a(str, "a text", key=key)
    for name, value in {"tolerance": tolerance, "timeout": timeout}.items():
        number = isinstance(value, int | float) and type(value) is not bool and 0 < value < float("inf")
        if not number and not (name == "tolerance" and value is None):
            problems.append(Diagnostic(name, f"is {value!r}, not a positive number"))
    if problems:
        raise ConfigError("cannot verify:", problems)
    if isinstance(model, nn.Module) and state_of(model) is not None:
        what = "the model has an adapter already"
        raise StateError("cannot verify:", [Diagnostic("model", what, "give the plain base: lorary.detach(model)")])


def _compared(
    adapter: Adapter,
    engine: Engine,
    rows: Sequence[Sequence[int]],
    model: Any,
    tolerance: float | None,
    progress: Callable[[str], object],
    force: bool,
) -> Verification:
    """The verification, without its certificate.

    Args:
        adapter: the adapter.
        engine: what is verified.
        rows: the probes.
        model: the base.
        tolerance: in nats, of the bases.
        progress: is told what is being done.
        force: accept a base with another fingerprint, as one that is not quantised here and was in training.
    """
    limit = tolerance or _ROUNDING
    of_base: list[Observed] = []
    of_adapter: list[Observed] = []
    for i, ids in enumerate(rows):
        progress(f"probe {i + 1} of {len(rows)}")
        of_base += engine.observe(ids, adapted=False) if engine.has_base() else []
        of_adapter += engine.observe(ids, adapted=True)
    theirs = their_values(of_adapter)
    ours_without = our_values(model, of_adapter)
    switch(model, adapter, force=force)
    try:
        ours = our_values(model, of_adapter)
    finally:
        switch(model, None)
    figures = {
        "base": distance(their_values(of_base), our_values(model, of_base)),
        "adapter": distance(theirs, ours),
        "effect": distance(ours, ours_without),
    }
    noise = min(limit, _TIMES * max(figures["base"], 1e-4)) if of_base else limit
    figures["tolerance"] = noise * max(1.0, figures["effect"])  # the adapter's own products are rounded, too
    verdict, reason = _simple_verdict(figures, limit, distance(theirs, ours_without))
    if not verdict:
        best: Hypothesis | None = None
        without: float | None = None
        if has_factors(adapter, model):
            with trial(model, adapter, of_adapter, theirs, figures["tolerance"]) as found:
                plain = is_plain(adapter, model)
                without = None if plain else found.distance({})
                best = explained(adapter, found, progress)
        verdict, reason = _explanation(best, without, figures)
    return Verification(verdict, reason, figures, len(theirs), {})


def _simple_verdict(figures: dict[str, float], limit: float, no_adapter: float) -> tuple[str, str]:
    """The verdicts that need no further computation; empty if none holds.

    Args:
        figures: in nats.
        limit: the largest distance of the bases that is rounding.
        no_adapter: the distance of the server's adapter from our base.
    """
    enough = figures["tolerance"]
    if figures["base"] > limit:
        what = f"its base is {figures['base']:.3g} nats from this one, and rounding explains {limit:.3g}"
        return "wrong base", what
    if figures["effect"] < enough:
        what = f"the adapter changes {figures['effect']:.3g} nats, too little beside a tolerance of {enough:.3g}"
        return "unclear", what
    if figures["adapter"] <= enough:
        return "right", "it computes the adapter"
    if no_adapter <= enough:
        figures["explained"] = no_adapter
        return "no-op", "its adapter is its base: the adapter is ignored"
    return "", ""


def _explanation(best: Hypothesis | None, without: float | None, figures: dict[str, float]) -> tuple[str, str]:
    """The verdict of the nearest hypothesis.

    Args:
        best: the nearest one.
        without: the distance of the adapter without DoRA's or GLoRA's gains and shifts; None if it has none.
        figures: in nats; gets `explained`.
    """
    enough = figures["tolerance"]
    if without is not None and without <= enough:
        figures["explained"] = without
        return "partial", "it computes B A alone: gains and shifts (DoRA's magnitudes) are left out"
    if best is None:
        return "other", "nothing that was tried explains it"
    figures["explained"] = best.distance
    if best.distance > enough:
        return "other", f"nothing that was tried explains it; the nearest is {best.kind}: {best.what}"
    if best.kind == "wrong scale":
        return best.kind, f"the scale of its updates is {best.what}"
    return best.kind, f"it computes the adapter {best.what}"


def _certified(
    path: Path, found: Verification, facts: dict[str, str], engine: Engine, rows: Sequence[Sequence[int]]
) -> Verification:
    """The verification with its certificate, which is written."""
    record = {
        "format": FORMAT,
        "lorary": __version__,
        **facts,
        "against": engine.name,
        "release": engine.release,
        "verdict": found.verdict,
        "reason": found.reason,
        "nats": {name: float(f"{value:.6g}") for name, value in found.figures.items()},
        "probes": {"count": len(rows), "sha256": digest(rows), "log_probabilities": found.count},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with atomic_file(path / CERTIFICATE) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
    return replace(found, record=record)
