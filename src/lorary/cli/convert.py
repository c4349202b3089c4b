"""lorary convert: an adapter of another tool as lorary's or PEFT's folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_LAYOUT = "Order of lora_B of fused experts, where the file does not say it: rank_major or grouped_by_expert."
_FROM = "Adapter folder, run folder, or Hub id; or a .safetensors or .gguf file."


def convert(
    source: Annotated[str, typer.Argument(metavar="FROM", help=_FROM)],
    output: Annotated[Path, typer.Argument(metavar="TO", help="Folder for the converted adapter; must be empty.")],
    to: Annotated[str, typer.Option("--to", help="lorary (which PEFT reads too where it can), or peft.")] = "lorary",
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model. Needed for files whose names only it explains; compares logits."),
    ] = None,
    expert_layout: Annotated[str | None, typer.Option("--expert-layout", help=_LAYOUT)] = None,
) -> None:
    """Convert an adapter of another tool: PEFT, mlx-lm, torchtune, diffusers, kohya's sd-scripts, llama.cpp.

    Names and layouts are translated, each with a note; what is not known is refused by name. The folder is read back
    before it takes its place, and every layer's update is compared; with --base, the logits too.
    """
    from lorary.adapters.intake.convert import convert as converted
    from lorary.adapters.resolve import find_adapter
    from lorary.cli._notes import print_notes, warnings_as_notes

    path = find_adapter(source, "convert")
    model = None if base is None else _model(base)
    with warnings_as_notes():
        check = None if model is None else _same_logits(path, model, expert_layout)
        done = converted(path, output, to=to, model=model, expert_layout=expert_layout, check=check)
    print_notes(done.adapter.notes)
    sites = len(done.adapter.sites)
    print(f"{sites} layers, {done.compared} updates compared: equal to {done.difference:.2g}", file=sys.stderr)
    print(output)


def _model(name: str) -> nn.Module:
    """The base with its weights, of its own class: of Transformers, or of diffusers where a folder says so."""
    from lorary.model.loading.from_pretrained import load_config, load_model
    from lorary.model.loading.model_kind import own_class
    from lorary.model.loading.source import ModelSection

    if (diffusion := _diffusion_model(Path(name))) is not None:
        return diffusion
    section = ModelSection.of(name, dtype="float32")
    model: nn.Module = load_model(section, model_class=own_class(load_config(section)))
    return model


def _diffusion_model(folder: Path) -> nn.Module | None:
    """The model in a folder of diffusers; None for any other folder.

    Raises:
        ConfigError: it is a whole pipeline, or diffusers is not installed.
    """
    from lorary.errors import ConfigError, Diagnostic

    headline = "cannot load the base:"
    if (folder / "model_index.json").is_file():
        what = f"{folder} is a pipeline of several models, and an adapter is read onto one of them"
        models = sorted(f"{folder}/{part.parent.name}" for part in folder.glob("*/config.json"))
        raise ConfigError(headline, [Diagnostic("--base", what, f"name one: {', '.join(models)}")])
    if not folder.is_dir() or "_class_name" not in _config(folder):
        return None
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError:
        what = f"{folder} holds a model of diffusers, which is not installed"
        raise ConfigError(headline, [Diagnostic("--base", what, "pip install diffusers")]) from None
    model: nn.Module = diffusers.AutoModel.from_pretrained(str(folder))
    return model


def _config(folder: Path) -> dict[str, Any]:
    from lorary.files.safe_open import read_json

    found = read_json(folder.resolve(), "config.json", 2**20) if (folder / "config.json").is_file() else {}
    return found if isinstance(found, dict) else {}


def _same_logits(source: Path, model: Any, expert_layout: str | None) -> Callable[[Path], None]:
    """The comparison of a model's logits with the source and with the written folder, for models of text."""

    def check(written: Path) -> None:
        import lorary
        from lorary.analysis.merge_check import logits
        from lorary.cli._comparison_rows import random_rows
        from lorary.errors import Diagnostic, FileError

        if not getattr(model, "can_generate", lambda: False)():
            return
        (row,) = random_rows(model.config.get_text_config().vocab_size, 1, 64)
        found = []
        for folder, layout in ((source, expert_layout), (written, None)):
            lorary.load(model, folder, expert_layout=layout)
            found.append(logits(model, row))
            lorary.detach(model)
        difference = (found[0] - found[1]).abs().max().item()
        if not difference <= 1e-4:
            what = f"logits with the written folder differ by {difference:.2g} from those with the source"
            raise FileError(f"cannot convert {source}:", [Diagnostic("", what)])
        print(f"logits differ by at most {difference:.2g} in fp32", file=sys.stderr)

    return check
