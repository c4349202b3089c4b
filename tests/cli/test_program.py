"""The program as a whole: start, help, mistakes, exit codes, streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from transformers import LlamaConfig

from lorary import __version__
from lorary.cli import COMMANDS, app, printable
from lorary.errors import ConfigError, DataError, Diagnostic, FileError, LoraryError
from tests.cli.command import Command


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorary", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
        check=False,
    )


# Every option of every command: a new one is a promise, so it is made here on purpose.
OPTIONS = {
    "": ["--debug", "--install-completion", "--show-completion", "--version"],
    "convert": ["--base", "--expert-layout", "--to"],
    "demo": ["--out", "--steps"],
    "doctor": ["--json"],
    "export": ["--base", "--base-gguf", "--dtype", "--folded", "--force", "--onto", "--to"],
    "advise": ["--json", "--memory", "--ranks", "--set"],
    "check": ["--base", "--for", "--json"],
    "compare": [
        *("--budget", "--dry-run", "--general", "--json", "--match", "--methods", "--out", "--overwrite", "--quiet"),
        *("--rates", "--reference", "--resume", "--seeds", "--set", "--steps", "--workers", "-m", "-o", "-q"),
    ],
    "chat": ["--base", "--max-new-tokens", "--seed", "--system", "--temperature", "--template", "--top-p"],
    "eval": [
        *("--base", "--batch-size", "--config", "--data", "--dtype", "--format", "--json", "--limit", "--max-length"),
        *("--quiet", "--set", "--task-folder", "--tasks", "-b", "-d", "-q"),
    ],
    "generate": [
        *("--base", "--batch-size", "--chat", "--file", "--max-new-tokens", "--out", "--seed", "--stream"),
        *("--temperature", "--template", "--top-p", "-b"),
    ],
    "init": ["--data", "--force", "--memory", "--model", "--schema", "--set"],
    "inspect": [],
    "inspect context": ["--base", "--data", "--json", "--lengths", "--out", "--passkeys", "--tokens"],
    "merge": ["--base", "--data", "--dtype", "--force", "--onto", "--rows"],
    "mix": [
        *("--approximate", "--base", "--density", "--energy", "--force", "--how"),
        *("--json", "--out", "--rank", "--seed", "--weights", "-w"),
    ],
    "lorahub": [
        *("--base", "--bound", "--budget", "--examples", "--form", "--format", "--json", "--l1"),
        *("--limit", "--max-length", "--out", "--quiet", "--seed", "-e", "-q"),
    ],
    "diff": ["--json", "--sites"],
    "compress": ["--base", "--data", "--energy", "--json", "--kl", "--out", "--rank", "--rows"],
    "extract": ["--energy", "--json", "--out", "--rank", "--sites", "--targets"],
    "serve": [
        *("--admin-key", "--base", "--budget", "--drain", "--dtype", "--engine", "--host", "--key", "--max-adapter"),
        *("--max-body", "--max-rank", "--name", "--no-keys", "--port", "--quantize", "--replicas", "--root"),
        *("--template", "--verify", "--vllm", "--vllm-options"),
    ],
    "push": ["--base", "--message", "--public", "--yes", "-m", "-y"],
    "inspect adapter": ["--base", "--epsilon", "--json", "--out", "--top", "--tuned"],
    "inspect intrinsic": [
        *("--data", "--dims", "--full-lr", "--json", "--lr"),
        *("--out", "--said", "--seed", "--set", "--steps"),
    ],
    "inspect gradients": ["--data", "--json", "--out", "--set"],
    "methods": ["--answers", "--choose", "--json", "--markdown"],
    "search": ["--ceiling", "--generations", "--overwrite", "--population", "--quiet", "--seed", "-q"],
    "train": ["--after", "--all", "--dry-run", "--extend", "--overwrite", "--quiet", "--resume", "--set", "-q"],
    "verify": ["--adapter-model", "--against", "--base", "--base-model", "--json", "--timeout", "--tolerance"],
    "plan": [
        *("--advise", "--alpha", "--check", "--data", "--exclude", "--layers", "--memory", "--method", "--r", "--rank"),
        *("--set", "--targets", "-m", "-t"),
    ],
}


def commands() -> dict[str, Any]:
    """Every command by its name, those of a command of several too."""
    known: dict[str, Any] = typer.main.get_command(app()).commands  # type: ignore[attr-defined]
    below = {f"{n} {b}": each for n, c in known.items() for b, each in getattr(c, "commands", {}).items()}
    return known | below


def test_every_option_is_known() -> None:
    found = {
        name: sorted(option for p in command.params for option in p.opts if option.startswith("-"))
        for name, command in ({"": typer.main.get_command(app())} | commands()).items()
    }
    assert sorted(found) == sorted(OPTIONS)
    assert {name.partition(" ")[0] for name in found} == {"", *COMMANDS}
    for name, options in found.items():
        assert options == OPTIONS[name], name


def test_every_option_and_command_is_explained() -> None:
    for name, command in commands().items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), (name, parameter.name)


def test_help_is_there_in_half_a_second_and_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['lorary', '--help']\n"
        "from lorary.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
    for name in COMMANDS:
        assert f"\n  {name} " in ran.stdout
    seconds = []
    for _ in range(5):
        start = os.times()
        assert program("--help").returncode == 0
        end = os.times()
        seconds.append(end.children_user + end.children_system - start.children_user - start.children_system)
    assert min(seconds) < 0.5, seconds  # processor time: the clock of a busy machine says nothing about the program


def test_version() -> None:
    assert program("--version").stdout == f"lorary {__version__}\n"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_help_fits_the_terminal(command: Command, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for name in ("methods", "--help", "plan"):
        shown = command(name, *(["--help"] if name == "plan" else []))
        assert shown.code == 0
        assert max(map(len, shown.out.splitlines())) <= max(width, 80 if name != "methods" else width)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["methds"], "Did you mean 'methods'?"),
        (["methods", "--jsn"], "--json"),
        (["plan"], "Missing argument"),
        (["generate", "builtin:base", "x", "--seed", "many"], "Invalid value for '--seed'"),
        (["generate", "builtin:base", "x", "--temperature", "-1"], "Invalid value for '--temperature'"),
    ],
)
def test_a_mistyped_command_line_is_answered_with_what_is_near(
    command: Command, arguments: list[str], said: str
) -> None:
    ran = command(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no", [Diagnostic("here", "wrong", "right it")]), 2),
        (DataError("no", [Diagnostic("here", "wrong", "right it")]), 3),
        (FileError("no", [Diagnostic("here", "wrong", "right it")]), 4),
        (LoraryError("no", [Diagnostic("here", "wrong", "right it")]), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_have_a_message_and_an_exit_code_but_no_traceback(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: LoraryError, code: int
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr("lorary.cli.methods.table", fails)
    assert command("methods") == (code, "", "error: no\n  - here: wrong\n      hint: right it\n")
    shown = command("methods", "--debug")
    assert shown.code == code
    assert "Traceback (most recent call last)" in shown.err
    assert shown.err.endswith("error: no\n  - here: wrong\n      hint: right it\n")


def test_the_systems_errors_are_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise OSError(28, "No space left on device", "/run/x")

    monkeypatch.setattr("lorary.cli.methods.table", fails)
    assert command("methods") == (1, "", "error: No space left on device: /run/x\n")


def test_an_interrupt_exits_with_130(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorary.cli.methods.table", stops)
    ran = command("methods")
    assert ran.code == 130
    assert "Traceback" not in ran.err


def test_a_files_own_words_do_not_steer_the_terminal() -> None:
    assert printable("a\x1b[31mb\u202ec\nd\te") == "a\\x1b[31mb\\x202ec\nd\te"


def test_a_closed_pipe_is_no_error() -> None:
    script = f"{sys.executable} -m lorary methods --json | head -c 1"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert ran.stdout == "["
    assert "Traceback" not in ran.stderr


def test_nothing_is_coloured_in_a_pipe() -> None:
    for environment in ({}, {"NO_COLOR": "1"}):
        ran = program("pln", **environment)
        assert "\x1b" not in ran.stdout + ran.stderr


def test_every_command_is_there() -> None:
    folder = Path(sys.modules["lorary.cli"].__file__ or "").parent
    assert {name for name in COMMANDS if (folder / f"{name}.py").is_file()} == set(COMMANDS)


# Modules that take long to import
HEAVY = frozenset({"accelerate", "bitsandbytes", "datasets", "matplotlib", "pandas", "peft", "scipy", "trl"})
HEAVY |= {"transformers"}
COMPILER = frozenset({"sympy", "torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes", "triton"})
# A dry run reads a tokenizer and the model's own code, for which it needs Transformers; nothing needs a trainer.
DRY_RUN = frozenset({"bitsandbytes", "datasets", "matplotlib", "pandas", "peft", "trl", "transformers.trainer"})
CHECKPOINTING = ("--set", "training.gradient_checkpointing=true")


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (("train", "--help"), HEAVY | COMPILER | {"torch"}),
        (("plan", "base", "--method", "lora,rslora", *CHECKPOINTING), HEAVY | COMPILER),
        (("methods",), HEAVY | COMPILER),
        (("init", "-"), HEAVY | COMPILER),
        (("train", "run.yaml", "--dry-run"), DRY_RUN),
    ],
    ids=["help", "plan", "methods", "init", "dry run"],
)
def test_a_command_imports_only_what_it_needs(tmp_path: Path, words: tuple[str, ...], absent: frozenset[str]) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    LlamaConfig(num_hidden_layers=4, **sizes).save_pretrained(tmp_path / "base")
    config = "model: builtin:base\ndata: builtin:c-headers\nmethod: {name: lora}\noutput: run\n"
    (tmp_path / "run.yaml").write_text(config)
    code = (
        "import sys\nfrom lorary.cli import main\ntry:\n    main()\nfinally:\n"
        f"    print(*sorted({set(absent)!r} & sys.modules.keys()), file=sys.stderr)"
    )
    call = [sys.executable, "-c", code, *words]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "", done.stderr
