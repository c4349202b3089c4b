"""Private names of other libraries: in one file for each library, listed, and found missing with a clear error."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import transformers.masking_utils
import transformers.modeling_utils
import trl
from scripts import private_names
from torch import nn
from transformers import LlamaConfig

import lorary
from lorary.errors import LoraryError, changed_release, check_overridden
from lorary.kernels import torch_internals
from lorary.layers import transformers_internals
from lorary.serve.engine import continuous
from lorary.train.trainer import trainer_internals
from lorary.train.trainer.mixin import AdapterTraining
from tests import pages, tiny

FIX = "      hint: pip install --upgrade lorary, or install an older "


def test_they_are_in_one_file_for_each_library() -> None:
    assert private_names.misplaced(private_names.uses()) == []


def test_all_are_listed_for_maintainers() -> None:
    text = (pages.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert private_names.table() in text, "python scripts/private_names.py"


PLANTED = """
import torch
from torch._dynamo import config
from transformers.modeling_utils import load_state_dict
class Layer(torch.nn.Module):
    _own = 3
    async def _later(self):
        return 3
    def _apply(self, fn):
        self._mine = 1
        return super()._apply(fn)
    def forward(self, x):
        return self._own + self._mine + self._later() + x.module._parameters["weight"] + getattr(x, "_buffers")["b"]
"""


def test_a_private_name_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    found = private_names.uses(tmp_path)
    there = {use.name for use in private_names.misplaced(found)}
    assert there == {
        *("torch._dynamo.config", "transformers.modeling_utils.load_state_dict"),
        *("_parameters", "_buffers"),
    }
    assert {use.name for use in found if use.override} == {"_apply"}


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def test_every_override_of_a_module_is_checked() -> None:
    places = {use.name for use in private_names.uses() if use.override and use.file.startswith("layers/")}
    assert places == set(torch_internals.OVERRIDDEN)
    places = {use.name for use in private_names.uses() if use.override and use.file.startswith("model/")}
    assert places - set(torch_internals.OVERRIDDEN) == set(transformers_internals.OVERRIDDEN)
    places = {use.name for use in private_names.uses() if use.override and use.file.startswith("train/")}
    assert places == set(trainer_internals.OVERRIDDEN)
    places = {use.name for use in private_names.uses() if use.override and use.file.startswith("serve/")}
    assert places == {"_get_waiting_candidates"} < {n for names in continuous.OVERRIDDEN.values() for n in names}


def test_modules_and_tensors_answer() -> None:
    layer = nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular")
    norm = nn.BatchNorm1d(3)
    assert [name for name, p in torch_internals.parameters_of(layer).items() if p is layer.weight] == ["weight"]
    assert torch_internals.buffers_of(norm)["running_mean"] is norm.running_mean
    assert list(torch_internals.children_of(nn.Sequential(layer))) == ["0"]
    norm.register_buffer("cache", torch.zeros(1), persistent=False)
    assert torch_internals.not_saved_buffers_of(norm) == {"cache"}
    handles = layer.register_forward_hook(lambda *_: None), layer.register_forward_pre_hook(lambda *_: None)
    assert (len(torch_internals.forward_hooks_of(layer)), len(torch_internals.pre_hooks_of(layer))) == (1, 1)
    assert all(hasattr(layer, name) for name in torch_internals.HOOKS)
    assert [handle.remove() for handle in handles] == [None, None]
    assert list(torch_internals.padding_of(layer)) == [1, 1]
    x = torch.zeros(4)
    before = torch_internals.version_of(x)
    x += 1
    assert torch_internals.version_of(x) == before + 1
    assert torch_internals.storage_id(x) == torch_internals.storage_id(x[1:]) != torch_internals.storage_id(x.clone())
    assert torch_internals.schema_of(torch.ops.aten.relu.default).name == "aten::relu"
    assert torch.func.vmap(lambda _: torch.full((), float(torch_internals.is_traced())))(x).tolist() == [1.0] * 4
    assert not torch_internals.is_traced()


def test_the_compiler_is_not_imported_where_nothing_is_compiled() -> None:
    code = """
import sys, torch
from lorary.kernels.torch_internals import without_compiler
heavy = ("torch._dynamo", "sympy", "torch.fx.experimental.symbolic_shapes")
def there():
    print(*(name for name in heavy if name in sys.modules), "torch._inductor" in sys.modules)
x = torch.empty(4, 1, device="meta")
with without_compiler():
    y = torch.empty_like(x) * torch.empty(4, 3, device="meta") + 1
    assert (y.shape, y.dtype, y.stride()) == ((4, 3), torch.float32, (3, 1))
there()
with without_compiler():
    import sympy, torch._dynamo  # somebody needs them after all
    assert (sympy.Symbol("n") * 2).subs("n", 3) == 6
    assert torch._dynamo.config.error_on_nested_fx_trace is not None
    assert issubclass(sympy.Symbol, sympy.Basic) and not torch._dynamo.is_compiling()
    assert torch.mul(x, y).shape == (4, 3)
