"""A full disk, no memory, numbers that are not finite: the real things, and what a user reads then."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import re
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaForCausalLM, TrainerCallback, TrainerState

from lorary.analysis.memory.memory import Memory
from lorary.cli import main
from lorary.errors import FileError, TrainingError
from lorary.train.runner import build, run
from lorary.train.runner.folder import RunFolder
from lorary.train.runner.recorder import Recorder
from lorary.train.trainer import checkpoint
from lorary.train.trainer.failure_messages import model_too_large
from tests.train.resume.processes import forked
from tests.train.runs import base_folder, changed, configuration, llama, rows, sft
from tests.train.small import tokenizer

MIB = 2**20
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="RLIMIT_AS is obeyed, and /dev/full is there, on Linux alone"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def words(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return configuration(base, Path("data.jsonl"))


class At(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Does something at the end of a step."""

    def __init__(self, step: int, work: Callable[[], None]) -> None:
        self.step, self.work = step, work

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.work()


def _command(config: dict[str, Any], *options: str, callbacks: Any = ()) -> tuple[int, str]:
    """`lorary train` in this process: its exit code, and what it wrote to stderr."""
    Path("my.yaml").write_text(yaml.safe_dump(config))
    real, stderr = run.run, sys.stderr
    run.run = lambda *a, **k: real(*a, **k, callbacks=list(callbacks))
    sys.argv, sys.stderr = ["lorary", "train", "my.yaml", "--quiet", *options], io.StringIO()
    try:
        main()
        code: Any = 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        said, sys.stderr, run.run = sys.stderr.getvalue(), stderr, real
    return code, said


# --- a full disk ----------------------------------------------------------------------------------------------------


def _small_disk(folder: Path, size: int) -> bool:
    """Mounts a file system of so many bytes that this process alone sees; False where it may not."""
    libc, new_user, new_mount, private = ctypes.CDLL(None, use_errno=True), 0x10000000, 0x20000, 0x44000
    if libc.unshare(new_mount if os.geteuid() == 0 else new_user | new_mount):
        return False
    libc.mount(b"none", b"/", None, private, None)  # nothing of it is seen outside
    folder.mkdir()
    return not libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=%d" % size)


def _fill(path: Path) -> None:
    """Writes until there is no room left."""
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
    assert os.statvfs(path).f_bfree == 0


def test_a_disk_that_is_full_stops_the_run_and_keeps_the_last_checkpoint(words: dict[str, Any], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    out = disk / "out"
    config = words | {"output": str(out)}

    def work() -> Any:
        if not _small_disk(disk, 2 * MIB):
            return None
        code, said = _command(config, callbacks=[At(4, lambda: _fill(disk / "other"))])
        left = checkpoint.newest(out / "checkpoints")[0]
        assert left is not None
        names = sorted(p.name for p in (out / "checkpoints").iterdir())
        (disk / "other").unlink()
        again, _ = _command(config, "--resume")
        return code, said, left.name, names, again, (out / "adapter" / "lorary.json").is_file()

    status, found = forked(work)
    assert status == 0
    if found is None:
        pytest.skip("this system lets nobody mount a file system")
    code, said, *rest = found
    assert (code, *rest) == (4, "checkpoint-2", ["checkpoint-2"], 0, True)
    assert said.splitlines() == [
        f"error: cannot write '{out / 'checkpoints' / 'checkpoint-4'}'; what was there before is unchanged",
        "  - no space left on device: 0 bytes are free",
        "      hint: free some space (or raise the quota or file-size limit) or choose another folder",
        f"  - checkpoint: the last good one is kept: {out / 'checkpoints' / 'checkpoint-2'}",
        "      hint: resume when there is room",
    ]


@linux
def test_a_log_that_cannot_grow_is_said_and_the_events_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(RunFolder("/dev"))
    recorder.path = Path("/dev/full")
    with pytest.raises(FileError, match=r"cannot write '/dev/full'.*\n.*no space left on device"):
        recorder.on_log(None, TrainerState(), None, {"loss": 1.0})
    with run._log_to_file(Path("/dev/full")):
        logging.getLogger("lorary.train").debug("nobody can read this")
    assert capsys.readouterr().err == ""


def test_a_file_that_may_not_grow_stops_the_run_likewise(tmp_path: Path) -> None:
    """The limit of a process, which needs no privilege to set."""

    def work() -> Any:
        t = sft(tmp_path, save_strategy="steps", save_steps=2, max_steps=6)
        limit = (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        t.add_callback(At(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)))
        with pytest.raises(FileError) as caught:
            t.train()
        return str(caught.value), sorted(p.name for p in tmp_path.iterdir())

    status, (said, names) = forked(work)
    assert status == 0
    assert "file too large" in said
    assert said.endswith(
        f"  - checkpoint: the last good one is kept: {tmp_path / 'checkpoint-2'}\n      hint: resume when there is room"
    )
    assert names == ["checkpoint-2"]


# --- no memory ------------------------------------------------------------------------------------------------------


def _limit(more: int) -> None:
    """This process may take so many bytes more than it has.

    What earlier tests have left free on the heap is occupied first: the allocator would serve large tensors from it.
    """
    malloc = ctypes.CDLL(None).malloc
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    _allow(0)
    size = 1024 * MIB
    while size >= MIB:
        if malloc(size) is None:
            size //= 2
    _allow(more)


def _allow(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))


