"""Ambient modes: every public function gives the same bits inside autocast, inference mode, a default device, ..."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import lorary
from lorary.adapters.peft.export import export_peft
from lorary.errors import LoraryError
from lorary.model.ambient import callers_device, mode_independent
from lorary.model.quantize import QuantizationWarning
from lorary.model.state import state_of
from tests.tiny import llama, shaken


class Net(nn.Module):
    """A linear, a convolutional and an embedding layer, large enough for oneDNN's bf16 products."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 64)
        self.up = nn.Linear(64, 96)
        self.filter = nn.Conv1d(96, 64, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.filter(self.up(self.table(ids)).transpose(1, 2)).sum(1)


IDS = torch.arange(14).reshape(2, 7)
METHODS = {
    "lora": lorary.method("lora", r=4),
    "dora": lorary.method("dora", r=4),
    "pissa": lorary.method("pissa", r=4),
    "glora": lorary.method("glora", r=4),
    "vera": lorary.method("vera", r=4),
    "adalora": lorary.method("adalora", r=4, target=2),
    "o-lora": lorary.method("o-lora", r=4),
    "qlora": lorary.method("qlora", r=4),
    "bitfit": lorary.method("lora", "bitfit", r=4),
}


class Passing(TorchFunctionMode):
    """Another library's mode, which sees every function and changes none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def setting(read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def several() -> Iterator[None]:
    dtype = setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"), dtype:
        yield


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "meta device": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "float64": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "matmul precision": lambda: setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "function mode": Passing,
    "dispatch mode": lambda: FlopCounterMode(display=False),
    "several": several,
}


def fresh() -> nn.Module:
    """The base, on the CPU and in float32 whatever surrounds this call."""
    torch.manual_seed(0)
    return Net()


@functools.cache
def _attached(name: str) -> nn.Module:
    model = lorary.attach(fresh(), lorary.plan(fresh(), METHODS[name], TARGETS[name]))
    return shaken(model, 0.1)


TARGETS: dict[str, Any] = {name: "all-linear" if name in ("vera", "glora", "qlora") else None for name in METHODS}
TARGETS |= {name: ["table", "up", "filter"] for name in ("lora", "dora", "adalora", "bitfit")}


def attached(name: str) -> nn.Module:
    return copy.deepcopy(_attached(name))


def adapter(name: str) -> lorary.Adapter:
    return lorary.Adapter.of(_attached(name))


def everything(model: nn.Module) -> dict[str, Any]:
    """The tensors of a model, those kept beside it, and its flags."""
    state = state_of(model)
    kept = {} if state is None else {"full": state.full, "replaced": state.replaced_weights}
    starts = {name: dict(m.start) for name, m in model.named_modules() if isinstance(m, lorary.Adapted)}
    return {
        "parameters": dict(model.named_parameters()),
        "buffers": dict(model.named_buffers()),
        "kept": kept,
        "starts": starts,
        "fingerprint": lorary.Fingerprint.of(model),
    }


# --- what is called: (method, a folder) -> a function that prepares nothing more and returns what is compared ---------

Call = Callable[[], Any]


def plan(name: str, folder: Path) -> Call:
    base, after = fresh(), [adapter(name)] if name == "o-lora" else []

    def call() -> Any:
        made = lorary.plan(base, METHODS[name], TARGETS[name], after=after)
        return str(made), made.fixed_tensors

    return call


def attach(name: str, folder: Path) -> Call:
    base, made = fresh(), lorary.plan(fresh(), METHODS[name], TARGETS[name])
    return lambda: lorary.attach(base, made)


def on_attached(function: Callable[[nn.Module], Any]) -> Callable[[str, Path], Call]:
    def prepared(name: str, folder: Path) -> Call:
        model = attached(name)
        return lambda: function(model)

    return prepared


def merge(name: str, folder: Path) -> Call:
    model = attached(name)
    return lambda: lorary.merge(model, keep=True)


def unmerge(name: str, folder: Path) -> Call:
    model = lorary.merge(attached(name), keep=True)
    return lambda: lorary.unmerge(model)


def disabled(name: str, folder: Path) -> Call:
    model = attached(name)

    def call() -> Any:
        with lorary.disabled(model):
            inside = {n: p.detach().numpy().tobytes() for n, p in model.named_parameters()}
        return model, inside

    return call


def switch(name: str, folder: Path) -> Call:
    model, new = attached("lora"), adapter(name)
    return lambda: lorary.switch(model, new)


def switch_sum(name: str, folder: Path) -> Call:
    model, new = fresh(), [adapter(name), adapter("bitfit")]
    return lambda: lorary.switch(model, new)


def switch_by_name(name: str, folder: Path) -> Call:
    model, new = fresh(), adapter(name)

    def call() -> Any:
        held = lorary.named_adapters(model)
        held["a"] = new
        lorary.switch(model, "a")
        held["b"] = held["a"]
        return lorary.switch(model, "b")

    return call


def save(name: str, folder: Path) -> Call:
    model = attached(name)

    def call() -> Any:
        lorary.save(model, folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return call


def load(name: str, folder: Path) -> Call:
    base = fresh()
    lorary.save(_attached(name), folder)
    return lambda: lorary.load(base, folder, trainable=True)


def load_adapter(name: str, folder: Path) -> Call:
    lorary.save(_attached(name), folder)
    return lambda: lorary.load_adapter(folder)


def export(name: str, folder: Path) -> Call:
    new, base = adapter(name), fresh()

    def call() -> Any:
        export_peft(new, folder / "peft", model=base)
        return {path.name: path.read_bytes() for path in (folder / "peft").iterdir()}

    return call


def low_rank(name: str, folder: Path) -> Call:
    new, base = adapter(name), fresh()
    return lambda: new.low_rank(base)


def compact(name: str, folder: Path) -> Call:
    new = adapter(name)
    return lambda: new.compact()


def quantize(name: str, folder: Path) -> Call:
    base = fresh()
    return lambda: lorary.quantize(base)


def dequantize(name: str, folder: Path) -> Call:
    base = lorary.quantize(fresh())
    return lambda: lorary.dequantize(base)


def importance(name: str, folder: Path) -> Call:
    model, made = attached(name), lorary.plan(fresh(), METHODS[name], TARGETS[name])

    def call() -> Any:
        found = lorary.layer_importance(model, [IDS])
        return dataclasses.astuple(found), str(lorary.drop_layers(made, found, 0.5))

    return call


def search(name: str, folder: Path) -> Call:
    method = lorary.method("glora", r=4, supernet=True)
    model = shaken(lorary.attach(fresh(), lorary.plan(fresh(), method, "all-linear")), 0.1)
    settings = lorary.EvolutionConfig(4, keep=2, crossovers=2, mutations=2, generations=2)
    return lambda: lorary.search_supernet(model, lambda m: float(m(IDS).square().sum()), settings)


def merge_check(name: str, folder: Path) -> Call:
    model = attached(name)

    def call() -> Any:
        check = lorary.MergeCheck.of(model, [])
        return check.sites(model), check.merge(model)

    return call


def rules(name: str, folder: Path) -> Call:
    model = attached(name)
    for p in model.parameters():
        p.grad = p.detach().clone() if p.requires_grad else None

    def call() -> Any:
        made = lorary.rules(model, 20, torch.optim.SGD(model.parameters()))
        penalty = made.penalty()
        penalty = penalty.detach().item() if isinstance(penalty, Tensor) else penalty
        made.after_backward()
        made.after_step()
        state = made.state_dict()
        made.load_state_dict(state)
        return penalty, made.report(), state, lorary.param_groups(model, 1e-3)

    return call


FUNCTIONS: dict[str, Callable[[str, Path], Call]] = {
    **{f.__name__: f for f in (plan, attach, merge, unmerge, disabled, switch, switch_sum, save, load, load_adapter)},
    **{f.__name__: f for f in (export, low_rank, compact, quantize, dequantize, importance, search, merge_check)},
    "switch_by_name": switch_by_name,
    "rules": rules,
    "detach": on_attached(lorary.detach),
    "adapter": on_attached(lorary.Adapter.of),
    "attached": on_attached(lorary.attached),
    "fingerprint": lambda name, folder: functools.partial(lorary.Fingerprint.of, fresh()),
}
ONE_METHOD = {"quantize": "lora", "dequantize": "lora", "search": "glora", "fingerprint": "lora"}


def outcome(function: str, name: str, folder: Path, mode: contextlib.AbstractContextManager[Any]) -> dict[str, Any]:
    """What a function returns when it is called in this mode, by path: a tensor, or a text."""
    folder.mkdir()
    call = FUNCTIONS[function](name, folder)
    with mode:
        try:
            returned = call()
        except LoraryError as error:
            returned = str(error)
    return dict(flat("", returned))


def flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        flags = value.dtype, value.device, value.requires_grad, value.is_inference(), type(value)
        yield path, (value.detach(), flags)
    elif isinstance(value, nn.Module):
        yield from flat(path, everything(value))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from flat(f"{path}/{key}", item)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from flat(f"{path}/{i}", item)
    elif isinstance(value, lorary.Adapter):
        yield from flat(path, [str(value), dict(value.tensors), dict(value.full), value.base])
    else:
        yield path, value if isinstance(value, bytes) else repr(value)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The paths at which two outcomes differ in a bit or in a flag."""
    wrong = sorted(before.keys() ^ after.keys())
    for path in before.keys() & after.keys():
        a, b = before[path], after[path]
        if isinstance(a, tuple) and isinstance(b, tuple):
            same = a[1] == b[1] and torch.equal(a[0], b[0])
        else:
            same = type(a) is type(b) and a == b
        wrong += [] if same else [path]
    return sorted(wrong)


@functools.cache
def outside(function: str, name: str, folder: Path) -> dict[str, Any]:
    return outcome(function, name, folder / f"outside {function} {name}", contextlib.nullcontext())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ambient")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_same_bits_in_every_mode(function: str, mode: str, folder: Path) -> None:
    names = [ONE_METHOD[function]] if function in ONE_METHOD else list(METHODS)
    wrong = {}
    for name in names:
        before = outside(function, name, folder)
        after = outcome(function, name, folder / f"{mode} {function} {name}", MODES[mode]())
        if paths := differences(before, after):
            wrong[name] = paths
    assert not wrong


# --- the decorator ----------------------------------------------------------------------------------------------------

# What needs no decorator: values without tensors, and the module, whose methods follow their caller's modes.
VALUES = {"ConfigError", "DataError", "Diagnostic", "FileError", "LoraryError", "MethodError", "PlanError"}
VALUES |= {"StateError", "TrainingError", "Attachment", "EvolutionConfig", "Importance", "LowRankForm", "MergeError"}
VALUES |= {"Method", "AdaptedSite", "Plan", "Preset", "SearchResult", "Site", "method", "presets", "__version__"}
VALUES |= {"Adapted", "NF4", "Comparison", "with_invocation", "with_prompt_text"}
VALUES |= {
    "AdapterDiff",
    "AdapterInspection",
    "Compression",
    "Extraction",
    "FirstGradients",
    "IntrinsicDimension",
    "Verdict",
}
# of the other classes
VALUES |= {"Adapter.load", "Adapter.save"}  # old names, which forward to functions that have it
VALUES |= {"Fingerprint.remember", "Fingerprint.forget", "Fingerprint.disagreements"}
VALUES |= {"Fingerprint.record", "Fingerprint.from_record"}
VALUES |= {f"TrainerCallback.on_{event}" for event in ("train_begin", "save", "log", "train_end")}  # call those that do


def public() -> dict[str, Any]:
    """name -> every public function of the package, and every public method of its classes."""
    found: dict[str, Any] = {}
    for name in lorary.__all__:
        value = getattr(lorary, name)
        if not isinstance(value, type):
            found[name] = value
            continue
        kinds = (FunctionType, staticmethod, classmethod)
        methods = [key for key, member in vars(value).items() if isinstance(member, kinds) and not key.startswith("_")]
        found |= {f"{name}.{key}": getattr(value, key) for key in methods}
    return found


def test_every_public_function_that_touches_tensors_is_mode_independent() -> None:
    lacking = {
        name
        for name, function in public().items()
        if name not in VALUES and name.partition(".")[0] not in VALUES
        if not getattr(function, "__mode_independent__", False)
    }
    assert lacking == set()


def test_every_exception_to_it_is_public() -> None:
    assert {name for name in VALUES if "." not in name} <= set(lorary.__all__)
    assert {name for name in VALUES if "." in name} <= public().keys()


def test_a_function_without_it_would_be_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the same merge without the decorator is another one."""
    before = outside("merge", "lora", folder)
    monkeypatch.setattr(lorary, "merge", inspect.unwrap(lorary.merge))
    after = outcome("merge", "lora", folder / "planted", MODES["autocast"]())
    assert "/parameters/up.weight" in differences(before, after)


def test_a_base_of_4_bits_is_read_and_written_the_same(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    expected = dict(flat("", lorary.load_quantized(tmp_path / "base")))
    lorary.save_quantized(lorary.load_quantized(tmp_path / "base"), tmp_path / "plain")
    for name in ("autocast", "inference mode", "meta device", "bfloat16"):
        with MODES[name]():
            model = lorary.load_quantized(tmp_path / "base")
            lorary.save_quantized(model, tmp_path / name)
        assert differences(expected, dict(flat("", model))) == []
        for path in (tmp_path / "plain").iterdir():
            assert (tmp_path / name / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_modes_are_there_again_afterwards_and_inside_a_block() -> None:
    model = attached("lora")

    def modes() -> Any:
        device = torch.get_default_device(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        return device, torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()

    with several(), MODES["matmul precision"]():
        expected = modes()
        with pytest.raises(ZeroDivisionError), lorary.disabled(model):  # noqa: PT012
            assert modes() == expected
            raise ZeroDivisionError
        assert modes() == expected
        with pytest.raises(lorary.StateError):
            lorary.unmerge(model)
        assert modes() == expected


def test_a_block_that_leaves_a_surrounding_block_first_leaves_its_modes() -> None:
    """`disabled` may be entered inside a mode and left outside of it."""
    model, stack = attached("lora"), contextlib.ExitStack()
    with torch.autocast("cpu", torch.bfloat16):
        stack.enter_context(lorary.disabled(model))
    stack.close()
    assert all(m.enabled for m in model.modules() if isinstance(m, lorary.Adapted))
    assert not torch.is_autocast_enabled("cpu")


def test_the_model_and_the_caller_s_functions_have_the_default_device_of_the_model() -> None:
    """As under `torch.set_default_device("cuda")`, with the meta device in its place."""

    @mode_independent
    def devices(model: nn.Module) -> list[str]:
        with callers_device(model):
            inside = torch.empty(1).device
        return [str(inside), str(torch.empty(1).device)]

    here, there = fresh(), fresh().to("meta")
    for mode in ("meta device", "default device"):
        with MODES[mode]():
            assert devices(there) == ["meta", "cpu"]
            assert devices(here) == ["cpu", "cpu"]
    assert devices(there) == ["cpu", "cpu"]


def test_precisions_that_were_set_apart_are_there_again_afterwards() -> None:
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("this PyTorch has one precision for all backends")
    model, matmul = attached("lora"), torch.backends.mkldnn.matmul
    expected = lorary.merge(copy.deepcopy(model)).up.weight
    before = torch.backends.cuda.matmul.fp32_precision, matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision, matmul.fp32_precision = "tf32", "bf16"
    try:
        assert torch.equal(lorary.merge(model).up.weight, expected)
        assert (torch.backends.cuda.matmul.fp32_precision, matmul.fp32_precision) == ("tf32", "bf16")
    finally:
        torch.backends.cuda.matmul.fp32_precision, matmul.fp32_precision = before


def test_what_autocast_has_cached_is_forgotten() -> None:
    """It keeps 16-bit copies of parameters that train, and does not see that they have changed."""
    base, bitfit = fresh(), lorary.method("full")
    with torch.autocast("cpu", torch.bfloat16):
        expected = base(IDS)
    model = shaken(lorary.attach(fresh(), lorary.plan(fresh(), bitfit)))
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model(IDS), expected)
        with lorary.disabled(model):
            assert torch.equal(model(IDS), expected)
        assert not torch.equal(model(IDS), expected)
        lorary.detach(model)
        assert torch.equal(model(IDS), expected)


def test_threads_share_the_settings_of_the_process() -> None:
    """The settings return when the last thread is done, not in the middle of its work."""
    entered, leave, seen = threading.Barrier(3), threading.Barrier(2), []

    @mode_independent
    def work(first: bool) -> None:
        entered.wait(10)
        if not first:
            leave.wait(10)
            seen.append(torch.get_default_dtype())

    with MODES["bfloat16"]():
        threads = [threading.Thread(target=work, args=(first,)) for first in (True, False)]
        for thread in threads:
            thread.start()
        entered.wait(10)
        threads[0].join(10)
        leave.wait(10)
        threads[1].join(10)
        assert torch.get_default_dtype() == torch.bfloat16
    assert seen == [torch.float32]


def test_a_warning_points_to_the_caller() -> None:
    base = lorary.quantize(fresh(), lorary.NF4(block=128))
    with pytest.warns(QuantizationWarning) as caught:
        lorary.switch(base, adapter("qlora"))
    assert [w.filename for w in caught] == [__file__]
