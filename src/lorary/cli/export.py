"""lorary export: an adapter in the format of another program."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

FORMS = ("peft",)


def export(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, run folder that holds one, or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder for the exported files.")],
    to: Annotated[str, typer.Option("--to", help="peft: a plain LoRA, or a DoRA, in PEFT's two files.")] = "peft",
    base: Annotated[
        str | None, typer.Option("--base", help="Base model: some methods need it; the result is then verified.")
    ] = None,
) -> None:
    """Write an adapter in another program's format: the same function of the same, unmodified base.

    PiSSA and OLoRA take twice their rank there; a method without such a form is refused with the reason. If RoPE is
    scaled (LongLoRA), `BASE.md` beside the files says how to load the base.
    """
    import lorary
    from lorary.adapters import export_peft, load_adapter
    from lorary.adapters.resolve import base_class, find_adapter, find_base
    from lorary.analysis.merge_check import logits
    from lorary.cli._comparison_rows import random_rows
    from lorary.errors import ConfigError, Diagnostic, did_you_mean
    from lorary.model.loading.from_pretrained import load_model

    if to not in FORMS:
        what, fix = "is not a known format", did_you_mean(to, FORMS)
        raise ConfigError(f"cannot export {adapter}:", [Diagnostic(f"--to {to}", what, fix)])
    folder = find_adapter(adapter, "export")
    if base is None:
        with _notes():
            export_peft(load_adapter(folder), output)
    else:
        section = find_base(folder, base, "float32")
        model = load_model(section, model_class=base_class(section, folder, load_adapter(folder)))
        lorary.load(model, folder)
        (row,) = random_rows(model.config.get_text_config().vocab_size, 1, 64)
        before = logits(model, row)
        lorary.detach(model)
        value = load_adapter(folder, model=model)
        with _notes():
            export_peft(value, output, model=model)
        if value.method.context is not None:  # not stored in PEFT's files
            value.method.context.apply(model).make_permanent()
        lorary.load(model, output)
        difference = (before - logits(model, row)).abs().max().item()
        print(f"compared with the adapter: logits differ by at most {difference:.2g} in fp32", file=sys.stderr)
    print(output)


@contextmanager
def _notes() -> Iterator[None]:
    """Print the warnings about an adapter and its export as notes on standard error."""
    from lorary.files.findings import AdapterWarning
    from lorary.layers.rope import PositionsWarning

    with warnings.catch_warnings(record=True) as caught:
        for category in (AdapterWarning, PositionsWarning):
            warnings.simplefilter("always", category)
        yield
    for warning in caught:
        if issubclass(warning.category, (AdapterWarning, PositionsWarning)):
            print(f"note: {warning.message}", file=sys.stderr)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
