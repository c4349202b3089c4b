"""lorary merge: base and adapter as one plain model folder."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, or a run folder that holds one.")],
    output: Annotated[Path, typer.Argument(help="Folder for the merged model; must not hold anything.")],
    base: Annotated[str | None, typer.Option("--base", help="Base model; else the one the adapter names.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (the base's own), float32, bfloat16, float16.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Accept a base it was not trained on, if it fits.")] = False,
) -> None:
    """Fold an adapter into its base: a plain Transformers model, for any program that reads one.

    The sum is taken in fp32 and rounded once; what rounding costs is measured and shown.
    """
    import lorary
    from lorary.biases import BiasWarning, homeless
    from lorary.cli.adapters import adapter_folder, base_of
    from lorary.errors import FileError, Problem, StateError
    from lorary.formats.atomic import atomic_directory
    from lorary.train.models import load_config, load_model, load_tokenizer, quiet

    folder = adapter_folder(adapter)
    if folder is None:
        raise FileError(f"cannot merge {adapter}:", [Problem(str(adapter), "there is no adapter in it")])
    section = base_of(folder, base, dtype)
    if dtype == "auto":  # what is kept on disk, whatever this machine would compute in
        saved = str(load_config(section).dtype or "float32").removeprefix("torch.")
        section = section.model_copy(update={"dtype": saved})
    with atomic_directory(output) as target:
        model = load_model(section)
        lorary.load(model, folder, force=force)
        before = probe(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BiasWarning)  # refused below, with every name
            lorary.merge(model)
        if lost := homeless(model):
            raise StateError("this model cannot be kept merged:", lost)
        after = probe(model)
        with quiet():
            model.save_pretrained(target)
        load_tokenizer(section).save_pretrained(target)
    same = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    far = (before - after).abs().max().item()
    print(f"merged into {output}, {section.dtype}", file=sys.stderr)
    print(f"against the live adapter: logits differ by at most {far:.2g}, top-1 agrees at {same:.1%}", file=sys.stderr)
    print(output)


def probe(model: PreTrainedModel) -> Tensor:
    """Logits [64, vocabulary] in fp32 on a fixed row of tokens."""
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids).logits[0].float()
    return logits
