"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Base = Annotated[str | None, typer.Option("--base", help="Base model; else the one the adapter names.")]
Template = Annotated[str | None, typer.Option("--template", help="Chat template: builtin:chatml or a Jinja file.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, max=1_000_000, help="Length of an answer at most.")
]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, max=10.0, help="0: greedy.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.01, max=1.0, help="Nucleus sampling.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Random seed of sampling.")]
Decided = Annotated[list[str] | None, typer.Option("--set", help="key=value that is decided already; may be repeated.")]
GpuMemory = Annotated[
    float | None, typer.Option("--memory", min=0.1, max=1e6, help="Memory of your GPU in GB; empty: this machine.")
]
