"""A program with the command line of `vllm serve` that computes with PEFT: what a plan starts in the tests.

`--wrong WORD` makes it fail in a known way: start, ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from http.server import ThreadingHTTPServer
from typing import Any


def main() -> None:
    options = parsed(sys.argv[1:])
    print("loading", options.model, flush=True)
    if options.wrong == "start":
        sys.exit("no memory left \x1b[31m for the weights")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7 if options.wrong == "ends" else 0))
    handler = handler_of(options)
    server = ThreadingHTTPServer((options.host, options.port), handler)
    print("ready", flush=True)
    server.serve_forever(poll_interval=0.05)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("model")
    for name in ("served-model-name", "dtype", "host", "hf-overrides", "revision", "wrong"):
        parser.add_argument(f"--{name}", default="")
    for name in ("port", "max-lora-rank", "max-loras", "max-cpu-loras"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--enable-lora", action="store_true", required=True)
    parser.add_argument("--lora-modules", nargs="+", type=json.loads, default=[])
    return parser.parse_args(arguments)


def handler_of(options: argparse.Namespace) -> type[Any]:
    """The handler of requests, with a model for each adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.analysis.verify.http_server import Handler, Served

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()

    models, parents = {options.served_model_name: base()}, {}
    for module in options.lora_modules:
        models[module["name"]] = PeftModel.from_pretrained(base(), module["path"]).eval()
        parents[module["name"]] = module["base_model_name"]
    served = Served(models, AutoTokenizer.from_pretrained(options.model), key=os.environ.get("VLLM_API_KEY", ""))
    served.parents = parents

    class WithHealth(Handler):
        def do_GET(self) -> None:  # noqa: N802
            if self.path != "/health":
                return super().do_GET()
            self.send_response(200)  # without a key
            self.end_headers()

    return type("Serving", (WithHealth,), {"served": served})


if __name__ == "__main__":
    main()
