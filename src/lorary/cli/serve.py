"""lorary serve: an HTTP server for a base and any number of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorary.cli._options import Template

if TYPE_CHECKING:
    from lorary.errors import Diagnostic
    from lorary.serve.http.settings import Settings

KEYS, ADMIN_KEYS = "LORARY_KEYS", "LORARY_ADMIN_KEYS"


def serve(
    context: typer.Context,
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="Adapter or run folder, Hub id, or NAME=FOLDER.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; else the adapters' own, or builtin:base.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The base's name in requests; else as given.")] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="Folder of adapters that requests and admins may load by name.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Memory of adapters, keys and values, as 2GiB; else what a full batch needs."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0: any.")] = 8000,
    key: Annotated[
        list[str] | None,
        typer.Option("--key", help=f"Key of a user, or TENANT=KEY; several are fine. Also: {KEYS}=KEY,KEY"),
    ] = None,
    admin_key: Annotated[
        list[str] | None,
        typer.Option("--admin-key", help=f"Key that may load and unload adapters. Also: {ADMIN_KEYS}=KEY,KEY"),
    ] = None,
    no_keys: Annotated[bool, typer.Option("--no-keys", help="Answer everybody, on a public address too.")] = False,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", min=1, help="Rank of an adapter at most, as it is served.")
    ] = None,
    max_adapter: Annotated[str, typer.Option("--max-adapter", help="Size of an adapter's files at most.")] = "4GiB",
    max_body: Annotated[str, typer.Option("--max-body", help="Size of a request at most.")] = "4MiB",
    drain: Annotated[
        float, typer.Option("--drain", min=0, max=86_400, help="Seconds for running requests when it stops.")
    ] = 30.0,
    engine: Annotated[
        Literal["own", "vllm", "ray"],
        typer.Option("--engine", help="What computes: this process, a vLLM server, or replicas under Ray."),
    ] = "own",
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="ray: replicas of the engine.")] = 2,
    vllm: Annotated[str, typer.Option("--vllm", help="vllm: the command that runs it.")] = "vllm",
    vllm_options: Annotated[str, typer.Option("--vllm-options", help="vllm: further options of `vllm serve`.")] = "",
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="vllm: compare each adapter with lorary's before it is ready."),
    ] = True,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option("--dtype", help="dtype of the base.")
    ] = "auto",
    quantize: Annotated[
        Literal["auto", "nf4", "no"],
        typer.Option("--quantize", help="Storage of the base. auto: as all adapters on the command line were trained."),
    ] = "auto",
    template: Template = None,
) -> None:
    """Serve a base and its adapters over HTTP, as OpenAI's interface.

    lorary serve out/ sql=runs/7/ serves two adapters: a request names one as its `model`. Without arguments it serves
    the built-in base. SIGTERM and Ctrl-C let running requests end; a second one ends them.

    With --engine vllm, adapters are converted to what vLLM computes, or refused, and verified once it runs. With
    --engine ray, replicas on this machine or the cluster of RAY_ADDRESS share the requests.
    """
    from lorary.cli._serve import Start, run
    from lorary.cli._serve_engines import refuse_options

    refuse_options(context, engine)
    sizes, wrong_sizes = _sizes({"--budget": budget, "--max-adapter": max_adapter, "--max-body": max_body})
    settings = _settings(host, root, key, admin_key, no_keys, sizes, wrong_sizes, drain)
    most = sizes["--max-adapter"] or 0
    start = Start(
        tuple(adapters or ()),
        base,
        name,
        settings.root,
        sizes["--budget"],
        most,
        max_rank,
        dtype,
        quantize,
        template,
    )
    if engine == "vllm":
        from lorary.cli._serve_vllm import run_vllm

        run_vllm(start, settings, host, port, vllm, vllm_options, verify)
    elif engine == "ray":
        from lorary.cli._serve_ray import run_ray

        run_ray(start, settings, host, port, replicas)
    else:
        run(start, settings, host, port)


def _settings(
    host: str,
    root: Path | None,
    key: list[str] | None,
    admin_key: list[str] | None,
    no_keys: bool,
    sizes: Mapping[str, int | None],
    wrong_sizes: Sequence[Diagnostic],
    drain: float,
) -> Settings:
    """The settings of the server.

    Raises:
        ConfigError: every invalid option, sizes included.
    """
    from lorary.errors import ConfigError, Diagnostic
    from lorary.files.home import expanded
    from lorary.serve.http.settings import Settings

    users = [_with_tenant(text, number) for number, text in enumerate(_given(key, KEYS), start=1)]
    admins, local = _given(admin_key, ADMIN_KEYS), _is_local(host)
    problems = _key_problems([key for key, _ in users], admins)
    if not local and not (users or admins or no_keys):
        fix = f"give --key, or set {KEYS}; with --no-keys everybody may use it"
        problems.append(Diagnostic("--host", f"{host} can be reached from other machines, and there is no key", fix))
    if no_keys and (users or admins):
        problems.append(Diagnostic("--no-keys", "keys are given", "keep one of the two"))
    if root is not None and not expanded(root).is_dir():
        problems.append(Diagnostic("--root", f"there is no folder {root}"))
    problems += wrong_sizes
    if problems:
        raise ConfigError("cannot serve:", problems)
    return Settings(
        keys=dict(users),
        admin_keys=frozenset(admins),
        local=local and not (users or admins),
        root=None if root is None else expanded(root),
        body_bytes=sizes["--max-body"] or 0,
        drain=drain,
    )


def _given(options: list[str] | None, variable: str) -> list[str]:
    """The keys of an option and of an environment variable."""
    import os

    return [*(options or []), *filter(None, os.environ.get(variable, "").split(","))]


def _with_tenant(text: str, number: int) -> tuple[str, str]:
    """(key, tenant) of KEY or TENANT=KEY; the `=` at the end of a Base64 key is part of it."""
    tenant, _, key = text.partition("=")
    if key.strip("=") and tenant.replace("-", "").replace("_", "").isalnum():
        return key, tenant
    return text, f"key-{number}"


def _key_problems(keys: list[str], admins: list[str]) -> list[Diagnostic]:
    from lorary.errors import Diagnostic

    problems = []
    for option, given in (("--key", keys), ("--admin-key", admins)):
        if any(not 8 <= len(key) <= 512 or not key.isascii() or not key.isprintable() or " " in key for key in given):
            what = "a key must have 8 to 512 printable ASCII characters without spaces"
            problems.append(Diagnostic(option, what, "python -c 'import secrets; print(secrets.token_urlsafe(24))'"))
    if len(set(keys)) < len(keys):
        problems.append(Diagnostic("--key", "two users have the same key", "give each a key of its own"))
    if set(keys) & set(admins):
        problems.append(Diagnostic("--admin-key", "an admin's key is a user's as well", "give two keys"))
    return problems


def _is_local(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _sizes(options: Mapping[str, str | None]) -> tuple[dict[str, int | None], list[Diagnostic]]:
    """The bytes of sizes such as 2GiB, None for none; and those that are no sizes."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from lorary.errors import Diagnostic
    from lorary.files.strict_json import show

    sizes, problems = dict[str, int | None](), list[Diagnostic]()
    for option, text in options.items():
        try:
            size = None if text is None else int(TypeAdapter(ByteSize).validate_python(text))
        except ValidationError:
            size = 0
        if size is not None and size < 1024:
            what, fix = f"{show(text)} is not a size of 1 KiB or more", "write it as 2GiB or 500MiB"
            problems.append(Diagnostic(option, what, fix))
        sizes[option] = size
    return sizes, problems
