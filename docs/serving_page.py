"""The page of what a server computes for each method: its serving form on a small base, formed here."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import lorary
from lorary.cli.method_page import stem
from lorary.errors import MethodError
from lorary.serve.forms.form import serving_form
from lorary.serve.forms.serving_form import ServingForm
from lorary.spec.calibration import CalibratedInit

HEAD = """# What a server computes

A server brings an adapter to one form when it loads it. At an adapted layer with the output `y0`, bias
included, its rows get

    y = gain * y0 + b * (B (d * (A x))) + shift

with only the terms that it has: scales and gains are in `B`, and a trained bias is a shift. This is exact: rows of a
batch with many adapters have the outputs that `lorary.switch` would give them one adapter at a time, up to rounding.
Everything is computed in fp32 and rounded once, to the precision in which the layer computes; gains stay in fp32.

What has no such form is an **override**: the rows are computed with the adapter's own weights of a layer, norm,
embedding or head. Where most of the base is overridden, the adapter is a **replica**: it is served exactly, at nearly
the memory and time of a base of its own. `GET /v1/models` shows the form of every adapter and the bytes that it takes.

| method | its form | rank of `r=16` | in a weighted sum |
|---|---|---|---|
"""

TAIL = """
Combinations have the terms of both: `dora,bitfit` is low rank with gain and shift.

- **The base must be the one that the adapter was trained on**: fingerprint, shapes and configuration are compared, as
  by `lorary.load`.
- **PiSSA and OLoRA** are served as the difference to the unmodified base, which has twice the rank.
- **DoRA**'s gain is taken from the weights that are served, dequantised where the base is quantised.
- **QLoRA** is served on the quantised base, or on the plain one with a note that it was trained on another.
- **GLoRA** with `A` low-rank changes its layers by a matrix of full rank, so that they are overrides; with `A` as a
  vector, a scalar or none it is low rank with gain and shift.
- **AdaLoRA**'s pruned directions are dropped, and so are layers without any.
- **VeRA**'s `A` and `B` are held once for all adapters of one seed.
- **(IA)³**'s vectors at the outputs are gains. A vector at the inputs makes its layer an override: each adapter then
  holds a copy of these weights, far more than its file.
- **Tied weights**: a LoRA of the head leaves the embedding alone, and the reverse; a tied weight that trained in full
  acts at both ends.
- **LongLoRA**'s RoPE scaling, linear or yarn, applies to the adapter's own requests only, and so does its context.

An adapter is refused, with every reason, where single rows cannot be computed with it: trained parameters of a module
with layers of its own (attention sinks, fused experts, state-space parameters) or of one with several inputs (gated
norms, position tables); layers of an expert; dynamic RoPE scaling; a replica of a quantised layer; values that are not
finite. Merge such an adapter into a copy of the base, and serve that. Houlsby's, prefix and prompt adapters cannot be
merged either: use them alone, with `lorary generate` or `chat`.

Several adapters of one request, `{"french": 0.7, "legal": 0.3}`, are added if each is low rank, shared projections or a
shift. Gains, overrides and RoPE scaling have no sum; `lorary mix` makes one adapter of what it can.
"""


def serving_page() -> str:
    """The page of the methods' serving forms."""
    rows = [_row(name) for name in lorary.presets()]
    return HEAD + "\n".join(rows) + "\n" + TAIL


def _row(name: str) -> str:
    link = f"[`{name}`](../methods/{stem(name)}.md)"
    try:
        form = _form(name)
    except MethodError as error:
        whys = "; ".join(dict.fromkeys(problem.what for problem in error.problems))
        return f"| {link} | not in a mixed batch: {whys} | | no |"
    rank = "" if form.rank is None else str(form.rank)
    return f"| {link} | {form.kind} | {rank} | {'yes' if form.additive else 'no'} |"


def _form(name: str) -> ServingForm:
    """The form of a method's adapter with numbers in every tensor."""
    preset = lorary.presets()[name]
    known = preset.parameters
    sizes = {k: v for k, v in {"r": 16, "length": 2048, "rho": 1.0}.items() if k in known}
    method = lorary.method(name, **sizes, **preset.example)
    base = _base()
    plan = lorary.plan(base, method)
    ids = torch.arange(3 * 64).reshape(3, 64) % 61
    batches = [{"input_ids": ids, "labels": ids}] if isinstance(method.init, CalibratedInit) else None
    lorary.attach(base, plan, data=batches)
    adapter = lorary.Adapter.of(base)
    ones = {site: {role: torch.ones_like(t) for role, t in roles.items()} for site, roles in adapter.tensors.items()}
    return serving_form(dataclasses.replace(adapter, tensors=ones), _base())


def _base() -> Any:
    """A small model with biases in q, k and v."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).eval()
