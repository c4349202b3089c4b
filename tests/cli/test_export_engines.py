"""lorary export --to gguf, ollama, vllm, sglang: the files, the command that runs them, and what each form refuses."""

from __future__ import annotations

import json
from pathlib import Path

from gguf import GGUFReader

from lorary.builtin import path as builtin_path
from tests.cli.command import Command
from tests.cli.test_export import trained


def names(folder: str) -> list[str]:
    return sorted(p.name for p in Path(folder).iterdir())


def test_gguf(command: Command) -> None:
    trained("pissa", r=4)
    ran = command("export", "run", "out", "--to", "gguf", "--base", "model", "--dtype", "bfloat16")
    assert ran == (0, "out\n", "run it: llama-cli -m BASE.gguf --lora out/adapter.gguf\n")
    assert names("out") == ["adapter.gguf"]
    tensors = GGUFReader("out/adapter.gguf").tensors
    assert {t.tensor_type.name for t in tensors} == {"BF16"}
    assert {min(t.shape) for t in tensors} == {8}


def test_ollama(command: Command) -> None:
    trained("lora", r=4)
    ran = command("export", "run", "out", "--to", "ollama", "--base", "model", "--base-gguf", "llama3.2")
    assert ran == (0, "out\n", "run it: ollama create NAME -f out/Modelfile\n")
    assert names("out") == ["Modelfile", "adapter.gguf"]
    assert "FROM llama3.2\nADAPTER ./adapter.gguf\n" in Path("out/Modelfile").read_text()


def test_vllm_and_sglang(command: Command) -> None:
    trained("rslora", r=4)
    ran = command("export", "run", "out", "--to", "vllm", "--base", "model")
    line = "vllm serve model --enable-lora --max-loras 1 --max-lora-rank 8 --lora-modules out=out"
    assert ran == (0, "out\n", f"run it: {line}\n")
    assert names("out") == ["README.md", "adapter_config.json", "adapter_model.safetensors", "serve.sh"]
    assert not json.loads(Path("out/adapter_config.json").read_text())["use_rslora"]
    ran = command("export", "run", "out", "--to", "sglang", "--base", "model")
    assert ran.code == 0
    assert ran.err.startswith("run it: python -m sglang.launch_server --model-path model --enable-lora ")
    assert "sglang.launch_server" in Path("out/serve.sh").read_text()


def test_the_base_is_the_recorded_one(command: Command) -> None:
    """Where the adapter names one that can be found: here the built-in one, which other programs know as a folder."""
    import lorary
    from lorary.model.loading.from_pretrained import load_model
    from lorary.model.loading.source import ModelSection
    from tests.tiny import shaken

    model = load_model(ModelSection.of("builtin:base", dtype="float32"))
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)))
    lorary.save(shaken(model), "adapter")
    ran = command("export", "adapter", "out", "--to", "vllm")
    assert ran.code == 0
    assert f"vllm serve {builtin_path()} " in ran.err


def test_refused(command: Command) -> None:
    trained("dora", r=4)
    for to in ("gguf", "ollama", "vllm", "sglang"):
        ran = command("export", "run", "out", "--to", to, "--base", "model")
        assert ran.code == 4
        assert "DoRA does more than add B A x" in ran.err
    for arguments, sentence in (
        (("--to", "gguf", "--dtype", "int4"), "dtype: is 'int4'; GGUF's adapters take float32, float16, bfloat16"),
        (
            ("--to", "vllm", "--dtype", "float16"),
            "--dtype: --to vllm has no such option\n      hint: leave it out; it is",
        ),
        (
            ("--to", "gguf", "--base-gguf", "x"),
            "--base-gguf: --to gguf has no such option\n      hint: leave it out; it is",
        ),
        (("--to", "ollama", "--base-gguf", " "), "base_gguf: is ' '; a Modelfile takes a file or the name of a model"),
    ):
        ran = command("export", "run", "out", "--base", "model", *arguments)
        assert ran.code in (2, 4)
        assert sentence in ran.err, ran.err
    Path("model").rename("elsewhere")
    for to in ("gguf", "ollama", "vllm", "sglang"):
        ran = command("export", "run", "out", "--to", to)
        assert "it was trained on `model`, which is not a Hub id\n      hint: give --base MODEL" in ran.err
    assert not Path("out").exists()
