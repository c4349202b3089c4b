"""The folded form: one rank, one scale, a list of targets, and the same function."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorary
from lorary.adapters import export_peft
from tests.adapters import models
from tests.adapters.models import BASES, Base, adapted, by_peft, close, outputs

LLAMA, GPT2, BERT, CONV = BASES


def written(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("names", [("rslora",), ("dora",), ("pissa", "rslora")], ids="+".join)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_unequal_ranks_and_scales_become_one(base: Base, names: tuple[str, ...], tmp_path: Path) -> None:
    model = base.model()
    first = next(
        n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) or "c_attn" in n
    )
    targets = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D", "Conv2d", "Embedding")]
    targets = [name for name in targets if "lm_head" not in name][:6]
    method = lorary.method(*names, r=2, alpha=6)
    planned = lorary.plan(model, method, targets, ranks={first: 3}, alphas={targets[-1]: 5})
    lorary.attach(model, planned)
    models.fill(p for n, p in model.named_parameters() if ".params." in n)
    expected = outputs(model.eval())
    adapter = lorary.Adapter.of(model)
    export_peft(adapter, tmp_path / "plain", model=base.model())
    export_peft(adapter, tmp_path / "folded", model=base.model(), folded=True)
    before, _ = written(tmp_path / "plain")
    config, tensors = written(tmp_path / "folded")
    assert before["rank_pattern"]
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (False, {}, {})
    assert isinstance(config["target_modules"], list)
    times = 2 if "pissa" in names else 1
    assert config["r"] == 3 * times
    assert {t.shape[0] for n, t in tensors.items() if re.search(r"lora_(embedding_)?A", n)} == {config["r"]}
    close(by_peft(base, tmp_path / "folded"), expected)
    close(outputs(lorary.load(base.model(), tmp_path / "folded")), expected)


def test_equal_scales_leave_the_tensors_as_they_are(tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(adapted(LLAMA, "rslora"))
    export_peft(adapter, tmp_path / "plain")
    export_peft(adapter, tmp_path / "folded", folded=True)
    (_, before), (config, after) = written(tmp_path / "plain"), written(tmp_path / "folded")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert config["lora_alpha"] == pytest.approx(config["r"] * adapter.sites[0].scale, rel=1e-12)
    assert config["use_rslora"] is False


def test_sixteen_bits_stay_where_the_scale_does_not_round(tmp_path: Path) -> None:
    model = LLAMA.model()
    lorary.attach(
        model,
        lorary.plan(
            model,
            lorary.method("lora", r=2, alpha=4),
            ["q_proj", "k_proj", "v_proj"],
            alphas={"k_proj": 2, "v_proj": 3},
        ),
        dtype=torch.bfloat16,
    )
    models.fill(p for n, p in model.named_parameters() if ".params." in n)
    export_peft(lorary.Adapter.of(model), tmp_path, folded=True)
    _, tensors = written(tmp_path)
    kinds = {re.search(r"(\w)_proj\.lora_(.)", n).groups(): t.dtype for n, t in tensors.items()}  # type: ignore[union-attr]
    assert kinds["k", "B"] == kinds["q", "B"] == torch.bfloat16  # half of it is exact
    assert kinds["v", "B"] == torch.float32  # three quarters are not


def test_a_list_that_would_mean_other_sites_too_is_refused(tmp_path: Path) -> None:
    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(4, 4)
            self.inner = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner["fc"](self.fc(x))  # type: ignore[no-any-return]

    model = Nested()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), "re:fc"))
    models.fill(p for n, p in model.named_parameters() if ".params." in n)
    adapter = lorary.Adapter.of(model)
    export_peft(adapter, tmp_path / "plain", model=Nested())
    with pytest.raises(lorary.FileError, match=r"inner\.fc: PEFT would adapt it too"):
        export_peft(adapter, tmp_path / "folded", model=Nested(), folded=True)
    assert not (tmp_path / "folded").exists()
