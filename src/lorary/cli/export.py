"""lorary export: an adapter in the format of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorary.cli._export import FORMS, Export, writer

_TO = f"The form: {', '.join(FORMS)}."


def export(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, run folder that holds one, or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder for the exported files.")],
    to: Annotated[str, typer.Option("--to", help=_TO)] = "peft",
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model. peft: only if the method needs it, or to verify the result."),
    ] = None,
    folded: Annotated[
        bool, typer.Option("--folded", help="peft: one rank and scale for all sites, for readers that ignore patterns.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="float32, bfloat16 or float16. merged: also auto, the base's own. gguf, ollama: float32 if left out.",
        ),
    ] = None,
    onto: Annotated[
        str | None,
        typer.Option("--onto", help="merged: trained (the weights as quantised in training), or original."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="merged: accept another base than in training, if it fits.")
    ] = False,
    base_gguf: Annotated[
        str | None,
        typer.Option("--base-gguf", help="ollama: the base, as a GGUF file or by its name there."),
    ] = None,
) -> None:
    """Write an adapter in another program's format: the same function of the same, unmodified base.

    peft: a plain LoRA, or a DoRA, in PEFT's two files; (IA)³, a prefix and a prompt as PEFT has them. PiSSA and OLoRA
    take twice their rank there; a method without such a form is refused with the reason. If RoPE is scaled (LongLoRA),
    `BASE.md` beside the files says how to load the base.

    merged: a plain Transformers model like that of `lorary merge`, but written file by file of the base's checkpoint,
    so that the whole model is never in memory.

    gguf: `adapter.gguf` for llama.cpp, of the architectures whose conversion is known. ollama: that file and a
    Modelfile. vllm, sglang: a LoRA that the engine computes correctly, and `serve.sh`, the command that serves it.
    """
    from lorary.adapters.resolve import find_adapter

    options: dict[str, Any] = {"folded": folded, "dtype": dtype, "onto": onto, "force": force, "base_gguf": base_gguf}
    given = {name: value for name, value in options.items() if value not in (None, False)}
    write = writer(adapter, to, given)
    write(Export(find_adapter(adapter, "export"), output, base, given))
    print(output)
