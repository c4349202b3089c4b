"""The model card of an adapter, with the metadata that the Hub indexes; the base of the card of a run.

The metadata names only what is on the Hub, and nothing on a card tells about the machine's folders.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorary.adapters.content_hash import content_hash
from lorary.adapters.label_names import read_label_names
from lorary.adapters.peft.config import NAME as PEFT_CONFIG
from lorary.adapters.provenance import Provenance
from lorary.files.atomic import atomic_file
from lorary.files.home import expanded
from lorary.files.strict_json import show
from lorary.layers.module_kinds import module_positions
from lorary.model.fingerprint import base_name
from lorary.model.loading.model_kind import classes
from lorary.model.vocabulary import vocabulary_with_added
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, by_method, unique_tensor_sets
from lorary.spec.presets import presets_of

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from lorary.adapters.adapter import Adapter

NAME = "README.md"
# a classifier's pipeline on the Hub; that of a causal language model
CLASSIFICATION, GENERATION = "text-classification", "text-generation"
_LONGEST = 200  # characters of a setting on a card


def write_card(
    folder: str | os.PathLike[str], adapter: Adapter, *, name: str | None = None, base: str | None = None
) -> bool:
    """Write the card of an adapter into its folder, unless that has a README.md already.

    Args:
        folder: of the saved or exported adapter.
        adapter: its value.
        name: on the card; that of the folder by default.
        base: the Hub id of its base, if the adapter does not know it.

    Returns:
        Whether it was written.
    """
    file = Path(folder) / NAME
    if os.path.lexists(file):
        return False
    with atomic_file(file) as written:
        written.write(adapter_card(folder, adapter, name=name, base=base).encode())
    return True


def adapter_card(
    folder: str | os.PathLike[str], adapter: Adapter, *, name: str | None = None, base: str | None = None
) -> str:
    """The card as Markdown with the Hub's front matter; arguments as for `write_card`."""
    folder = Path(folder)
    name = name or Path(os.path.abspath(folder)).name
    as_peft, names = (folder / PEFT_CONFIG).is_file(), presets_of(adapter.method)
    labels = read_label_names(folder)
    auto, pipeline = _task(adapter.base.architecture)
    known = base or adapter.base.name
    head = front_matter(name, hub_id(known, certain=base is not None), as_peft=as_peft, tags=names, pipeline=pipeline)
    of = f" for {_code(known)}" if known else ""
    trained = sum(s.trainable for s in unique_tensor_sets(adapter.sites))
    trained += sum(t.numel() for t in adapter.full.values())
    return page(
        name,
        head,
        f"An adapter{of}: {trained:,} trained parameters, {len(adapter.sites):,} adapted layers.",
        table("Method", _method_rows(adapter, names)),
        _layers(adapter.sites),
        *([] if adapter.provenance is None else [_made_from(adapter.provenance)]),
        "## Use\n\n"
        + usage(
            known,
            auto,
            name,
            labels.names if labels else (),
            as_peft=as_peft,
            vocabulary=vocabulary_with_added(adapter.sites),
        ),
        made_with({package: metadata.version(package) for package in ("lorary", "torch", "safetensors")}),
    )


# --- what the card of a run has in common with it ---------------------------------------------------------------------


def page(name: str, head: ModelCardData, *sections: str) -> str:
    """A card: the front matter, the title, and sections of Markdown."""
    from huggingface_hub import ModelCard

    return str(ModelCard("\n\n".join([f"---\n{head.to_yaml()}\n---", f"# {_text(name)}", *sections]) + "\n"))


def front_matter(
    name: str, base: str | None, *, as_peft: bool, tags: Iterable[str], pipeline: str | None, **more: Any
) -> ModelCardData:
    """The metadata of a card.

    Args:
        name: of the model.
        base: the Hub id of the base, if it is there.
        as_peft: whether PEFT reads the folder.
        tags: beside `lorary`.
        pipeline: the Hub's name of what the model does.
        more: further fields of `ModelCardData`.
    """
    from huggingface_hub import ModelCardData

    return ModelCardData(
        model_name=name,
        library_name="peft" if as_peft else "lorary",
        pipeline_tag=pipeline,
        base_model=base,
        base_model_relation="adapter" if base else None,
        tags=sorted({"lorary", *tags}),
        **more,
    )


def hub_id(source: str, *, certain: bool = True) -> str | None:
    """The Hub id of a model or data set; None for local and built-in ones, which must not be linked there.

    Args:
        source: as a user named it.
        certain: False for a name from a file: without an owner it may be that of a folder.
    """
    name = source.partition("#")[0]
    pattern = r"[\w.-]+(/[\w.-]+)?" if certain else r"[\w.-]+/[\w.-]+"
    return None if expanded(name).exists() or not re.fullmatch(pattern, name) else name


def public_name(source: str) -> str:
    """A name that is safe to publish: of a folder or file only its last part."""
    return source if source.startswith("builtin:") else base_name(source)


def components(method: Method, sites: Sequence[AdaptedSite]) -> str:
    """The components of a method, and of all others that its sites have, in one line of a table's cell."""
    methods = [group[0].method for group in by_method(sites)]
    texts = [str(one).splitlines()[1:] for one in (methods if len(methods) > 1 else [method])]
    return _text(" | ".join("; ".join(re.sub(r"  +", " ", row.strip()) for row in rows) for rows in texts))


