"""vLLM as the engine: started, waited for and verified."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from lorary.errors import Diagnostic
from lorary.model.loading.source import ModelSection
from lorary.serve.address import free_port
from lorary.serve.vllm.plan import VllmPlan, VllmSettings, vllm_plan
from lorary.serve.vllm.process import ServerError, check_models, running

_TITLE = "vLLM"
_START_SECONDS = 1800.0  # of a large model from a slow disk


def serve_vllm(
    folders: Mapping[str, Path],
    section: ModelSection,
    settings: VllmSettings,
    *,
    verified: bool = True,
    say: Callable[[str], object] = print,
    progress: Callable[[str], object] = lambda text: None,
) -> int:
    """Serve adapters with vLLM until it ends or is told to.

    Args:
        folders: name -> adapter folder.
        section: the base.
        settings: of the server.
        verified: whether every adapter is verified before the server is said to be ready, which loads the base here.
        say: gets the lines of interest.
        progress: is told what is being done.

    Returns:
        vLLM's exit code.

    Raises:
        ConfigError: the settings are not acceptable.
        FileError: vLLM refuses or miscomputes an adapter; nothing has been started then.
        ServerError: vLLM did not start, or computes something else than an adapter.
    """
    settings = dataclasses.replace(settings, port=free_port(settings.host, settings.port))
    with tempfile.TemporaryDirectory(prefix="lorary-vllm-") as temporary:
        plan = vllm_plan(folders, section, Path(temporary), settings, progress=progress)
        say(str(plan))
        with running(plan.command, plan.environment, _TITLE) as server:
            server.wait_until_healthy(plan.url, _START_SECONDS, progress)
            check_models(plan.url, plan.key, [plan.base, *folders], _TITLE)
            if verified:
                verify_plan(plan, section, say, progress)
            server.ready = True
            say(f"vLLM serves {plan.base} and {len(plan.adapters)} adapters at {plan.url}/v1")
            return server.wait()


def verify_plan(
    plan: VllmPlan,
    section: ModelSection,
    say: Callable[[str], object],
    progress: Callable[[str], object],
) -> None:
    """Compare what the server computes for every adapter with what lorary computes.

    Raises:
        ServerError: an adapter is not computed, with the verdict; every one.
    """
    from lorary.analysis.verify.verify import verify
    from lorary.model.loading.from_pretrained import load_model, load_tokenizer

    model = load_model(section.model_copy(update={"dtype": "float32"}))
    tokenizer = load_tokenizer(section)
    problems = []
    for adapter in plan.adapters:
        found = verify(
            adapter.source,
            plan.url,
            model=model,
            tokenizer=tokenizer,
            base_model="none" if plan.scaled else plan.base,
            adapter_model=adapter.name,
            key=plan.key,
            progress=lambda text, name=adapter.name: progress(f"verifying {name}: {text}"),  # type: ignore[misc]
        )
        say(f"{adapter.name}: {found.verdict}, {found.reason}")
        if not found.right and found.verdict != "unclear":
            problems.append(Diagnostic(adapter.name, f"{found.verdict}: {found.reason}"))
    if problems:
        raise ServerError(f"{_TITLE} computes something else:", problems)
