"""Bad adapters of the methods beyond LoRA: magnitudes, starts, shared projections, blocks; each with its sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.errors import FileError
from lorary.files.tensor_file import TensorFile
from lorary.methods.adalora import SVDDelta
from tests.adapters import models
from tests.adapters.hostile import PREFIX, Spoil, Spoiled, drop, entry, note, put, refusal, safetensors
from tests.adapters.models import BASES, adapted, outputs, same

LLAMA = BASES[0]
QV = ["q_proj", "v_proj"]
Q = "model.layers.0.self_attn.q_proj"
M = PREFIX + "0.self_attn.q_proj.lora_magnitude_vector.weight"
V = PREFIX + "0.self_attn.v_proj.lora_magnitude_vector.weight"


def dora() -> nn.Module:
    return adapted(LLAMA, "dora", targets=QV)


def pissa() -> nn.Module:
    return adapted(LLAMA, "pissa", targets=QV)


def melora() -> nn.Module:
    return adapted(LLAMA, "melora", targets=QV)


def multilora() -> nn.Module:
    return adapted(LLAMA, "multilora", targets=QV)


def dvora() -> nn.Module:
    """Its projections are in the file."""
    return models.vera(LLAMA, "dora", targets=QV)


def drawn() -> nn.Module:
    """Its projections are not."""
    return models.vera(LLAMA, "dora", targets=QV, save_projections=False)


def adalora() -> nn.Module:
    """Of one layer one of its four directions is left; and an embedding, which PEFT's has not."""
    model = LLAMA.model()
    plan = lorary.plan(model, lorary.method("adalora", r=4, target=2), targets=["embed_tokens", "q_proj"])
    small = plan.sites[1].method.replace(delta=SVDDelta(4, kept=1))
    placed = (plan.sites[0], dataclasses.replace(plan.sites[1], method=small), *plan.sites[2:])
    lorary.attach(model, dataclasses.replace(plan, sites=placed))
    models.fill(p for n, p in model.named_parameters() if ".params." in n)
    return model.eval()


def delta() -> nn.Module:
    return adapted(LLAMA, "delta-lora", targets=QV)


def tasks() -> nn.Module:
    """A task after another, in bits that do not fit together in one tensor of PEFT's."""
    model = LLAMA.model()
    first = lorary.Adapter.of(adapted(LLAMA, "o-lora", r=2, targets=["q_proj"]))
    lorary.attach(model, lorary.plan(model, lorary.method("o-lora", r=4), targets=["q_proj"], after=[first]))
    models.fill(p for n, p in model.named_parameters() if ".params." in n and p.requires_grad)
    for name, p in model.named_parameters():
        if name.endswith("_past"):
            p.data = p.data.bfloat16()
    return model.eval()


# --- PEFT's DoRA -------------------------------------------------------------------------------------------------

PEFT: list[tuple[str, Spoil, str]] = [
    ("a magnitude missing", drop(M), f"  - {Q}.lora_magnitude_vector: is missing"),
    (
        "a magnitude twice",
        put(M.removesuffix(".weight"), 16),
        f"  - {M}: is there twice, with and without its ending",
    ),
    (
        "a magnitude too few",
        put(M, 15),
        f"  - {Q}.lora_magnitude_vector: has the shape [15], expected [16]",
    ),
    (
        "one magnitude for all",
        put(M, 1),
        f"  - {Q}.lora_magnitude_vector: has the shape [1], expected [16]",
    ),
    (
        "a magnitude for each input",
        put(V, 1, 16),
        "  - model.layers.0.self_attn.v_proj.lora_magnitude_vector: has the shape [1, 16], a magnitude for "
        "each input; DoRA as published has one per output\n"
        "      hint: if they are the outputs' after all, write them as [8]",
    ),
    (
        "a row of magnitudes in a square layer",
        put(M, 1, 16),
        f"  - {Q}.lora_magnitude_vector: has the shape [1, 16], a magnitude for each input; DoRA as published "
        "has one per output\n"
        "      hint: if they are the outputs' after all, write them as [16]",
    ),
    (
        "a magnitude of NaN",
        put(M, 16, value=float("nan")),
        f"  - {Q}.lora_magnitude_vector: 16 of 16 values are NaN or infinite, the first at [0]",
    ),
    (
        "a magnitude of a layer that is no target",
        put(PREFIX + "0.self_attn.k_proj.lora_magnitude_vector", 8),
        "  - model.layers.0.self_attn.k_proj.lora_magnitude_vector: adapts a module that the configuration does not "
        "name",
    ),
    (
        "magnitudes that the configuration denies",
        lambda s: s.say(use_dora=False),
        "\n".join(
            f"  - model.layers.{i}.self_attn.{name}_proj.lora_magnitude_vector: belongs to DoRA, which the "
            "configuration does not name"
            for i in (0, 1)
            for name in "qv"
        ),
    ),
    (
        "VeRA's vectors",
        put(PREFIX + "0.self_attn.q_proj.vera_lambda_b", 16),
        f"  - {Q}.vera_lambda_b: belongs to VeRA, which the configuration does not name",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), [c[1:] for c in PEFT], ids=[c[0] for c in PEFT])
