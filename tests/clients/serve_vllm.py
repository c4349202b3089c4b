"""`lorary serve --engine vllm`: greedy tokens equal to lorary's own engine, for every method that has a form there.

    python -m tests.clients.serve_vllm path/to/vllm [PRESET...]     in lorary's environment; vLLM has one of its own

Every preset is asked: what vLLM cannot compute must be refused, and the rest is served by one vLLM (LongLoRA, which
scales the base's RoPE, by another), verified, and compared token by token.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from typing import Any

PROMPTS = ("def parse(", "The first thing that", "import numpy as np\n", "class Queue:\n    def __init__(self")
TOKENS = 24
OPTIONS: dict[str, dict[str, Any]] = {"longlora": {"length": 512}, "multilora": {"n": 3}}
SIZES = {"vera": 0.3, "adalora": 0.3}  # of the numbers in an adapter, where products of three make it small
MORE: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "rspissa": (("pissa", "rslora"), {"r": 4}),
    "ranks": (("lora",), {"r": 2, "ranks": {"down_proj": 20}, "alphas": {"q_proj": 3.0}}),
}


def main() -> None:
    import lorary
    from lorary.errors import LoraryError
    from lorary.model.loading.source import ModelSection
    from lorary.serve.vllm.plan import VllmSettings, vllm_plan

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    section = ModelSection.of("builtin:base", dtype="float32")
    presets = {name.replace("+", "-plus"): ((name,), {}) for name in lorary.presets()}
    wrong, served = 0, list[dict[str, Path]]([{}, {}])
    with tempfile.TemporaryDirectory() as temporary:
        for name, (names, options) in {**presets, **MORE}.items():
            if sys.argv[2:] and name not in sys.argv[2:]:
                continue
            try:
                folder = saved(Path(temporary) / "adapters" / name, names, options | OPTIONS.get(name, {}))
            except LoraryError as error:
                print(f"skipped {name}: {error}")
                continue
            converted = Path(temporary) / "tried" / name
            converted.mkdir(parents=True)
            try:
                plan = vllm_plan({name: folder}, section, converted)
            except LoraryError as error:
                print(f"refused {name}: {error.problems[0].what}")
            else:
                served[plan.scaled][name] = folder
        settings = VllmSettings(sys.argv[1], port=0, options="--enforce-eager --max-model-len 200")
        for folders in filter(None, served):
            wrong += compared(folders, section, settings)
    print(f"{sum(map(len, served))} methods, {wrong} wrong")
    sys.exit(1 if wrong else 0)


def saved(folder: Path, presets: tuple[str, ...], options: dict[str, Any]) -> Path:
    """A filled adapter of the built-in base."""
    import lorary
    from lorary import builtin
    from tests import tiny

    where = {key: options[key] for key in ("ranks", "alphas") if key in options}
    own = {key: value for key, value in options.items() if key not in where}
    method = lorary.method(*presets, **own)
    if "longlora" in presets:
        method = method.replace(full=())  # embeddings and norms, which are refused
    model = builtin.load_model()
    lorary.attach(model, lorary.plan(model, method, **where))
    tiny.shaken(model, SIZES.get(folder.name, 0.03))
    lorary.save(model, folder)
    return folder


def compared(folders: dict[str, Path], section: Any, settings: Any) -> int:
    """Serve adapters with vLLM, and count those that it computes otherwise."""
    import dataclasses

    from lorary.serve.address import free_port
    from lorary.serve.vllm.plan import vllm_plan
    from lorary.serve.vllm.process import check_models, running
    from lorary.serve.vllm.serve import verify_plan

    settings = dataclasses.replace(settings, port=free_port(settings.host, settings.port))
    want, wrong = ours(folders), 0
    with tempfile.TemporaryDirectory() as converted:
        plan = vllm_plan(folders, section, Path(converted), settings)
        with running(plan.command, plan.environment, "vLLM") as server:
            server.wait_until_healthy(plan.url, 600)
            check_models(plan.url, plan.key, [plan.base, *folders], "vLLM")
            verify_plan(plan, section, print, lambda text: None)
            for adapter in plan.adapters:
                found = [theirs(plan.url, adapter.name, prompt) for prompt in PROMPTS]
                right = found == want[adapter.name] != want[""]  # which the adapter changes
                wrong += not right
                print(f"{'ok' if right else 'WRONG':6}{adapter}", flush=True)
                if not right:
                    print(found, want[adapter.name], want[""], sep="\n")
    return wrong


def ours(folders: dict[str, Path]) -> dict[str, list[list[int]]]:
    """Adapter, or "" for the base -> the greedy tokens after each prompt, by lorary's own engine."""
    from lorary.serve.open import open_engine
    from lorary.serve.request import Event, Finished, Request, Sampling

    engine = open_engine("builtin:base", {name: str(folder) for name, folder in folders.items()}, dtype="float32")
    engine.start()
    found: dict[str, list[list[int]]] = {name: [[] for _ in PROMPTS] for name in ("", *folders)}
    ends = []
    for name, rows in found.items():
        for prompt, row in zip(PROMPTS, rows, strict=True):
            ended = threading.Event()

            def deliver(event: Event, row: list[int] = row, ended: threading.Event = ended) -> None:
                ended.set() if isinstance(event, Finished) else row.append(event.id)

            ids = tuple(engine.tokenizer(prompt)["input_ids"])
            sampling = Sampling(TOKENS, temperature=0.0, ignore_eos=True)
            engine.submit(Request(ids, {name: 1.0} if name else {}, sampling), deliver)
            ends.append(ended)
    for ended in ends:
        ended.wait()
    engine.stop()
    return found


def theirs(url: str, model: str, prompt: str) -> list[int]:
    """vLLM's greedy tokens after a prompt."""
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    data = json.dumps(body | {"return_token_ids": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        found: list[int] = json.loads(reply.read())["choices"][0]["token_ids"]
    return found


if __name__ == "__main__":
    main()
