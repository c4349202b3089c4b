"""What the files of diffusion tools have in common: one file for several models, and an alpha beside each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized

from lorary.adapters.intake.layers import Layer, Stored, plain_method
from lorary.adapters.peft.fields import ALPHA
from lorary.errors import Diagnostic, FileError
from lorary.files.findings import Findings
from lorary.files.strict_json import named
from lorary.files.tensor_file import TensorSource
from lorary.model.base import Base

_WHOLE = ("diff", "diff_b", "w_norm", "b_norm", "set_weight")
# The end of a tensor's name -> why it is refused.
OTHER_METHODS = {
    "lora_mid.weight": "is the core of a Tucker decomposition (LoCon), which is not supported",
    "lora_B.bias": "is a bias beside B, which is read from PEFT's folders alone",
    **dict.fromkeys(_WHOLE, "is a change of a whole parameter, which is not supported"),
}


def explain(name: str) -> str:
    """A tensor that belongs to no layer, described."""
    found = (why for leaf, why in OTHER_METHODS.items() if name.endswith(f".{leaf}"))
    return next(found, "is not a tensor of this adapter")


def refuse_other_methods(names: Iterable[str], findings: Findings) -> None:
    """Refuse the tensors of methods that such files hold too."""
    refused = ((name, explain(name)) for name in names if name.endswith(tuple(f".{leaf}" for leaf in OTHER_METHODS)))
    findings.fatal += [Diagnostic(named(name), what) for name, what in refused]


def model_of(parts: Mapping[str, Sized], fitting: Mapping[str, Sized], base: Base | None, findings: Findings) -> str:
    """The one model among those of a file that is meant: the base, or the only one.

    The model with the most of its layers in the base; on a tie, the one without layers outside the base. The two text
    encoders of SDXL have the same names, and one has more blocks.

    Args:
        parts: the name of the model in the file -> the layers that the file adapts in it.
        fitting: the same, those layers that the base has.
        base: the base, if at hand.
        findings: gets a note about the other models.

    Raises:
        FileError: it may be several, or none.
    """
    if len(parts) == 1:
        return next(iter(parts))
    listed = ", ".join(parts)
    if base is None:
        what = f"the file adapts several models: {listed}"
        fix = "read it onto one of them: lorary.load_adapter(file, model=...)"
        raise FileError("", [Diagnostic("", what, fix)])
    sizes = {part: (len(fitting[part]), -len(layers)) for part, layers in parts.items()}
    best = max(sizes, key=lambda part: sizes[part])
    if not fitting[best]:
        return best  # whose layers are then refused by name
    if list(sizes.values()).count(sizes[best]) > 1:
        what = f"the file adapts several models, {listed}, and its names do not tell which of them this is"
        raise FileError("", [Diagnostic("", what)])
    others = ", ".join(part for part in sizes if part != best)
    findings.notes.append(f"read its part for {best}; the file adapts {others} too")
    return best


def scaled_layers(
    grouped: Mapping[str, Mapping[str, str]], paths: Mapping[str, str], file: TensorSource, findings: Findings
) -> list[Layer]:
    """The layers with their own ranks, and alphas from the file.

    Args:
        grouped: layer -> role -> name; `alpha` is a role here.
        paths: layer -> its path.
        file: the open file.
        findings: collects unusable alphas.
    """
    entries = file.header.tensors
    ranks = {layer: (entries[roles["A"]].shape or (0,))[0] for layer, roles in grouped.items()}
    alphas = alphas_of(grouped, ranks, file, findings)
    return [
        Layer(paths[layer], plain_method(ranks[layer], alpha, dora="m" in grouped[layer]), stored(grouped[layer]))
        for layer, alpha in alphas.items()
    ]


def stored(roles: Mapping[str, str]) -> dict[str, Stored]:
    """role -> where the file has it."""
    return {role: Stored(name) for role, name in roles.items() if role != "alpha"}


def alphas_of(
    grouped: Mapping[str, Mapping[str, str]], ranks: Mapping[str, int], file: TensorSource, findings: Findings
) -> dict[str, float]:
    """layer -> alpha, so that s = alpha / rank; s is 1 without one. Layers without a usable one become findings.

    Args:
        grouped: layer -> role -> name.
        ranks: layer -> its rank.
        file: the open file.
        findings: collects them.
    """
    read = file.read(roles["alpha"] for roles in grouped.values() if _is_number(roles.get("alpha"), file))
    found, unscaled = {}, 0
    for layer, roles in grouped.items():
        rank = ranks[layer]
        alpha = float(rank)
        if (name := roles.get("alpha")) is None:
            unscaled += 1
        elif name not in read:
            shape = list(file.header.tensors[name].shape)
            findings.fatal.append(Diagnostic(named(name), f"has the shape {shape}: not a number"))
        else:  # of 0, sd-scripts makes the rank
            alpha = read[name].item() or float(rank)
        if not rank or not ALPHA["check"](alpha):
            what = f"is {alpha!r}; it takes {ALPHA['expects']}" if rank else "has rank 0"
            findings.fatal.append(Diagnostic(named(roles.get("alpha", next(iter(roles.values())))), what))
            continue
        found[layer] = alpha
    if unscaled:
        findings.notes.append(f"{unscaled} layers have no alpha in the file: their scale is 1")
    return found


def _is_number(name: str | None, file: TensorSource) -> bool:
    return name is not None and file.header.tensors[name].shape in ((), (1,))
