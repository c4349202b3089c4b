"""The documentation page of a method, generated from its preset (`lorary methods NAME --markdown`)."""

from __future__ import annotations

import math
import re
from typing import Any

import lorary
from lorary.layers.block_names import TARGETS
from lorary.methods.compatibility import partners
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite
from lorary.spec.presets import Preset
from lorary.spec.site import Site

EXAMPLE = Site("layer", "linear", out_features=2048, in_features=1024, bias=True)

# Examples for methods that only projections of keys, or the token embedding, have tensors for.
EXAMPLES = (
    EXAMPLE,
    Site("self_attn.k_proj", "linear", out_features=2048, in_features=1024, bias=True),
    Site("embed_tokens", "embedding", out_features=1024, in_features=4096, bias=False),
)

# The linear layers of one of LLaMA-2-7B's blocks: name -> (out_features, in_features).
LLAMA = dict.fromkeys([f"self_attn.{projection}_proj" for projection in "qkvo"], (4096, 4096))
LLAMA |= {"mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008)}
LLAMA_BLOCKS = 32
LLAMA_EMBEDDING = Site("embed_tokens", "embedding", 4096, 32000, bias=False)
LLAMA_HEAD = Site("lm_head", "linear", 32000, 4096, bias=False)


def method_page(name: str, picture: str = "") -> str:
    """A method's page in Markdown: meaning, paper, options, tensors, and what it combines with.

    Args:
        name: of a preset.
        picture: the path of its picture, if there is one.
    """
    preset = lorary.presets()[name]
    return "\n".join([_opening(preset, picture), _options(preset), _tensors(preset), _partners(name)])


def example_site(method: Method) -> Site:
    """The first example layer that a method adapts; any one for a method that adapts none."""
    if method.delta is None:
        return EXAMPLE
    return next((site for site in EXAMPLES if not (a := AdaptedSite(site, method)).problems() and a.shapes), EXAMPLE)


def stem(name: str) -> str:
    """The file name of a preset's page, without its ending."""
    return name.replace("+", "-plus")


def cell(text: str) -> str:
    """Text escaped for a Markdown table."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").strip()


def value(default: Any) -> str:
    """A default in YAML notation."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ", ".join(map(str, default)) if default else "[]"
    return str(default)


def paper(citation: str) -> str:
    """A citation with its arXiv number, or that of OpenReview, as a link."""
    linked = re.sub(r"arXiv:(\S+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", citation)
    return re.sub(r"openreview:(\S+)", r"[openreview:\1](https://openreview.net/forum?id=\1)", linked)


def _opening(preset: Preset, picture: str) -> str:
    paragraphs = [" ".join(p.split()) for p in preset.about.partition(":")[2].split("\n\n")]
    lead = [p.replace("*", "\\*").replace("<", "&lt;") for p in paragraphs[1:3] if not _is_reference(p)]
    image = [f"![{preset.title}: what is frozen, what trains, and how they meet]({picture})\n"] if picture else []
    return "\n".join(
        [
            f"# {preset.title}\n",
            f"```text\n{preset.summary}\n```\n",
            *(f"{paragraph}\n" for paragraph in lead),
            *image,
            "| | |\n|---|---|",
            f"| paper | {paper(preset.citation)} |",
            f"| changes | {', '.join(preset.changes)} |",
            f"| when | {cell(preset.when)} |",
            f"| use | `{preset.name}` |\n",
        ]
    )


def _is_reference(paragraph: str) -> bool:
    return "arXiv:" in paragraph or "openreview:" in paragraph or paragraph.startswith("Differs from")


def _options(preset: Preset) -> str:
    meanings = preset.meanings
    rows = [
        f"| `{name}` | `{value(default)}` | {cell(meanings.get(name, ''))} |"
        for name, default in preset.parameters.items()
    ]
    rows.append(f"| learning rate | {_rate(preset.lr)} | the peak to start from: a language model, AdamW |")
    return "## Options\n\n| option | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _rate(lr: float) -> str:
    return f"{lr:.0e}".replace("e-0", "e-")


def _tensors(preset: Preset) -> str:
    method = lorary.method(preset.name, **preset.example)
    if method.delta is None:
        return "## What trains\n\nBase parameters: " + ", ".join(f"`{p}`" for p in method.full) + "\n"
    site = AdaptedSite(example_site(method), method)
    rows = [
        f"| `{role}` | `{list(shape)}` | {math.prod(shape):,} | {_state(site, role)} |"
        for role, shape in site.shapes.items()
    ]
    targets = site.join.targets or ("all-linear",)
    llama = LLAMA_BLOCKS * sum(
        AdaptedSite(Site(path, "linear", *sizes, False), method).trainable
        for path, sizes in LLAMA.items()
        if any(TARGETS[target](path) for target in targets if target in TARGETS)
    )
    ends = {"embedding": (LLAMA_EMBEDDING,), "vocabulary": (LLAMA_EMBEDDING, LLAMA_HEAD)}
    llama += sum(AdaptedSite(end, method).trainable for target in targets for end in ends.get(target, ()))
    where = " and ".join(f"`{target}`" for target in site.join.targets) or "all linear layers but the head"
    table = "| tensor | shape | parameters | |\n|---|---|---|---|\n" + "\n".join(rows)
    said = ", ".join(f"`{key}: {list(v)}`" for key, v in preset.example.items()) or "the default options"
    return (
        f"## What trains\n\nOn {_described(site.site)}, with {said}:\n\n{table}\n\n"
        f"{site.trainable:,} parameters train there, and {llama:,} on {where} of LLaMA-2-7B.\n"
    )


def _described(site: Site) -> str:
    if site.kind == "embedding":
        return f"an embedding of {site.in_features:,} tokens in {site.out_features:,} dimensions"
    layer = "a linear layer" if site is EXAMPLE else f"`{site.name}`, a linear layer"
    return f"{layer} of {site.in_features:,} inputs and {site.out_features:,} outputs"


def _state(site: AdaptedSite, role: str) -> str:
    if role in site.delta.shared:
        return "frozen, one for all layers"
    return "trains" if role in site.method.trained else "frozen"


def _partners(name: str) -> str:
    by_letter: dict[str, list[str]] = {"Y": [], "r": [], "N": []}
    for other, found in partners(name).items():
        link = f"[{lorary.presets()[other].title}]({stem(other)}.md)"
        by_letter[found.letter].append(f"- {link}: {cell(found.why)}" if found.why else link)
    text = "## Combines with\n\n"
    if by_letter["Y"]:
        text += ", ".join(by_letter["Y"]) + ".\n\n"
    for letter, heading in (("r", "With a restriction:"), ("N", "Refused, in the words of the refusal:")):
        if by_letter[letter]:
            text += f"{heading}\n\n" + "\n".join(by_letter[letter]) + "\n\n"
    return text + "The whole [table of combinations](../combinations.md).\n"