def table(title: str, rows: Mapping[str, str]) -> str:
    """A section with a table of names and values."""
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def usage(
    base: str,
    auto: str,
    folder: str,
    labels: Sequence[str] = (),
    *,
    as_peft: bool,
    outputs: int = 0,
    vocabulary: int = 0,
) -> str:
    """The code that loads an adapter.

    Args:
        base: its name; of the built-in one `builtin:base`.
        auto: the class of Transformers.
        folder: of the adapter, or its Hub id.
        labels: of a classifier.
        as_peft: whether PEFT reads the folder.
        outputs: of a classifier without names for its labels.
        vocabulary: the rows that the base needs for the adapter's new tokens; 0 without new ones.
    """
    builtin = base.startswith("builtin:")
    arguments = "lorary.builtin.path()" if builtin else _literal(base or "the base model")
    if labels or outputs:
        arguments += f", num_labels={len(labels) or outputs}" + (f", id2label={dict(enumerate(labels))}" * bool(labels))
    load = f"{auto}.from_pretrained({arguments})"
    if vocabulary:
        load = f"lorary.resize_vocabulary({load}, {vocabulary})"
    code = f"""```python
import lorary{".builtin" if builtin else ""}
from transformers import {auto}

model = lorary.load({load}, {_literal(folder)})
```"""
    peft = "PEFT reads the folder as well"
    peft += f", once the base is resized: `model.resize_token_embeddings({vocabulary})`." if vocabulary else "."
    return f"{code}\n\n{peft}" if as_peft else code


def load_from(repo: str, card: str) -> str:
    """A run's card whose code loads the adapter from the Hub: the run's own folder is not there."""
    return re.sub(r'^(model = lorary\.load\(.*, )"adapter"\)$', lambda line: f'{line[1]}"{repo}")', card, flags=re.M)


def made_with(versions: Mapping[str, str]) -> str:
    """The last line of a card: the versions of the packages."""
    return "Made with " + ", ".join(f"{package} {version}" for package, version in versions.items()) + "."


# --- the parts of an adapter's own card -------------------------------------------------------------------------------


def _task(architecture: str) -> tuple[str, str | None]:
    """(the class that loads such a model, the Hub's name of what it does)."""
    if architecture in classes("SEQUENCE_CLASSIFICATION"):
        return "AutoModelForSequenceClassification", CLASSIFICATION
    if not architecture or architecture in classes("CAUSAL_LM"):
        return "AutoModelForCausalLM", GENERATION if architecture else None
    import transformers

    return (architecture if hasattr(transformers, architecture) else "AutoModel"), None


def _method_rows(adapter: Adapter, names: Sequence[str]) -> dict[str, str]:
    rows = {"method": f"{' + '.join(names)}: {components(adapter.method, adapter.sites)}"}
    if adapter.full:
        shown = ", ".join(_code(name) for name in sorted(adapter.full)[:3])
        rows["trained in full"] = shown + (f" and {len(adapter.full) - 3:,} more" if len(adapter.full) > 3 else "")
    if adapter.base.weights:
        rows["base"] = f"{_code(adapter.base.architecture)}, weights {_code(adapter.base.weights[-64:][:12])}"
    return rows | {"SHA-256": f"`{content_hash(adapter)}`"}


def _layers(sites: Sequence[AdaptedSite]) -> str:
    """A table of the adapted layers, one row for those that differ only in the number of their block."""
    positions, rows = module_positions(a.site.name for a in sites), dict[tuple[Any, ...], int]()
    for a in sites:
        rank = (a.r, f"{a.scale:g}") if a.r else ("", "")
        key = positions[a.site.name].kind, a.site.out_features, a.site.in_features, *rank
        rows[key] = rows.get(key, 0) + 1
    lines = [f"| {_code(k)} | {n:,} | {o:,} × {i:,} | {r} | {s} |" for (k, o, i, r, s), n in rows.items()]
    head = ["| layer | count | out × in | rank | scale |", "|---|---|---|---|---|"]
    return "\n".join(["## Layers", "", *head, *lines]) if lines else "## Layers\n\nNone has an adapter."


def _made_from(provenance: Provenance) -> str:
    """How an adapter was made from others, and from which."""
    lines = [
        f"| {_text(public_name(p.name)) or i + 1} | {'' if p.weight is None else f'{p.weight:+.4g}'} | "
        f"{f'`{p.sha256}`' if p.sha256 else ''} |"
        for i, p in enumerate(provenance.parents)
    ]
    settings = ", ".join(
        f"{_text(key)} {setting_text(value)}"
        for key, value in provenance.settings.items()
        if isinstance(value, (str, int, float, list))
    )
    parts = ["## Made from", "", f"By {_text(provenance.how)}" + (f": {settings}." if settings else ".")]
    return "\n".join([*parts, "", "| adapter | weight | SHA-256 |", "|---|---|---|", *lines])


def setting_text(value: Any) -> str:
    """A setting of a provenance in words, for a table's cell."""
    if isinstance(value, str):
        return _text(value[:_LONGEST])
    return f"{value:.6g}" if isinstance(value, float) else _text(show(value, most=_LONGEST))


def _text(text: str) -> str:
    """Text that stays text, in a cell or a title: names come from files, and may hold links, HTML or cells."""
    return re.sub(r"[<|`]|(?<=\])[(\[]", lambda found: f"&#{ord(found[0])};", _printable(text))


def _code(text: str) -> str:
    """Text as code in a line or a cell."""
    return f"`{_printable(text).replace('|', chr(92) + '|').replace('`', chr(39))}`"


def _literal(text: str) -> str:
    """Text as a string in Python's code, whatever it holds: readers of a card run it."""
    return json.dumps(_printable(text), ensure_ascii=False)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
