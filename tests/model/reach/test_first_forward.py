"""The first training forward tells once which adapters did not run, and leaves nothing behind."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import lorary
from lorary.layers.adapted import adapted_layers
from lorary.model.reach.first_forward import ReachWarning
from tests import tiny

from . import nets

X = torch.randn(3, 4)


class Idle(nn.Module):
    """One layer runs; one does while evaluating only; two never do."""

    def __init__(self) -> None:
        super().__init__()
        self.live = nn.Linear(4, 4)
        self.judge = nn.Linear(4, 4)
        self.idle = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.live(x)
        return y if self.training else self.judge(y)  # type: ignore[no-any-return]


def attached(model: nn.Module, **options: Any) -> nn.Module:
    return lorary.attach(model, lorary.plan(model, tiny.LORA, **options))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_sites_that_did_not_run_are_named_once() -> None:
    model = attached(Idle()).train()
    with pytest.warns(ReachWarning) as told:
        model(X)
    assert [str(w.message) for w in told] == [
        "no adapter ran in the first training forward at idle.{0-1}, judge: "
        'if nothing else should run them, detach and plan again with exclude=["idle.0", "idle.1", "judge"]'
    ]
    assert hooks(model) == 0
    model(X)  # warnings are errors: it is said once


def test_evaluation_may_leave_out_layers() -> None:
    model = attached(Idle()).eval()
    model(X)
    with torch.no_grad():
        model.train()(X)
    assert hooks(model) == 3, "no training forward yet: those of `idle`, and of its end"
    with pytest.warns(ReachWarning, match=r"at idle\.\{0-1\}: "):
        model(X)


def test_the_watch_ends_as_soon_as_all_have_run() -> None:
    model = attached(Idle(), exclude="idle").eval()
    model(X)
    assert hooks(model) == 0


def test_nothing_is_watched_where_a_dry_forward_has_shown_all() -> None:
    assert hooks(attached(tiny.llama())) == 0
    model = nets.Direct()
    assert hooks(attached(model, example=X)) == 0


def test_an_expert_without_a_token_is_no_news() -> None:
    model = attached(nets.Experts(), exclude="unused").train()
    model(X)
    assert hooks(model) == 0


def test_sites_that_the_plan_saw_running_are_no_news() -> None:
    model = attached(nets.Experts(), example=X).train()
    with pytest.warns(ReachWarning, match=r"at unused: .*exclude=\[\"unused\"\]"):
        model(X)


@pytest.mark.parametrize("end", ["detach", "merge", "keep"])
def test_what_is_gone_by_then_is_not_missed(end: str) -> None:
    model = attached(Idle())
    lorary.detach(model) if end == "detach" else lorary.merge(model, keep=end == "keep")
    model.train()(X)
    assert hooks(model) == 0


def test_copies_watch_themselves() -> None:
    model = attached(Idle())
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    twins = copy.deepcopy(model), torch.load(stream, weights_only=False), pickle.loads(pickle.dumps(model))
    for twin in twins:
        with pytest.warns(ReachWarning, match="judge"):
            twin.train()(X)
        assert hooks(twin) == 0
        assert set(adapted_layers(twin)) == {"live", "judge", "idle.0", "idle.1"}
    assert hooks(model) == 5


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_run(reentrant: bool) -> None:
    class Checkpointed(nets.Experts):
        def forward(self, x: Tensor) -> Tensor:
            run: Any = torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=reentrant)
            return run  # type: ignore[no-any-return]

    model = attached(Checkpointed(), exclude="unused").train()
    model(X.clone().requires_grad_()).sum().backward()
    assert hooks(model) == 0


def test_an_adapter_loaded_for_a_bypassed_layer_is_said_to_have_no_effect(tmp_path: Path) -> None:
    model = tiny.shaken(attached(nets.Asked()))
    lorary.save(model, tmp_path)
    with pytest.warns(ReachWarning, match="the adapter has no effect at dead: Bypassed reads its weight and never"):
        lorary.load(nets.Bypassed(), tmp_path, force=True)
    lorary.load(nets.Asked(), tmp_path, force=True)


def test_compiled_forwards_say_nothing() -> None:
    torch._dynamo.reset()
    model = attached(nets.Tied(), targets=["live", "head"]).train()
    ids = torch.zeros(2, 3, dtype=torch.long)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = compiled(ids)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(ids), expected)
    assert torch.equal(model(ids), expected)
    assert hooks(model) == 0
    assert torch.equal(compiled(ids), expected)