def test_a_bad_dora_of_peft_is_refused(spoil: Spoil, message: str, tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter", make=dora)
    spoil(spoiled)
    assert refusal(spoiled) == message


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
@pytest.mark.parametrize("lead", [(), (1,), (-1,)], ids=["plain", "row", "column"])
def test_magnitudes_in_every_shape_that_was_written_are_read(lead: tuple[int, ...], name: str, tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter", make=dora)

    def reshaped(tensors: dict[str, Tensor]) -> None:
        m = tensors.pop(V)
        tensors[V.replace("lora_magnitude_vector.weight", name)] = (
            m if not lead else m[None] if lead == (1,) else m[:, None]
        )

    spoiled.tensors(reshaped)
    assert torch.equal(outputs(lorary.load(LLAMA.model(), spoiled.folder)), outputs(dora()))
    assert lorary.load_adapter(spoiled.folder).tensors[Q.replace("q_proj", "v_proj")]["m"].shape == (8,)


# --- our own files -----------------------------------------------------------------------------------------------

MISSING = "must describe the shared tensors: A, B"
NATIVE: list[tuple[str, Callable[[], nn.Module], Spoil, str]] = [
    ("a start missing", pissa, drop(f"{Q}|A0"), f"  - {Q}|A0: is missing"),
    (
        "a start of another shape",
        pissa,
        put(f"{Q}|B0", 4, 16),
        f"  - {Q}|B0: has the shape [4, 16], expected [16, 4]\n      hint: it is transposed",
    ),
    (
        "a start of NaN",
        pissa,
        put(f"{Q}|B0", 16, 4, value=float("nan")),
        f"  - {Q}|B0: 64 of 64 values are NaN or infinite, the first at [0, 0]",
    ),
    (
        "starts that the record denies",
        pissa,
        note(lambda r: r["method"].update(init={"component": "Kaiming"})),
        "\n".join(
            f"  - model.layers.{i}.self_attn.{name}_proj|{role}0: belongs to no site and no parameter of the record"
            for i in (0, 1)
            for name in "qv"
            for role in "AB"
        ),
    ),
    (
        "a factor missing beside its start",
        pissa,
        drop(f"{Q}|A"),
        f"  - {Q}|A: is missing",
    ),
    ("a projection missing", dvora, drop("|A"), "  - |A: is missing"),
    (
        "a projection of another shape",
        dvora,
        put("|A", 6, 15),
        "  - |A: has the shape [6, 15], expected [6, 16]",
    ),
    (
        "a projection of NaN",
        dvora,
        put("|B", 16, 6, value=float("inf")),
        "  - |B: 96 of 96 values are NaN or infinite, the first at [0, 0]",
    ),
    (
        "a projection of one site's own",
        dvora,
        put(f"{Q}|A", 6, 16),
        f"  - {Q}|A: belongs to no site and no parameter of the record",
    ),
    (
        "a projection beside its checksum",
        drawn,
        put("|A", 6, 16),
        "  - |A: belongs to no site and no parameter of the record",
    ),
    ("a magnitude missing", dvora, drop(f"{Q}|m"), f"  - {Q}|m: is missing"),
    (
        "a magnitude too few",
        dvora,
        put(f"{Q}|m", 15),
        f"  - {Q}|m: has the shape [15], expected [16]",
    ),
    ("a vector missing", dvora, drop(f"{Q}|b"), f"  - {Q}|b: is missing"),
    ("a scaling vector missing", multilora, drop(f"{Q}|gamma"), f"  - {Q}|gamma: is missing"),
    (
        "blocks that do not divide",
        melora,
        note(lambda r: r["method"]["delta"].update(n=3)),
        "\n".join(
            f"  - lorary.json: model.layers.{i}.self_attn.{name}_proj: n = 3 does not divide its {size} {side} features"
            for i in (0, 1)
            for name, out in (("q", 16), ("v", 8))
            for side, size in (("input", 16), ("output", out))
        ),
    ),
    (
        "no blocks",
        melora,
        note(lambda r: r["method"]["delta"].update(n=0)),
        "  - lorary.json: method: delta: BlockDiagonal has n = 0; it takes a whole number of at least 1",
    ),
    (
        "more blocks",
        melora,
        note(lambda r: [s.update(name=s["name"]) for s in r["sites"]] and r["method"]["delta"].update(n=4)),
        "\n".join(
            f"  - model.layers.{i}.self_attn.{name}_proj|A: has the shape [8, 8], expected [16, 4]"
            for i in (0, 1)
            for name in "qv"
        ),
    ),
    (
        "a word that fills other tensors",
        pissa,
        note(lambda r: r["method"].update(init={"component": "MultiLoRAInit"})),
        "  - lorary.json: method: init: MultiLoRAInit fills {A, B, gamma}; LowRank has {A, B}",
    ),
    (
        "an alpha for a scale without one",
        dvora,
        note(lambda r: r["sites"][0].update(alpha=3)),
        f"  - lorary.json: {Q}: its scale, ConstantScale, has no alpha",
    ),
    (
        "a site's own method that is none",
        dvora,
        note(lambda r: r["sites"][0].update(method={"delta": {"component": "SharedProjectionDelta", "r": 6}})),
        "\n".join(
            f"  - lorary.json: {Q}: {axis}: is missing, and a delta needs it" for axis in ("init", "scale", "join")
        ),
    ),
    ("no checksums at all", drawn, note(lambda r: r.update(drawn={})), f"  - lorary.json: drawn: {MISSING}"),
    ("checksums that are a list", drawn, note(lambda r: r.update(drawn=[1])), f"  - lorary.json: drawn: {MISSING}"),
    ("one checksum missing", drawn, note(lambda r: r["drawn"].pop("B")), f"  - lorary.json: drawn: {MISSING}"),
    (
        "checksums of what is not shared",
        pissa,
        note(lambda r: r.update(drawn={"A": {"dtype": "F32", "sha256": "0"}})),
        "  - lorary.json: drawn: must describe the shared tensors: none",
    ),
    (
        "a checksum of no precision",
        drawn,
        note(lambda r: r["drawn"]["A"].update(dtype="I64")),
        '  - lorary.json: drawn: has {"dtype": "I64", "sha256": "%s"}; an entry is a dtype, one of F32, F16, BF16, and '
        "a SHA-256",
    ),
    (
        "a checksum of a list of precisions",
        drawn,
        note(lambda r: r["drawn"]["A"].update(dtype=["F32"], sha256="0")),
        '  - lorary.json: drawn: has {"dtype": ["F32"], "sha256": "0"}; an entry is a dtype, one of F32, F16, BF16, '
        "and a SHA-256",
    ),
    (
        "a rank beyond all integers of the machine",
        drawn,
        note(lambda r: r["method"]["delta"].update(r=2**63)),
        "  - lorary.json: method: delta: SharedProjectionDelta has r = 9223372036854775808; it takes a whole number of "
        "at least 1",
    ),
    (
        "a rank beyond all memory",
        drawn,
        note(lambda r: r["method"]["delta"].update(r=2**62)),
        "  - lorary.json: drawn: takes 590,295,810,358,705,651,712 bytes to draw, more than the 1,073,741,824 that "
        "are accepted",
    ),
    (
        "another checksum",
        drawn,
        note(lambda r: r["drawn"]["A"].update(sha256="0" * 64)),
        "  - lorary.json: drawn: A: its seed gives other numbers here than in training (SHA-256 "
        "differs)\n"
        "      hint: save it again with save_projections=True, on the base that it was trained on",
    ),
    (
        "inputs without end to draw for",
        drawn,
        note(lambda r: r["sites"][0].update(in_features=2**31)),
        "  - lorary.json: drawn: takes 51,539,607,936 bytes to draw, more than the 1,073,741,824 that are accepted",
    ),
]


def said(**words: Any) -> Spoil:
    """Changes the second site of the record, which is the first q_proj of `adalora`, or the last of `tasks`."""
    return note(lambda r: r["sites"][1].update(words))


WHOLE = "it takes a whole number of at least 0, or None"
Q1 = "model.layers.1.self_attn.q_proj"
TASKS = "it takes whole numbers of at least 1"
NATIVE += [
    ("fewer than none left", adalora, said(kept=-1), f"  - lorary.json: {Q}: delta: SVDDelta has kept = -1; {WHOLE}"),
    ("true left", adalora, said(kept=True), f"  - lorary.json: {Q}: delta: SVDDelta has kept = True; {WHOLE}"),
    (
        "half a direction left",
        adalora,
        said(kept=0.5),
        f"  - lorary.json: {Q}: delta: SVDDelta has kept = 0.5; {WHOLE}",
    ),
    ("a list left", adalora, said(kept=[1]), f"  - lorary.json: {Q}: delta: SVDDelta has kept = (1,); {WHOLE}"),
    ("more left than there were", adalora, said(kept=5), f"  - lorary.json: {Q}: 5 of 4 directions cannot remain"),
    (
        "another number left",
        adalora,
        said(kept=2),
        f"  - {Q}|P: has the shape [16, 1], expected [16, 2]\n"
        f"  - {Q}|E: has the shape [1], expected [2]\n"
        f"  - {Q}|Q: has the shape [1, 16], expected [2, 16]",
    ),
    (
        "none left, and tensors",
        adalora,
        said(kept=0),
        f"  - {Q}|P: has the shape [16, 1], expected [16, 0]\n"
        f"  - {Q}|E: has the shape [1], expected [0]\n"
        f"  - {Q}|Q: has the shape [1, 16], expected [0, 16]",
    ),
    (
        "some left of a LoRA",
        melora,
        note(lambda r: r["sites"][0].update(kept=1)),
        f"  - lorary.json: {Q}: `kept` is 1, and BlockDiagonal has no such field",
    ),
    (
        "E of NaN",
        adalora,
        put(f"{Q}|E", 1, value=float("nan")),
        f"  - {Q}|E: 1 of 1 values are NaN or infinite, the first at [0]",
    ),
    (
        "a target above the start",
        adalora,
        note(lambda r: r["method"]["rules"][0].update(target=5)),
        "  - lorary.json: method: rules: a target of 5 is more than the 4 directions of the start",
    ),
    (
        "two lambdas",
        delta,
        put(f"{Q}|lam", 2),
        f"  - {Q}|lam: has the shape [2], expected [1]",
    ),
    (
        "a lambda of no dimension",
        delta,
        put(f"{Q}|lam"),
        f"  - {Q}|lam: has the shape [], expected [1]",
    ),
    (
        "a lambda of NaN",
        delta,
        put(f"{Q}|lam", 1, value=float("nan")),
        f"  - {Q}|lam: 1 of 1 values are NaN or infinite, the first at [0]",
    ),
    ("a product missing", delta, drop(f"{Q}|A_K"), f"  - {Q}|A_K: is missing"),
    (
        "a product of another rank",
        delta,
        put(f"{Q}|B_K", 16, 3),
        f"  - {Q}|B_K: has the shape [16, 3], expected [16, 4]",
    ),
    (
        "a product that the record denies",
        delta,
        note(lambda r: r["method"]["delta"].update(late=False) or r["method"]["rules"][0].update(after=0)),
        "\n".join(
            f"  - model.layers.{i}.self_attn.{name}_proj|{role}: belongs to no site and no parameter of the record"
            for i in (0, 1)
            for name in "qv"
            for role in ("A_K", "B_K", "lam")
        ),
    ),
    (
        "a past of another rank",
        tasks,
        said(past=[3]),
        f"  - {Q1}|A_past: has the shape [2, 16], expected [3, 16]\n"
        f"  - {Q1}|B_past: has the shape [16, 2], expected [16, 3]",
    ),
    (
        "a past that is denied",
        tasks,
        said(past=[]),
        "\n".join(f"  - {Q1}|{role}_past: belongs to no site and no parameter of the record" for role in "AB"),
    ),
    (
        "a past of nothing",
        tasks,
        said(past=[2, 0]),
        f"  - lorary.json: {Q1}: delta: SequentialLoRA has past = (2, 0); {TASKS}",
    ),
    (
        "a past below zero",
        tasks,
        said(past=[-2]),
        f"  - lorary.json: {Q1}: delta: SequentialLoRA has past = (-2,); {TASKS}",
    ),
    (
        "a true past",
        tasks,
        said(past=[True]),
        f"  - lorary.json: {Q1}: delta: SequentialLoRA has past = (True,); {TASKS}",
    ),
    (
        "a past that is a number",
        tasks,
        said(past=2),
        f"  - lorary.json: {Q1}: delta: SequentialLoRA has past = 2; {TASKS}",
    ),
    (
        "a past without end",
        tasks,
        said(past=[2**62]),
        f"  - lorary.json: {Q1}: of its 16 input directions 1 earlier tasks have taken 4611686018427387904: there is "
        "no room for 4 more that are orthogonal to them",
    ),
    (
        "a past of NaN",
        tasks,
        put(f"{Q}|A_past", 2, 16, value=float("inf")),
        f"  - {Q}|A_past: 32 of 32 values are NaN or infinite, the first at [0, 0]",
    ),
]


@pytest.mark.parametrize(("make", "spoil", "message"), [c[1:] for c in NATIVE], ids=[c[0] for c in NATIVE])
def test_a_bad_native_adapter_is_refused(
    make: Callable[[], nn.Module], spoil: Spoil, message: str, tmp_path: Path
) -> None:
    spoiled = Spoiled(tmp_path / "adapter", native=True, make=make)
    spoil(spoiled)
    spoiled.sign()
    found = refusal(spoiled)
    if "%s" in message:
        message %= json.loads(spoiled.record.read_text())["drawn"]["A"]["sha256"]
    assert found == message


@pytest.mark.parametrize(
    ("make", "name"),
    [(pissa, f"{Q}|A0"), (pissa, f"{Q}|B"), (dvora, f"{Q}|m"), (dvora, "|A")],
    ids=["start", "factor of a start", "magnitude", "projection"],
)
def test_what_nothing_can_stand_for_is_never_tolerated(
    make: Callable[[], nn.Module], name: str, tmp_path: Path
) -> None:
    spoiled = Spoiled(tmp_path / "adapter", native=True, make=make)
    drop(name)(spoiled)
    spoiled.sign()
    model = LLAMA.model()
    with pytest.raises(FileError, match="is missing"):
        lorary.load(model, spoiled.folder, strict=False)
    assert torch.equal(outputs(model), outputs(LLAMA.model()))


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_that_begins_as_a_pickle_does_is_read(length: int, tmp_path: Path) -> None:
    """The file's first bytes are the header's length, little end first: 1,152 is 80 04."""
    header = json.dumps({"a": entry((2,), 0, 8)}).ljust(length)
    (tmp_path / "a.safetensors").write_bytes(safetensors(header, torch.ones(2).numpy().tobytes()))
    with TensorFile(tmp_path, "a.safetensors") as file:
        assert torch.equal(file.read("a")["a"], torch.ones(2))


@pytest.mark.parametrize(
    "make", [dora, pissa, melora, multilora, dvora, drawn, adalora, delta, tasks], ids=lambda make: make.__name__
)
def test_unspoiled_it_is_read(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter", native=True, make=make)
    spoiled.sign()
    same(lorary.load_adapter(spoiled.folder), lorary.Adapter.of(make()))
    assert torch.equal(outputs(lorary.load(LLAMA.model(), spoiled.folder)), outputs(make()))
