"""Each command on real input."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorary
from lorary.cli import _self_tests, doctor
from lorary.kernels import nf4
from lorary.train.config.load import load
from tests.cli.command import Command
from tests.train.small import PLAIN_CHAT, tokenizer


def base(folder: Path) -> LlamaForCausalLM:
    """A Llama of 300 tokens in bf16, with its tokenizer, saved as Transformers saves it."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    tokenizer(template=PLAIN_CHAT).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def adapter(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """A LoRA of random tensors on `model`, saved."""
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=4, alpha=8)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    lorary.save(model, folder)
    return model


def short(model: LlamaForCausalLM, folder: Path) -> None:
    """Leaves a saved model 32 positions."""
    model.config.max_position_embeddings = 32
    model.config.save_pretrained(folder)


# --- init -------------------------------------------------------------------------------------------------------


def test_init_writes_a_configuration_that_plan_reads(command: Command) -> None:
    ran = command("init")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == "wrote train.yaml; try it with: lorary train train.yaml --dry-run\n"
    assert load("train.yaml").model.id == "builtin:base"
    assert command("init", "-").out == Path("train.yaml").read_text()


def test_init_leaves_a_file_that_is_there(command: Command) -> None:
    Path("mine.yaml").write_text("model: mine\n")
    ran = command("init", "mine.yaml")
    assert ran == (
        4,
        "",
        "error: nothing was written:\n  - mine.yaml: exists already, and was not changed\n"
        "      hint: use --force, or another name\n",
    )
    assert Path("mine.yaml").read_text() == "model: mine\n"
    assert command("init", "mine.yaml", "--force").code == 0
    assert load("mine.yaml").model.id == "builtin:base"


def test_init_prints_the_schema(command: Command) -> None:
    schema = json.loads(command("init", "--schema").out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert not list(Path().iterdir())


# --- plan -------------------------------------------------------------------------------------------------------


def test_plan_reads_no_weights(command: Command) -> None:
    base(Path("model"))
    Path("model/model.safetensors").unlink()
    ran = command(
        "plan", "model", "--method", "lora,rslora", "--r", "4", "--targets", "q_proj,v_proj", "--exclude", "*.1.*"
    )
    assert (ran.code, ran.err) == (0, "")
    assert "\nactivations " in ran.out
    assert "4 x 1,024 tokens (some padding), weights in" in ran.out
    assert "AlphaOverSqrtRank" in ran.out
    assert "trains    448 of" in ran.out  # layer 0: q 4 (32 + 32), v 4 (16 + 32)


def test_plan_says_when_another_machine_would_compute_in_another_precision(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(where, "is_available", lambda: False)
    monkeypatch.setattr("lorary.model.loading.dtype._cpu_is_quick", lambda dtype: False)
    note = "this CPU has no bfloat16 arithmetic; plan for a GPU with --set model.dtype=bfloat16"
    ran = command("plan", "builtin:base")
    assert "weights in float32" in ran.out
    assert f"the weights are saved in bfloat16 and compute in float32: {note}" in ran.out
    ran = command("plan", "builtin:base", "--set", "model.dtype=bfloat16")
    assert "weights in bfloat16" in ran.out
    assert note not in ran.out


def test_plan_takes_a_configuration_and_overrides(command: Command) -> None:
    base(Path("model"))
    Path("run.yaml").write_text("model: model\ndata: builtin:docstrings\nlora_r: 2\nmethod: {targets: q_proj}\n")
    assert "trains    256 of" in command("plan", "run.yaml").out
    ran = command("plan", "run.yaml", "--set", "method.r=4", "--alpha", "8")
    assert "trains    512 of" in ran.out
    assert ran.err == "note: `lora_r` is read as `method.r`\n"


def test_plan_says_which_gpus_it_fits_on_and_what_to_change_where_it_does_not(command: Command) -> None:
    base(Path("model"))
    fits = command("plan", "model", "--memory", "12", "--set", "data.max_length=128")
    assert (fits.code, fits.err) == (0, "")
    assert "\n    8 GB    fits, 6.6 GB free\n   12 GB    fits, 10.6 GB free\n" in fits.out
    assert "to fit into" not in fits.out
    long = ("--set", "data.max_length=262144", "--set", "training.batch_size=1")  # without padding: no mask of scores
    ran = command("plan", "model", "--memory", "1.7", *long)
    assert (ran.code, ran.err) == (0, "")
    assert "too much\n    8 GB" in ran.out
    said = ran.out.partition("to fit into 1.7 GB\n")[2].splitlines()
    assert "gradient checkpointing" in "".join(said[:6])
    assert any("--set training.gradient_checkpointing=true" in line for line in said)
    peaks = [float(line.split()[0]) for line in said if " GB  " in line]
    assert len(peaks) >= 3
    alone = [peak for peak, line in zip(peaks, said[::2], strict=False) if "together" not in line]
    enough = [peak for peak in alone if peak <= 1.7]
    assert alone == sorted(enough) + sorted(peak for peak in alone if peak > 1.7)


def test_a_plan_can_be_checked_by_a_step_of_all_blocks(command: Command) -> None:
    base(Path("model"))
    ran = command("plan", "model", "--check", "--set", "data.max_length=64")
    assert ran.code == 0, ran.err
    off = re.search(r"a step of all blocks: .*; the prediction is off by ([+-]\d+\.\d)%", ran.out)
    assert off is not None
    assert abs(float(off[1])) < 0.1


@pytest.mark.parametrize("size", ["-3", "0", "much", "inf", "nan"])
def test_a_memory_that_is_none_is_refused(command: Command, size: str) -> None:
    ran = command("plan", "builtin:base", "--memory", size)
    assert (ran.code, ran.out) == (2, "")
    assert "Invalid value for '--memory'" in ran.err


def test_plan_needs_no_transformers_for_a_known_family() -> None:
    code = (
        "import sys; sys.argv = ['lorary', 'plan', 'builtin:base', '--memory', '1']\n"
        "from lorary.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'transformers', 'trl', 'datasets', 'accelerate'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_plan_lists_every_mistake(command: Command) -> None:
    ran = command("plan", "builtin:base", "--r", "0", "--method", "lorra", "--set", "training.lr=9")
    assert ran == (
        2,
        "",
        "error: invalid configuration:\n"
        "  - --r: `r` must be at least 1, not 0\n"
        "  - --set training.lr: `lr` must be at most 1, not 9\n"
        "  - --method: `lorra` is not a method that lorary knows\n"
        "      hint: did you mean `lora` or `qlora` or `olora`?\n",
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        ({}, "model: there is no config.json in it"),
        (
            {"adapter_config.json": "{}"},
            "model: it is an adapter, not a model\n      hint: `lorary merge model FOLDER` writes the model",
        ),
        (
            {"run.json": "{}"},
            "model: it is a run, not a model\n      hint: `lorary merge model FOLDER` writes the model",
        ),
        ({"config.json": "{"}, "config.json: is not valid JSON"),
        (
            {
                "config.json": '{"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}',
                "evil.py": "raise SystemExit",
            },
            "config.json: `auto_map`: the model would run its own Python code\n"
            "      hint: read that code, then set model.trust_remote_code: true",
        ),
        (
            {"config.json": '{"model_type": "llama"}', "pytorch_model.bin": "x"},
            "pytorch_model.bin: weights as a pickle, which can run code when it is opened\n"
            "      hint: convert it to safetensors if you trust it",
        ),
    ],
)
def test_a_folder_that_is_no_model_or_would_run_code_is_refused(
    command: Command, make: dict[str, str], said: str
) -> None:
    Path("model").mkdir()
    for name, content in make.items():
        Path("model", name).write_text(content)
    ran = command("plan", "model")
    assert (ran.code, ran.out) == (4, "")
    assert ran.err.startswith("error: cannot load the model model:\n  - " + said)


def test_a_model_that_is_nowhere_is_said_to_be_so(command: Command) -> None:
    Path("modle").mkdir()
    said = "  - ./model: there is no such folder\n      hint: did you mean `modle`?\n"
    assert command("plan", "./model").err == f"error: cannot load the model ./model:\n{said}"
    ran = command("plan", "no-one/no-model")
    assert ran.code == 4
    assert "no folder has that name either; the Hub needs a network" in ran.err
    assert "did you mean `builtin:base`?" in command("plan", "builtin:bse").err


# --- merge and generate -----------------------------------------------------------------------------------------


def test_merge_writes_the_model_that_the_adapter_made(command: Command) -> None:
    model = adapter(base(Path("model")), Path("run/adapter"))
    ids = torch.randint(300, (1, 20))
    with torch.no_grad():
        live = model(input_ids=ids).logits
    ran = command("merge", "run", "merged", "--base", "model", "--dtype", "float32")
    assert (ran.code, ran.out) == (0, "merged\n")
    assert "logits differ by at most" in ran.err
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, live.float(), atol=0.05)
    assert json.loads(Path("merged/config.json").read_text())["dtype"] == "float32"
    assert Path("merged/tokenizer.json").is_file()


def test_merge_keeps_the_dtype_on_disk_and_refuses_a_folder_in_use(command: Command) -> None:
    adapter(base(Path("model")), Path("run"))
    assert command("merge", "run", "merged", "--base", "model").code == 0
    assert json.loads(Path("merged/config.json").read_text())["dtype"] == "bfloat16"
    before = sorted(Path().rglob("*"))
    ran = command("merge", "run", "merged", "--base", "model")
    assert ran.code == 4
    assert sorted(Path().rglob("*")) == before


def test_merge_names_what_is_missing(command: Command) -> None:
    adapter(base(Path("model")), Path("away/run"))
    Path("empty").mkdir()
    assert (
        command("merge", "empty", "merged").err == "error: cannot merge empty:\n  - empty: there is no adapter in it\n"
    )
    Path("model").rename("moved")
    assert command("merge", "away/run", "merged").err == (
        "error: cannot find the base of away/run:\n"
        "  - it was trained on `model`, which is not a Hub id\n      hint: give --base MODEL\n"
    )
    assert not Path("merged").exists()


def test_generate_continues_with_the_base_and_with_the_adapter(command: Command) -> None:
    adapter(base(Path("model")), Path("run"))
    plain = command("generate", "model", "hello", "--max-new-tokens", "8")
    adapted = command("generate", "run", "hello", "--base", "model", "--max-new-tokens", "8")
    assert (plain.code, adapted.code) == (0, 0)
    assert plain.out.strip() != adapted.out.strip()
    merged = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    ids = torch.tensor([tokenizer()("hello")["input_ids"]])
    expected = merged.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert plain.out == tokenizer().decode(expected[0, ids.shape[1] :], skip_special_tokens=True) + "\n"


def test_generate_reads_stdin_and_draws_by_its_seed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    base(Path("model"))

    def draw(seed: int) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
        return command(
            "generate", "model", "--temperature", "2", "--seed", str(seed), "--max-new-tokens", "8", "--chat"
        ).out

    assert draw(1) == draw(1) != draw(2)


def test_generate_refuses_what_cannot_be_continued(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    short(base(Path("model")), Path("model"))
    long = command("generate", "model", "hello " * 40)
    assert long.code == 3
    assert "prompt: has " in long.err
    assert "tokens, but the model's context is " in long.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    for ran in (command("generate", "model", "caf\udce9"), command("generate", "model")):
        expected = (
            "error: cannot read the prompt:\n  - prompt: holds bytes that are not UTF-8\n      hint: save it as UTF-8\n"
        )
        assert ran == (3, "", expected)


def test_generate_stops_where_the_positions_end(command: Command) -> None:
    short(base(Path("model")), Path("model"))
    full, most = command("generate", "model", "hello"), command("generate", "model", "hello", "--max-new-tokens", "1")
    assert (full.code, most.code) == (0, 0)
    again = command("generate", "model", "hello", "--max-new-tokens", "1000000")
    assert again.out == full.out != most.out  # both end with the last position


# --- doctor -----------------------------------------------------------------------------------------------------


def test_doctor_reports_this_machine(command: Command) -> None:
    ran = command("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(ran.out)}
    assert findings["torch"] == {"level": "ok", "what": "torch", "detail": torch.__version__}
    assert {"python", "threads", "disk here", "write here"} <= set(findings)
    assert all(finding["level"] in ("ok", "warn", "fail") for finding in findings.values())


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the self-tests, which `test_doctor.py` is about."""
    monkeypatch.setattr(_self_tests, "SELF_TESTS", ())


@pytest.mark.usefixtures("untested")
def test_doctor_says_how_4_bit_weights_are_read(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    if nf4.backend() != "table":  # there is a compiler here
        how = f"ok    4 bits       weights on the CPU are read by code that is {nf4.backend()}"
        assert how in command("doctor").out.splitlines()
    monkeypatch.setenv("LORARY_NATIVE", "0")
    assert "warn  4 bits       4-bit weights are read by PyTorch's own operations" in command("doctor").out


@pytest.mark.usefixtures("untested")
def test_doctor_fails_where_nothing_can_be_written(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuses)
    ran = command("doctor")
    assert ran.code == 1
    assert "Permission denied" in ran.out
