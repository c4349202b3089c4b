"""The options of `lorary serve` by engine."""

from __future__ import annotations

import typer

from lorary.errors import ConfigError, Diagnostic

# Option -> the engines that have it; the others have them all.
_ENGINES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("vllm", "vllm_options", "verify"), ("vllm",)),
    "replicas": ("ray",),
    **dict.fromkeys(("root", "budget", "admin_key", "max_rank", "max_adapter", "max_body"), ("own", "ray")),
    **dict.fromkeys(("drain", "template", "quantize"), ("own", "ray")),
}
_FIXES = {
    "root": "name the adapters on the command line",
    "budget": "--vllm-options has vLLM's own, such as --gpu-memory-utilization 0.8",
    "admin_key": "adapters are not loaded at run time: leave it out",
    "template": "--vllm-options '--chat-template FILE'",
}


def refuse_options(context: typer.Context, engine: str) -> None:
    """Refuse options that an engine does not have.

    Raises:
        ConfigError: every one that was given.
    """
    problems = []
    for name, engines in _ENGINES.items():
        source = context.get_parameter_source(name)
        if engine not in engines and source is not None and source.name == "COMMANDLINE":
            fix = _FIXES.get(name, "") or f"leave it out; it is an option of --engine {' and '.join(engines)}"
            problems.append(Diagnostic(f"--{name.replace('_', '-')}", f"is not for --engine {engine}", fix))
    if problems:
        raise ConfigError("cannot serve:", problems)
