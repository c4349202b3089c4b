"""The self-tests of `lorary doctor`: one step of each feature, on the built-in model.

A version number says nothing about whether a release works; doing the thing once does.
"""

from __future__ import annotations

import json
import math
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib import metadata
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from lorary.errors import LoraryError


class SelfTest(NamedTuple):
    """One feature.

    Args:
        what: its name in the report.
        run: does one step of it in an empty folder, and returns what worked in a few words.
        needs: the package without which there is nothing to test; empty if lorary always needs it.
    """

    what: str
    run: Callable[[Path], str]
    needs: str = ""


def run_all() -> Iterator[tuple[str, str, str]]:
    """(level, feature, detail) of each self-test: `ok`, or `fail` with the error and what to do."""
    for test in SELF_TESTS:
        if test.needs and not _is_there(test.needs):
            continue
        try:
            with _undisturbed() as folder:
                detail = test.run(folder)
        except (Exception, SystemExit) as error:  # a broken package may raise anything, also at import
            yield "fail", test.what, f"{_sentence(error)}; {_remedy(error)}"
        else:
            yield "ok", test.what, detail


def _is_there(package: str) -> bool:
    if package != "cuda":
        return find_spec(package) is not None
    import torch

    return torch.cuda.is_available()


@contextmanager
def _undisturbed() -> Iterator[Path]:
    """An empty folder; what libraries print and warn of is dropped, and random numbers stay as they were."""
    from lorary.model.reach.twin import random_numbers_kept

    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(StringIO()))
        stack.enter_context(redirect_stderr(StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(random_numbers_kept())
        yield Path(stack.enter_context(TemporaryDirectory(prefix="lorary-doctor-")))


# --- failures -------------------------------------------------------------------------------------------------------


def _sentence(error: BaseException) -> str:
    if isinstance(error, LoraryError):
        return " ".join([error.headline, *(f"{p.where}: {p.what}" if p.where else p.what for p in error.problems[:1])])
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _remedy(error: BaseException) -> str:
    """What to do: the error's own hint, or another release of the package that it comes from."""
    hints = [problem.fix for problem in getattr(error, "problems", ()) if problem.fix]
    if hints:
        return str(hints[0])
    package = _origin(error)
    if package == "lorary":
        return "please report it with the output of `lorary doctor --json`"
    return f"it comes from {_with_version(package)}: pip install --upgrade lorary {package}, or report it"


def _origin(error: BaseException) -> str:
    """The package whose file raised an error; `lorary` if the file is not in a package."""
    if isinstance(error, ImportError) and error.name:
        return error.name.partition(".")[0]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if (package := _package_of(Path(frame.filename))) is not None:
            return package
    return "lorary"


def _package_of(file: Path) -> str | None:
    """The package of a file: one of lorary's or of an installed package, or one that hides an installed package."""
    if Path(__file__).parents[1] in file.parents:
        return "lorary"
    names = [Path(part).stem for part in file.parts]
    if "site-packages" in names[:-1]:
        return names[len(names) - names[::-1].index("site-packages")]
    return next((package for package in _PACKAGES if package in names[-2:]), None)


_PACKAGES = ("transformers", "trl", "accelerate", "datasets", "peft", "bitsandbytes", "triton", "safetensors", "torch")


def _with_version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise LoraryError(what)


# --- the features ---------------------------------------------------------------------------------------------------


def _base() -> Any:
    from lorary.model.loading.from_pretrained import load_model
    from lorary.model.loading.source import ModelSection

    return load_model(ModelSection(id="builtin:base", dtype="float32"))


def _tokens(device: Any = "cpu") -> Any:
    from lorary.builtin import load_tokenizer

    return load_tokenizer()("def main():\n    return 0\n", return_tensors="pt").to(device)


def _logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(**_tokens(model.device)).logits.float()


def _trained(model: Any, *presets: str) -> Any:
    """The model after one step; everything that a step promises is checked."""
    import torch

    import lorary

    lorary.attach(model, lorary.plan(model, lorary.method(*presets, r=4, alpha=8)))
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=1e-2))
    tokens = _tokens(model.device)

    def loss() -> Any:
        return model(**tokens, labels=tokens["input_ids"]).loss

    first = loss()
    before = first.item()
    _expect(math.isfinite(before), f"the loss is {before}")
    first.backward()
    optimizer.step()
    with torch.no_grad():
        after = loss().item()
    _expect(after < before, f"a step does not lower the loss: {before:.4f} before, {after:.4f} after")
    return model


