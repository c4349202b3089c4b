"""A method in a package of its own, one file, is known everywhere: nothing of lorary is edited for it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests import fresh, pages

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group(fresh.GROUP)]

FILE = Path(__file__).parent / "outside" / "moslora.py"

# With each of lorary's presets, in their order.
LETTERS = [*"YYrYYYNNNNNNNNNNYNNNNNNNYNNNNNYN"]

CONFIG = """
model: builtin:base
method: {name: [moslora, rslora], r: 4}
data: {train: "builtin:docstrings", max_length: 32, overlong: truncate}
training: {max_steps: 4, batch_size: 2, gradient_accumulation_steps: 1, save_steps: 2, lr: 0.01}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path of a new Python: the file, and what an installer writes beside it."""
    folder = tmp_path_factory.mktemp("site-packages")
    shutil.copy(FILE, folder)
    info = folder / "moslora-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moslora\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lorary.methods]\nmoslora = moslora\n")
    return folder


def ran(installed: Path, folder: Path, *arguments: str) -> str:
    """Prints of a new Python in `folder`, which must end well."""
    folder.mkdir(exist_ok=True)
    status, out, err = fresh.Program(*arguments, folder=folder, path=installed).ended(600)
    assert status == 0, out + err
    return out


def test_the_command_line_knows_it(installed: Path, tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        return ran(installed, tmp_path / "run", "-m", "lorary", *arguments)

    (row,) = json.loads(said("methods", "moslora", "--json"))
    assert (row["equation"], row["year"], row["lr"]) == ("y = W x + b + s B M A x", 2024, 3e-4)
    assert row["numbers"] == 16 * (4096 + 4096) + 16 * 16
    assert row["changes"] == ["what is trained", "where it starts"]

    page = said("methods", "moslora", "--markdown")
    assert page.startswith("# MoSLoRA\n\n```text\ny = W x + b + s B M A x\n```\n\nLoRA adds r subspaces one by one")
    assert "[arXiv:2406.11909](https://arxiv.org/abs/2406.11909)" in page
    assert "| `r` | `16` | the rank; the mixer has r \\* r numbers. |" in page
    assert "| `M` | `[16, 16]` | 256 | trains |" in page
    assert "- [LoRA+](lora-plus.md): the ratio is between B and A; M learns at A's rate\n" in page

    chosen = said("methods", "--answers", "quality=best")
    assert "name: moslora\n" in chosen
    assert "# MoSLoRA: For more from the same rank" in chosen


def test_its_verdicts_follow_from_its_components(installed: Path, tmp_path: Path) -> None:
    code = "from lorary.methods.compatibility import partners; print(*(v.letter for v in partners('moslora').values()))"
    assert ran(installed, tmp_path / "run", "-c", code).split() == LETTERS


def test_its_memory_is_predicted(installed: Path, tmp_path: Path) -> None:
    printed = ran(installed, tmp_path / "run", "-m", "lorary", "plan", "builtin:base", "-m", "moslora", "--r", "8")
    trained = int(re.search(r"^trains +([\d,]+) of", printed, re.MULTILINE)[1].replace(",", ""))  # type: ignore[index]
    assert trained == 175_104 + 6 * 7 * 8 * 8  # LoRA's, and a mixer in each of the seven layers of six blocks
    (adapters,) = re.findall(r"^adapters +(\S+) KiB$", printed, re.MULTILINE)
    assert float(adapters) == pytest.approx(4 * trained / 2**10, abs=0.1)
    assert re.search(r"^activations +\S+ MiB$", printed, re.MULTILINE)


def test_it_trains_resumes_saves_and_is_exported(installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "train.yaml").write_text(CONFIG)
    ran(installed, folder, "-m", "lorary", "train", "train.yaml", "--quiet")
    shutil.copytree(folder / "out" / "adapter", folder / "whole")
    assert json.loads((folder / "whole" / "lorary.json").read_text())["method"]["delta"]["component"] == "Mixed"

    shutil.rmtree(folder / "out" / "adapter")
    shutil.rmtree(folder / "out" / "checkpoints" / "checkpoint-4")
    ran(installed, folder, "-m", "lorary", "train", "train.yaml", "--quiet", "--resume")
    resumed, whole = ((folder / where / "adapter.safetensors").read_bytes() for where in ("out/adapter", "whole"))
    assert resumed == whole

    ran(installed, folder, "-m", "lorary", "export", "whole", "peft")
    ran(installed, folder, "-c", COMPARED)


# What the adapter computes, what it changes, and what PEFT reads in its export.
COMPARED = """
import torch
from peft import PeftModel
import lorary
from lorary.builtin import load_model

@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(12)[None] * 7).logits

adapted = logits(lorary.load(load_model(), "whole"))
assert (adapted - logits(load_model())).abs().max() > 1e-3
theirs = logits(PeftModel.from_pretrained(load_model(), "peft"))
torch.testing.assert_close(theirs, adapted, rtol=0, atol=1e-5 * adapted.abs().max().item())
"""


def test_the_laws_hold_for_it(installed: Path) -> None:
    """Alone on every kind of layer, and on a linear one with every preset that it combines with."""
    chosen = "law_holds and float32 and ([moslora- or (moslora and -linear-))"
    tests = ["-p", "no:cacheprovider", "tests/laws/test_laws.py", "--laws=all", "-k", chosen]
    tests += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    program = fresh.Program("-m", "pytest", *tests, folder=pages.ROOT, beside=installed, path=installed)
    status, printed, errors = program.ended(900)
    assert status == 0, printed + errors
    assert int(printed.split(" passed")[0].split()[-1]) == 13 + 6, printed  # kinds of layer; legal pairs on a layer


@pytest.mark.parametrize(
    ("code", "error"), [("import no_such_module", "ModuleNotFoundError("), ("raise SystemExit(3)", "SystemExit(3)")]
)
def test_a_broken_one_is_reported_and_leaves_the_others(code: str, error: str, installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(installed, folder)
    (folder / "moslora.py").write_text(f"{code}\n")
    program = fresh.Program("-m", "lorary", "methods", "lora", folder=tmp_path, beside=folder, path=folder)
    status, out, errors = program.ended()
    assert (status, out.startswith("lora (2021)\n")) == (0, True)
    assert f"the method moslora of moslora cannot be loaded: {error}" in errors
