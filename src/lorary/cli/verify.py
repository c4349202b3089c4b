"""lorary verify: whether a server computes an adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lorary.cli._options import Base


def verify(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, or run folder that holds one.")],
    against: Annotated[
        str,
        typer.Option("--against", help="URL of an OpenAI-compatible server; or transformers or peft, in this process."),
    ],
    base: Base = None,
    base_model: Annotated[
        str, typer.Option("--base-model", help="Name of the base on the server; none: it serves no base.")
    ] = "",
    adapter_model: Annotated[str, typer.Option("--adapter-model", help="Name of the adapter on the server.")] = "",
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance", min=1e-6, max=10.0, help="Rounding of the server in nats; else by the base's dtype."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, max=3600.0, help="Seconds for one request.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask a server for log-probabilities, and say whether it computes the adapter, or what it computes instead.

    right, no-op, wrong scale, partial, wrong base, unclear or other; kept in certificate.json beside the adapter. Exits
    with 0 if it is right, and with 1 otherwise. A key is taken from LORARY_API_KEY or OPENAI_API_KEY.
    """
    from lorary.adapters.resolve import find_adapter, find_base
    from lorary.analysis.verify.server import ENGINES, server_address
    from lorary.analysis.verify.verify import verify as verified
    from lorary.cli import printable
    from lorary.cli._progress import progress_bar
    from lorary.model.loading.from_pretrained import load_model, load_tokenizer

    if against not in ENGINES:
        server_address(against)  # before the base is read
    folder = find_adapter(adapter, "verify")
    section = find_base(folder, base, "float32")
    with progress_bar() as update:
        found = verified(
            folder,
            against,
            model=load_model(section),
            tokenizer=load_tokenizer(section),
            base_model=base_model,
            adapter_model=adapter_model,
            tolerance=tolerance,
            timeout=timeout,
            progress=lambda text: update(description=text),
        )
    if as_json:
        print(json.dumps(found.record, indent=2))
    else:
        print(printable(str(found)))
        print(f"kept in {Path(folder) / 'certificate.json'}", file=sys.stderr)
    if not found.right:
        raise typer.Exit(1)