there()
z = torch.compile(lambda t: t * 2 + 1, backend="eager", fullgraph=True)(torch.ones(3))
assert z.tolist() == [3.0] * 3
"""
    first, second = fresh(code).splitlines()
    assert first == "False"
    assert second.endswith("True")


def fresh(code: str) -> str:
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- Transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", transformers_internals.UNDOCUMENTED)
def test_undocumented_names_are_there(name: str) -> None:
    assert getattr(transformers_internals, name) is not None


def test_an_undocumented_name_that_has_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.masking_utils, "sdpa_mask")
    with pytest.raises(LoraryError) as refusal:
        _ = transformers_internals.sdpa_mask
    assert str(refusal.value) == (
        "this release of transformers does not work with lorary:\n"
        f"  - transformers {transformers.__version__}: transformers.masking_utils has no sdpa_mask\n"
        f"{FIX}transformers; please report it with `lorary doctor --json`"
    )
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = transformers_internals.other


def test_models_and_configurations_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny.llama()
    assert transformers_internals.attention_of(model.config) == "sdpa"
    transformers_internals.set_attention(model.config, "eager")
    assert transformers_internals.attention_of(model.config) == model.config._attn_implementation == "eager"
    assert transformers_internals.attention_of(None) is None
    assert transformers_internals.uses_attention_interface(model)
    assert transformers_internals.exact_modules(model) == set()
    monkeypatch.setattr(model, "_keep_in_fp32_modules", ["norm"])
    assert transformers_internals.exact_modules(model) == {"norm"}
    assert transformers_internals.loaded_dtype(model, "lm_head.weight") == torch.float32
    assert transformers_internals.shared_conversion("nothing") == ""
    hooked = nn.Linear(2, 2)
    hooked.forward, hooked._old_forward = None, hooked.forward  # type: ignore[assignment]
    transformers_internals.without_device_hooks(hooked)
    assert hooked(torch.ones(2)).shape == (2,)


def test_a_base_is_quantised_by_a_loader_without_its_private_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a fallback may go: the mapping of names, the plan of precisions."""
    expected = lorary.load_quantized("builtin:base").state_dict()
    monkeypatch.setattr("lorary.model.loading.quantized.weight_conversions", lambda _: None)
    found = lorary.load_quantized("builtin:base").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    plain = SimpleNamespace(get_parameter_or_buffer=lambda name: torch.zeros(1, dtype=torch.float16))
    assert transformers_internals.loaded_dtype(plain, "weight") == torch.float16
    assert transformers_internals.weight_conversions(nn.Linear(1, 1)) is None


def test_checkpoints_are_opened_with_more_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", lambda *args, **options: (args, options))
    with transformers_internals.checkpoints_opened_with(backend="pread"):
        assert transformers.modeling_utils.safe_open("x", device="cpu") == (
            ("x",),
            {"device": "cpu", "backend": "pread"},
        )
    assert transformers.modeling_utils.safe_open("x") == (("x",), {})
    monkeypatch.delattr(transformers.modeling_utils, "safe_open")
    with transformers_internals.checkpoints_opened_with(backend="pread"):
        assert not hasattr(transformers.modeling_utils, "safe_open")


# --- the trainers -----------------------------------------------------------------------------------------------------


def test_a_trainer_with_other_methods_is_refused_when_its_class_is_made() -> None:
    class Newer(trl.SFTTrainer):  # type: ignore[misc]
        _load_scaler = None  # gone

        def _save_checkpoint(self, model: Any, *, where: Any) -> None: ...

        def _load_rng_state(self, checkpoint: Any, ranks: int = 1) -> None: ...  # one more, with a default

    Newer.__module__ = "trl.newer"
    with pytest.raises(LoraryError) as refusal:

        class _Ours(AdapterTraining, Newer):  # type: ignore[misc]
            pass

    assert str(refusal.value).splitlines() == [
        "this release of trl does not work with lorary:",
        f"  - trl {trl.__version__}: Newer has no _load_scaler",
        f"  - trl {trl.__version__}: Newer._save_checkpoint takes (model, where), not (model, trial)",
        f"{FIX}trl; please report it with `lorary doctor --json`",
    ]


def test_what_trl_alone_has_is_not_asked_of_transformers() -> None:
    with pytest.raises(LoraryError, match="Newer has no _send_telemetry"):

        class _Trl(AdapterTraining, type("Newer", (transformers.Trainer,), {"__module__": "trl.newer"})):  # type: ignore[misc]
            pass

    class _Plain(AdapterTraining, transformers.Trainer):  # type: ignore[misc]
        pass


def test_a_counter_that_has_gone_is_told() -> None:
    with pytest.raises(LoraryError, match=r"transformers .*: its trainer has no _tr_loss"):
        trainer_internals.log_state(SimpleNamespace(_metrics={"train": {}}))


def test_an_argument_without_a_default_is_told() -> None:
    class Newer:
        def _load(self, path: str, strict: bool) -> None: ...

    with pytest.raises(LoraryError, match=r"Newer\._load takes \(path, strict\), not \(path\)"):
        check_overridden(Newer, {"_load": ("path",)}, "lorary")
    check_overridden(Newer, {"_load": ("path", "strict")}, "lorary")


def test_a_package_without_a_version_is_named() -> None:
    assert "  - not-installed: has no x\n" in str(changed_release("not-installed", "has no x"))


def test_configurations_keep_their_public_name() -> None:
    config = LlamaConfig()
    config.name_or_path = "somewhere"
    assert config._name_or_path == "somewhere"  # what Transformers writes