@linux
def test_a_run_without_memory_says_what_would_take_less(words: dict[str, Any], tmp_path: Path) -> None:
    """The third step needs several times 41 MB for its attention, and 32 are there: the allocator refuses."""
    text = "hello world " * 2000
    Path("long.jsonl").write_text(f'{{"text": "{text}"}}\n' * 12)
    config = words | {"data": {"train": "long.jsonl", "max_length": 800, "overlong": "truncate"}}
    config = changed(config, "training", eval_steps=None, save_steps=1)
    config |= {"model": {"id": words["model"], "attn_implementation": "eager"}}
    status, (code, said) = forked(lambda: _command(config, callbacks=[At(2, lambda: _limit(32 * MIB))]))
    assert status == 0
    assert code == 1
    lines = said.splitlines()
    assert lines[0] == "error: training ran out of memory in optimizer step 3:"
    assert re.fullmatch(
        r"  - batch: 4 x 800 tokens in one forward pass; DefaultCPUAllocator: can't allocate memory: "
        r"you tried to allocate \d+ bytes\. Error code 12 \(Cannot allocate memory\)",
        lines[1],
    )
    assert lines[2:7] == [
        "      hint: set batch_size to 2 and double gradient_accumulation_steps: the steps are the same",
        "  - gradient_checkpointing: activations are kept for the backward pass",
        "      hint: set gradient_checkpointing: true to recompute them instead",
        "  - max_length: memory grows with the longest row of a batch",
        "      hint: set a smaller max_length",
    ]
    assert re.fullmatch(r"  - prediction: [\d.]+ MiB at the peak \(weights .*, activations .*\)", lines[7])
    assert lines[8:] == [f"  - checkpoint: the last good one is kept: {Path('out/checkpoints/checkpoint-2')}"]


@linux
def test_an_evaluation_without_memory_names_its_own_batch_size(tmp_path: Path) -> None:
    def work() -> str:
        words = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 64}
        long = type(rows()).from_list([{"input_ids": [5] * 1000, "labels": [5] * 1000}] * 64)
        t = sft(tmp_path, held_out=long, activation_checkpointing=True, **words)
        t.add_callback(At(2, lambda: _limit(32 * MIB)))
        with pytest.raises(TrainingError) as caught:
            t.train()
        return str(caught.value)

    status, said = forked(work)
    assert status == 0
    first, batch, hint, *rest = said.splitlines()
    assert first == "training ran out of memory in an evaluation:"
    assert batch.startswith("  - batch: 64 x 1000 tokens in one forward pass; DefaultCPUAllocator: ")
    assert hint == "      hint: set eval_batch_size to 32: the loss is the same"
    assert rest == [
        "  - max_length: memory grows with the longest row of a batch",
        "      hint: set a smaller max_length",
        "  - checkpoint: none had been written yet",
    ]


def _large(folder: Path) -> Path:
    """The tiny base, with 500,000 tokens: 64 MB."""
    config = llama().config
    config.vocab_size = 500_000
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@linux
def test_a_model_that_does_not_fit_is_said_before_anything_trains(words: dict[str, Any], tmp_path: Path) -> None:
    def work() -> tuple[int, str]:
        load = build.load_model

        def limited(*words: Any, **options: Any) -> Any:
            _limit(16 * MIB)
            return load(*words, **options)

        build.load_model = limited
        return _command(words | {"model": str(large)})

    large = _large(tmp_path / "large")
    status, (code, said) = forked(work)
    assert status == 0
    assert code == 1
    lines = said.splitlines()
    assert lines[0] == "error: the model does not fit into memory:"
    assert re.match("  - model: (DefaultCPUAllocator: can't|Cannot) allocate memory", lines[1])
    assert lines[2] == "      hint: set model.dtype: bfloat16 for half of the weights' bytes, or take a smaller model"
    assert lines[3].startswith("  - prediction: ")


def test_a_prediction_without_activations_says_so() -> None:
    unknown = Memory(MIB, 0, 0, MIB, None, None, None)
    assert str(model_too_large(MemoryError(), unknown)).endswith(
        "prediction: more than 2.0 MiB at the peak (weights 1.0 MiB, optimizer 1.0 MiB)"
    )


def test_any_other_error_of_the_loop_is_left_as_it_is(tmp_path: Path) -> None:
    def wrong() -> None:
        raise RuntimeError("mine")

    t = sft(tmp_path, max_steps=2)
    t.add_callback(At(1, wrong))
    with pytest.raises(RuntimeError, match=r"^mine$"):
        t.train()


# --- numbers that are not finite ------------------------------------------------------------------------------------


class Poison(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Makes a number of the adapter NaN at the beginning of a step, as a defect of the machine might."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step - 1:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))


def test_a_run_that_meets_nan_names_step_rows_and_the_checkpoint_from_before(words: dict[str, Any]) -> None:
    config = changed(words, "training", save_steps=1)
    status, (code, said) = forked(lambda: _command(config, callbacks=[Poison(4)]))
    assert status == 0
    assert code == 1
    first, batch, *_, last = said.splitlines()
    assert first == "error: training stopped before optimizer step 4: the numbers are no longer finite"
    assert re.match(r"  - micro-batch 0: the loss is nan; it held rows \d+, \d+, \d+, \d+ of the training data", batch)
    assert last == f"  - checkpoint: the last good one is kept: {Path('out/checkpoints/checkpoint-3')}"
    assert checkpoint.newest(Path("out/checkpoints"))[0] == Path("out/checkpoints/checkpoint-3")