def _load_base(folder: Path) -> str:
    import torch

    model = _base()
    _expect(bool(torch.isfinite(_logits(model)).all()), "the base computes logits that are not finite")
    return f"builtin:base, {model.num_parameters():,} parameters"


def _lora(folder: Path) -> str:
    _trained(_base(), "lora")
    return "one step lowers the loss"


def _qlora(folder: Path) -> str:
    import lorary

    _trained(lorary.load_quantized("builtin:base", dtype="float32"), "qlora")
    return "quantised to NF4 while loading; one step lowers the loss"


def _adapter(model: Any, folder: Path) -> Path:
    import lorary

    lorary.save(model, folder / "adapter")
    return folder / "adapter"


def _save_and_load(folder: Path) -> str:
    import torch

    import lorary

    model = _trained(_base(), "lora")
    again = lorary.load(_base(), _adapter(model, folder))
    adapted = _logits(model)
    _expect(torch.equal(adapted, _logits(again)), "a saved adapter computes other logits when it is loaded")
    off = float((_logits(lorary.merge(again)) - adapted).abs().max())
    _expect(off < 1e-3, f"merged logits are off by {off:.1e}")
    return f"equal logits; merged, off by {off:.0e}"


def _peft(folder: Path) -> str:
    from peft import PeftModel

    model = _trained(_base(), "lora")
    theirs = PeftModel.from_pretrained(_base(), str(_adapter(model, folder)))
    off = float((_logits(theirs) - _logits(model)).abs().max())
    _expect(off < 1e-3, f"PEFT reads an adapter of lorary to other logits, off by {off:.1e}")
    return f"reads an adapter of lorary; logits off by {off:.0e}"


def _bitsandbytes(folder: Path) -> str:
    import lorary
    from lorary.layers.bitsandbytes import BnbNF4

    _trained(lorary.quantize(_base(), BnbNF4()), "lora")
    return "a base in its 4-bit layers; one step lowers the loss"


def _train(folder: Path) -> str:
    """`lorary train` of one step: data sets, TRL's trainer, a checkpoint, the run folder and its plot."""
    from lorary.train.config.load import from_dict
    from lorary.train.runner.run import run

    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) + "\n" for n in range(8)))
    training = {"max_steps": 1, "batch_size": 2, "gradient_accumulation_steps": 1, "save_steps": 1}
    config = {"model": "builtin:base", "method": {"name": "lora", "r": 4}, "data": str(data), "training": training}
    done = run(from_dict({**config, "output": str(folder / "run")}), quiet=True)
    _expect(done.steps == 1, f"the run made {done.steps} steps, not 1")
    return "one step in TRL's trainer, with a checkpoint and the run folder"


def _cuda(folder: Path) -> str:
    import torch

    import lorary

    _trained(_base().cuda(), "lora")
    _trained(lorary.load_quantized("builtin:base", dtype="float32").cuda(), "qlora")
    return f"{torch.cuda.get_device_name()}: one step of LoRA and of QLoRA"


def _triton(folder: Path) -> str:
    import torch

    from lorary.kernels import nf4

    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    quantized = nf4.quantize(W)
    there = nf4.dequantize(nf4.quantize(W.cuda()))
    _expect(torch.equal(there.cpu(), nf4.dequantize(quantized)), "its kernel reads 4-bit weights wrongly")
    return "4-bit weights are read exactly"


SELF_TESTS = (
    SelfTest("load", _load_base),
    SelfTest("lora", _lora),
    SelfTest("qlora", _qlora),
    SelfTest("save", _save_and_load),
    SelfTest("train", _train),
    SelfTest("to peft", _peft, "peft"),
    SelfTest("bnb 4 bits", _bitsandbytes, "bitsandbytes"),
    SelfTest("cuda step", _cuda, "cuda"),
    SelfTest("triton", _triton, "cuda"),
)
