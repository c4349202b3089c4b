"""A new token on the built-in base from one configuration: an adapter of a few kilobytes that PEFT reads.

The tokenizer that is saved beside the adapter is not counted: it has the size of the base's own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import lorary
from lorary import builtin
from lorary.cli import app

# PEFT's own trainer of tokens ties their rows, and warns about it all the same
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
NAMES = ("f", "g", "run", "add", "get", "key", "all", "put")
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def invoked(*arguments: str) -> None:
    ran = CliRunner().invoke(app(), list(arguments))
    assert ran.exit_code == 0, f"{arguments}: {ran.output} {ran.exception!r}"


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(ids).logits
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_learnt_kept_in_kilobytes_merged_exported_and_read_by_peft(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    if not tied:
        lorary.untie_embeddings(builtin.load_model()).save_pretrained("base")
        builtin.load_tokenizer().save_pretrained("base")
    rows = [{"prompt": f"<define> {name}(x):\n", "completion": "    return x\n"} for name in NAMES]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"id": "builtin:base" if tied else "base", "tokens": ["<define>"]},
        "method": {"name": "rows"},
        "data": {"train": "data.jsonl", "max_length": 64},
        "training": {"max_steps": 8, "batch_size": 4, "lr": 0.02, "logging_steps": 1},
        "output": "out",
    }
    Path("run.yaml").write_text(json.dumps(config))  # which is YAML too
    invoked("train", "run.yaml", "--quiet")
    adapter = Path("out/adapter")
    own = {file.name: file.stat().st_size for file in adapter.iterdir() if file.name not in TOKENIZER}
    assert set(own) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "lorary.json"}
    assert sum(own.values()) <= 10_000

    def base() -> Any:
        model = builtin.load_model()
        return model if tied else lorary.untie_embeddings(model)

    words = AutoTokenizer.from_pretrained(adapter)
    ids = words("<define> f(x):\n    return x\n", return_tensors="pt")["input_ids"]
    (new,) = words.convert_tokens_to_ids(["<define>"])
    assert int(ids[0, 0]) == new == len(builtin.load_tokenizer())
    untrained = lorary.resize_vocabulary(base(), new + 1)
    model = lorary.load(lorary.resize_vocabulary(base(), new + 1), adapter)
    live = logits(model, ids)

    def loss(scores: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(scores[0, :-1], ids[0, 1:]))

    assert loss(live) < loss(logits(untrained, ids)) - 0.3

    (code,) = re.findall("```python\n(.*?)```", (adapter / "README.md").read_text(), re.S)
    names: dict[str, Any] = {}
    if tied:  # the base is the built-in one, as the run names it
        # in the 16 bits of the base
        exec(code.replace('"adapter"', repr(str(adapter))), names)
        assert (logits(names["model"], ids).float() - live).abs().max() <= 5e-2 * live.abs().max()

    invoked("merge", "out", "merged")
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    assert merged.config.tie_word_embeddings is tied
    room = 2e-2 if tied else 1e-5  # a merged model has the precision of the base's files, here 16 and 32 bits
    assert (logits(merged, ids) - live).abs().max() <= room * live.abs().max()
    assert torch.equal(merged.get_input_embeddings().weight[:new], builtin.load_model().get_input_embeddings().weight)
    invoked("export", "out", "for-peft", "--to", "peft")
    theirs = base()
    theirs.resize_token_embeddings(new + 1, mean_resizing=False)
    by_peft = peft.PeftModel.from_pretrained(theirs, "for-peft")
    assert (logits(by_peft, ids) - live).abs().max() <= 1e-5 * live.abs().max()
