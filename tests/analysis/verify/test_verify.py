"""`lorary verify` against a real server that is right or wrong in known ways, and against bad servers."""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import lorary
from lorary import builtin
from lorary.adapters.content_hash import content_hash
from lorary.analysis.verify.hypotheses import trial
from lorary.analysis.verify.observed import PROBES, observe, probe_ids
from lorary.layers.adapted import adapted_layers
from tests.analysis.verify.http_server import Served, serving
from tests.cli.command import Command
from tests.tiny import frozen_copy, same, shaken

TOKENIZER = builtin.load_tokenizer()


def small_base() -> Any:
    """A language model of 4 blocks with the built-in tokenizer's vocabulary."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), initializer_range=0.15, **sizes)).eval()


BASE = small_base()


@pytest.fixture(autouse=True)
def no_proxy_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("LORARY_API_KEY", raising=False)


def tuned(
    folder: Path, *names: str, full: tuple[str, ...] = (), size: float = 0.05, base: Any = BASE, **options: Any
) -> nn.Module:
    """The base with a filled adapter, which is saved."""
    plan = {key: options.pop(key) for key in ("targets", "alphas") if key in options}
    model = copy.deepcopy(base)
    method = lorary.method(*(names or ("lora",)), **({"r": 4, "alpha": 8} | options)).replace(full=full)
    lorary.attach(model, lorary.plan(model, method, **({"targets": ["q_proj", "v_proj", "down_proj"]} | plan)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * size)
    lorary.save(model, folder)
    return model.eval()


def scaled(model: nn.Module, factor: Callable[[str], float]) -> nn.Module:
    """The model with the updates of its sites multiplied."""
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            layer.params["B"].mul_(factor(name))
    return model


def verified(folder: Path, tuned: Any, base: Any = BASE, **options: Any) -> lorary.Verification:
    asked = {key: options.pop(key) for key in ("tolerance", "base_model", "adapter_model") if key in options}
    with serving(Served({"base": base, "tuned": tuned}, TOKENIZER, **options)) as url:
        return lorary.verify(folder, url, model=BASE, tokenizer=TOKENIZER, **asked)


# --- the verdicts -----------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "echo": {},
    "text": {"takes_ids": False},
    "likeliest": {"echoes": False},
    "likeliest, as in chats": {"echoes": False, "chat_form": True, "takes_ids": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_right_server_and_one_that_ignores_the_adapter(form: str, tmp_path: Path) -> None:
    model, before = tuned(tmp_path), frozen_copy(BASE)
    found = verified(tmp_path, model, **FORMS[form])
    assert (found.verdict, found.right) == ("right", True)
    assert found.figures["adapter"] < 1e-4 < 0.05 < found.figures["effect"]
    assert found.count > 60
    found = verified(tmp_path, BASE, **FORMS[form])
    assert (found.verdict, found.reason) == ("no-op", "its adapter is its base: the adapter is ignored")
    assert same(before, frozen_copy(BASE))


@pytest.mark.parametrize("form", ["echo", "likeliest"])
@pytest.mark.parametrize("scale", ["r", "sqrt(r)", "alpha", "1 / r"])
def test_a_wrong_scale_is_named(scale: str, form: str, tmp_path: Path) -> None:
    r, alpha = 4.0, 9.0
    model = tuned(tmp_path, r=4, alpha=alpha)
    factor = {"r": r, "sqrt(r)": r**0.5, "alpha": alpha, "1 / r": 1 / r}[scale]
    found = verified(tmp_path, scaled(model, lambda name: factor), **FORMS[form])
    assert found.verdict == "wrong scale"
    what = {"r": "alpha, not divided by r", "sqrt(r)": "alpha / sqrt(r)", "alpha": "its own times alpha"}
    assert found.reason == f"the scale of its updates is {what.get(scale, 'its own divided by r')}"
    assert found.figures["explained"] < 1e-4


def test_readers_that_ignore_rslora_and_patterns_are_recognised(tmp_path: Path) -> None:
    model = tuned(tmp_path / "rs", "lora", "rslora", alpha=9)
    found = verified(tmp_path / "rs", scaled(model, lambda name: 0.5))
    assert (found.verdict, found.reason) == ("wrong scale", "the scale of its updates is alpha / r")
    model = tuned(tmp_path / "a", alphas={"*down_proj": 2.0})
    found = verified(tmp_path / "a", scaled(model, lambda name: 4.0 if "down" in name else 1.0))
    what = "the scale of its updates is alpha and r of most layers for all"
    assert (found.verdict, found.reason) == ("wrong scale", what)


def test_any_factor_is_found(tmp_path: Path) -> None:
    model = tuned(tmp_path, targets=["q_proj", "v_proj"])
    found = verified(tmp_path, scaled(model, lambda name: 1.7))
    assert (found.verdict, found.reason) == ("wrong scale", "the scale of its updates is 1.7 times its own")


@pytest.mark.parametrize("form", ["echo", "likeliest"])
def test_half_of_the_sites_dropped_is_named(form: str, tmp_path: Path) -> None:
    model = tuned(tmp_path)
    found = verified(
        tmp_path, scaled(copy.deepcopy(model), lambda n: 0.0 if ".self_attn." in n else 1.0), **FORMS[form]
    )
    assert found.verdict == "partial"
    assert found.reason == "it computes the adapter without self_attn (8 of 12 sites)"
    found = verified(tmp_path, scaled(model, lambda n: 0.0 if int(n.split(".")[2]) > 1 else 1.0), **FORMS[form])
    assert found.verdict == "partial"
    assert found.reason == "it computes the adapter without blocks 2 and above (6 of 12 sites)"


def test_single_sites_dropped_are_named(tmp_path: Path) -> None:
    model = tuned(tmp_path, targets=["down_proj"])
    gone = ("model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj")
    found = verified(tmp_path, scaled(model, lambda name: 0.0 if name in gone else 1.0))
    assert found.verdict == "partial"
    assert all(name in found.reason for name in gone)
    assert "model.layers.0" not in found.reason


def test_parameters_trained_in_full_and_magnitudes_left_out_are_recognised(tmp_path: Path) -> None:
    model = tuned(tmp_path / "norms", full=("*norm*",))
    trained = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in BASE.named_parameters():
            if "norm" in name:
                trained[name].copy_(p)
    found = verified(tmp_path / "norms", model)
    assert (found.verdict, found.reason) == (
        "partial",
        "it computes the adapter without the 9 parameters trained in full",
    )
    tuned(tmp_path / "dora", "dora")
    adapter, rows = lorary.load_adapter(tmp_path / "dora", model=BASE), [observe(BASE, [1, 2])]
    wrong = copy.deepcopy(BASE)
    with trial(wrong, adapter, rows, [0.0], 1.0):
        found = verified(tmp_path / "dora", wrong)
    what = "it computes B A alone: gains and shifts (DoRA's magnitudes) are left out"
    assert (found.verdict, found.reason) == ("partial", what)


def test_an_adapter_of_a_quantised_base_is_computed_on_the_base_as_it_is_served(tmp_path: Path) -> None:
    model = copy.deepcopy(BASE)
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=4, alpha=8), ["q_proj", "v_proj"]))
    lorary.save(shaken(model, 0.05), tmp_path)
    plain = tuned(tmp_path / "plain", targets=["q_proj", "v_proj"])
    with torch.no_grad():
        for name, layer in adapted_layers(plain).items():
            for role, value in adapted_layers(model)[name].params.items():
                layer.params[role].copy_(value)
    assert verified(tmp_path, plain).verdict == "right"


def test_the_base_here_must_be_the_adapter_s(tmp_path: Path) -> None:
    model, other = tuned(tmp_path), copy.deepcopy(BASE)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    with serving(Served({"base": other, "tuned": model}, TOKENIZER)) as url, pytest.raises(lorary.FileError) as caught:
        lorary.verify(tmp_path, url, model=other, tokenizer=TOKENIZER)
    assert "does not fit this model" in str(caught.value)
    assert not (tmp_path / "certificate.json").exists()


def test_a_model_without_logits_for_each_token_is_refused(saved: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(copy.deepcopy(BASE.config))
    with pytest.raises(lorary.LoraryError) as caught:
        lorary.verify(saved, "transformers", model=model, tokenizer=TOKENIZER)
    assert "gives [1, 2] for [1, " in str(caught.value)


def test_another_base_is_said(tmp_path: Path) -> None:
    model, other = tuned(tmp_path), copy.deepcopy(BASE)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    found = verified(tmp_path, model, base=other)
    assert found.verdict == "wrong base"
    assert found.figures["base"] > 0.1
    assert found.reason == f"its base is {found.figures['base']:.3g} nats from this one, and rounding explains 0.1"


def test_rounding_is_tolerated_as_far_as_the_base_shows_it(tmp_path: Path) -> None:
    model = tuned(tmp_path)
    rounded = verified(tmp_path, copy.deepcopy(model).bfloat16(), base=copy.deepcopy(BASE).bfloat16())
    assert rounded.verdict == "right"
    assert 1e-3 < rounded.figures["base"] < rounded.figures["tolerance"] <= 0.1
    # without a base nobody knows the server's rounding, so the tolerance is the whole of what rounding may be
    alone = verified(tmp_path, model, base_model="none", adapter_model="tuned")
    assert (alone.verdict, alone.figures["tolerance"]) == ("right", 0.1)
    weak = tuned(tmp_path / "weak", size=1e-5)
    assert verified(tmp_path / "weak", weak).verdict == "unclear"


def test_what_nothing_explains_is_other_with_the_nearest(tmp_path: Path) -> None:
    model = tuned(tmp_path, targets=["down_proj"])
    flipped = scaled(model, lambda name: -2.0 if "layers.2" in name else 0.7)
    found = verified(tmp_path, flipped)
    assert found.verdict == "other"
    assert found.reason.startswith("nothing that was tried explains it; the nearest is ")


@pytest.mark.parametrize(("name", "options"), [("ia3", {}), ("houlsby", {"m": 4}), ("glora", {"r": 2})])
def test_what_has_no_factors_is_right_or_other(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = copy.deepcopy(BASE)
    lorary.attach(model, lorary.plan(model, lorary.method(name, **options)))
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    lorary.save(model.eval(), tmp_path)
    assert verified(tmp_path, model).verdict == "right"
    with torch.no_grad():
        for p in trained:
            p.mul_(1.5)
    found = verified(tmp_path, model)
    assert (found.verdict, found.reason) == ("other", "nothing that was tried explains it")


# --- the certificate --------------------------------------------------------------------------------------------------


def test_the_certificate_is_about_this_adapter_and_goes_with_it(tmp_path: Path) -> None:
    model = tuned(tmp_path)
    found = verified(tmp_path, model)
    record = json.loads((tmp_path / "certificate.json").read_text())
    assert record == found.record
    adapter = lorary.load_adapter(tmp_path)  # a strict reader does not mind it
    assert record["adapter_sha256"] == content_hash(adapter)
    assert (record["verdict"], record["against"][:17], record["base"]) == ("right", "http://127.0.0.1:", "")
    assert record["probes"]["count"] == len(PROBES)
    assert record["release"] == "0.1 of the tests"
    assert record["probes"]["log_probabilities"] == found.count
    assert set(record["nats"]) == {"base", "adapter", "effect", "tolerance"}
    (tmp_path / "README.md").write_text("a card")
    lorary.save(model, tmp_path)  # another adapter, of which it says nothing
    assert not (tmp_path / "certificate.json").exists()
    assert (tmp_path / "README.md").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_engines_in_this_process(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tuned(tmp_path)
    for engine in ("transformers", "peft"):
        found = lorary.verify(tmp_path, engine, model=BASE, tokenizer=TOKENIZER)
        assert (found.verdict, found.record["against"]) == ("right", engine)
        assert f"{engine} " in found.record["release"]
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"lora_alpha": 16}
    (tmp_path / "lorary.json").unlink()
    lorary.load_adapter(tmp_path)
    config["target_modules"] = ["q_proj", "v_proj"]
    config["lora_alpha"] = 8
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lorary.FileError, match="adapts a module that the configuration does not name"):
        lorary.verify(tmp_path, "peft", model=BASE, tokenizer=TOKENIZER)


# --- bad servers ------------------------------------------------------------------------------------------------------


def fails(folder: Path, served: Served, timeout: float = 20.0, **options: Any) -> lorary.LoraryError:
    """The error of a verification, which leaves the folder as it was."""
    before = sorted(p.name for p in folder.iterdir())
    with serving(served) as url, pytest.raises(lorary.LoraryError) as caught:
        lorary.verify(folder, url, model=BASE, tokenizer=TOKENIZER, timeout=timeout, **options)
    assert sorted(p.name for p in folder.iterdir()) == before
    assert caught.value.headline == f"cannot verify against '{url}'"
    return caught.value


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    tuned(folder)
    return folder


def completions(status: int, data: bytes) -> Callable[[str], tuple[int, bytes] | None]:
    """A server whose list of models is right, and whose completions are this."""
    return lambda path: (status, data) if path == "/v1/completions" else None


BAD_REPLIES: dict[str, tuple[int, bytes, str]] = {
    "HTTP 500": (500, b"out of memory", "/v1/completions: HTTP 500: 'out of memory'"),
    "HTTP 404": (404, b"", "hint: check --base-model and --adapter-model: `/v1/models` lists the server's names"),
    "HTTP 401": (401, b"", "hint: set LORARY_API_KEY to its key"),
    "a redirect": (307, b"", "hint: redirects are not followed: give the address that it redirects to"),
    "no JSON": (200, b"<html>", "/v1/completions: its reply is not JSON: "),
    "NaN": (200, b'{"choices": [NaN]}', "/v1/completions: its reply is NaN is not a JSON number"),
    "a list": (200, b"[]", "/v1/completions: its reply is not a JSON object: []"),
    "no choice": (200, b'{"choices": []}', '/v1/completions: its reply has no choice: {"choices": []}'),
    "no numbers": (
        200,
        b'{"choices": [{"text": "a"}]}',
        "/v1/completions: its reply has no log-probabilities of tokens that the base's tokenizer knows: {}",
    ),
    "numbers of text": (
        200,
        b'{"choices": [{"logprobs": {"top_logprobs": [{"a": "x"}]}}]}',
        "its reply has no log-probabilities of tokens",
    ),
    "foreign tokens": (
        200,
        '{"choices": [{"logprobs": {"top_logprobs": [{"\u4e2d\u6587\u5b57": -1}]}}]}'.encode(),
        "its reply has no log-probabilities of tokens",
    ),
    "a huge reply": (200, b" " * (17 * 2**20), "/v1/completions: its reply is of more than 16,777,216 bytes"),
    "a token that there is not": (
        200,
        b'{"choices": [{"logprobs": {"top_logprobs": [{"token_id:99999999": -1}]}}]}',
        "its reply has no log-probabilities of tokens",
    ),
    "a token of many digits": (
        200,
        b'{"choices": [{"logprobs": {"top_logprobs": [{"token_id:%s": -1}]}}]}' % (b"9" * 5000),
        "its reply has no log-probabilities of tokens",
    ),
    "a number for a list": (
        200,
        b'{"choices": [{"logprobs": {"content": [{"top_logprobs": 5}]}}]}',
        "its reply has no log-probabilities of tokens",
    ),
    "control characters": (500, b"\x1b[31mred", r"HTTP 500: '\x1b[31mred'"),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_bad_reply_is_an_error_and_nothing_is_written(name: str, saved: Path) -> None:
    status, data, sentence = BAD_REPLIES[name]
    served = Served({"base": BASE, "tuned": BASE}, TOKENIZER, reply=completions(status, data))
    assert sentence in str(fails(saved, served))


BAD_LISTS: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "no models": ({}, {}, "--adapter-model: 0 of its models are adapters by its own list: none"),
    "two adapters": (
        {"base": BASE, "a": BASE, "b": BASE},
        {"a": "base", "b": "base"},
        "--adapter-model: 2 of its models are adapters by its own list: 'a', 'b'",
    ),
    "no base": ({"tuned": BASE}, {"tuned": "base"}, "--base-model: the base of 'tuned' is not clear from its list"),
    "two bases": (
        {"base": BASE, "other": BASE, "tuned": BASE},
        {"tuned": "elsewhere"},
        "--base-model: the base of 'tuned' is not clear from its list: 'base', 'other', 'tuned'",
    ),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_models_that_are_not_clear_must_be_named(name: str, saved: Path) -> None:
    models, parents, sentence = BAD_LISTS[name]
    assert sentence in str(fails(saved, Served(models, TOKENIZER, parents=parents)))


def test_a_list_of_models_that_is_none(saved: Path) -> None:
    served = Served({}, TOKENIZER, reply=lambda path: (200, b'{"data": {"id": 3}}'))
    assert '/v1/models: its reply is not a list of models: {"data": {"id": 3}}' in str(fails(saved, served))


def test_a_model_that_the_server_does_not_have(saved: Path) -> None:
    served = Served({"base": BASE, "tuned": BASE}, TOKENIZER)
    error = fails(saved, served, base_model="base", adapter_model="tunde")
    assert "HTTP 404" in str(error)
    assert "The model `tunde` does not exist." in str(error)


def test_the_key_comes_from_the_environment(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served({"base": BASE, "tuned": BASE}, TOKENIZER, key="secret")
    assert "hint: set LORARY_API_KEY to its key" in str(fails(saved, served))
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    error = str(fails(saved, served))
    assert "hint: check the key" in error
    assert "wrong" not in error
    monkeypatch.setenv("LORARY_API_KEY", "secret")
    with serving(served) as url:
        assert lorary.verify(saved, url, model=BASE, tokenizer=TOKENIZER).verdict == "no-op"
    (saved / "certificate.json").unlink()


def test_a_refused_connection(saved: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(lorary.LoraryError) as caught:
        lorary.verify(saved, url, model=BASE, tokenizer=TOKENIZER, timeout=5)
    assert "/v1/models: it cannot be reached: Connection refused" in str(caught.value)
    assert caught.value.exit_code == 1


BROKEN = b"HTTP/1.1 500 Error\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
SLOW = {
    "silent": b"",
    "half a reply": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
    "half an error": b"HTTP/1.1 500 Error\r\nContent-Length: 1000\r\n\r\n",
}


def test_an_error_whose_text_is_broken(saved: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(BROKEN)

        threading.Thread(target=accept, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(lorary.LoraryError, match=r"/v1/models: HTTP 500$"):
            lorary.verify(saved, url, model=BASE, tokenizer=TOKENIZER, timeout=20)


def test_a_server_that_sends_its_headers_one_by_one(saved: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                for i in range(30):  # each of them well within the time
                    connection.sendall(b"X-%d: a\r\n" % i)
                    time.sleep(0.1)

        threading.Thread(target=accept, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(lorary.LoraryError, match=r"/v1/models: no reply within 0\.5 s"):
            lorary.verify(saved, url, model=BASE, tokenizer=TOKENIZER, timeout=0.5)


def test_a_long_list_of_models_is_cut(saved: Path) -> None:
    names = [{"id": f"model {i}"} for i in range(3_000)]
    served = Served({}, TOKENIZER, reply=lambda path: (200, json.dumps({"data": names}).encode()))
    error = str(fails(saved, served))
    assert "'model 19', and 2,980 more" in error
    assert len(error) < 1_000


@pytest.mark.parametrize("slow", SLOW.values(), ids=SLOW)
def test_a_server_that_does_not_answer_in_time(slow: bytes, saved: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(slow)
                time.sleep(1.0)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(lorary.LoraryError) as caught:
            lorary.verify(saved, url, model=BASE, tokenizer=TOKENIZER, timeout=0.3)
        thread.join()
    assert "/v1/models: no reply within 0.3 s\n      hint: raise --timeout" in str(caught.value)


@pytest.mark.parametrize(
    ("against", "sentence"),
    [
        ("vllm", "'vllm' is not the address of a server"),
        ("transfomers", "hint: did you mean `transformers`?"),
        ("ftp://host", "'ftp://host' is not the address of a server"),
        ("http://", "'http://' is not the address of a server"),
        ("file:///etc/passwd", "is not the address of a server"),
        ("http://host:port", "'http://host:port': "),
        ("http://me:word@host", "the address holds a user or a password\n      hint: set LORARY_API_KEY instead"),
        ("", "'' is not the address of a server"),
    ],
)
def test_an_address_that_is_none(against: str, sentence: str, saved: Path) -> None:
    with pytest.raises(lorary.LoraryError) as caught:
        lorary.verify(saved, against, model=BASE, tokenizer=TOKENIZER)
    assert sentence in str(caught.value)
    assert "word@" not in str(caught.value)


def test_bad_arguments_are_refused_together(saved: Path) -> None:
    with pytest.raises(lorary.ConfigError) as caught:
        lorary.verify(saved, "peft", model="base", tokenizer=None, tolerance=-1, timeout=float("nan"))  # type: ignore[arg-type]
    assert [(p.where, p.what) for p in caught.value.problems] == [
        ("model", "is a str, not a torch.nn.Module"),
        ("tolerance", "is -1, not a positive number"),
        ("timeout", "is nan, not a positive number"),
    ]
    adapted = lorary.load(copy.deepcopy(BASE), saved)
    with pytest.raises(lorary.StateError, match="the model has an adapter already"):
        lorary.verify(saved, "peft", model=adapted, tokenizer=TOKENIZER)
    with pytest.raises(lorary.FileError, match="there is no such folder"):
        lorary.verify(saved / "nothing", "peft", model=BASE, tokenizer=TOKENIZER)


def test_the_probes_are_fixed() -> None:
    rows = probe_ids(TOKENIZER)
    assert len(rows) == len(PROBES)
    assert all(2 <= len(row) <= 32 for row in rows)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_the_verdict_and_exits_with_one_unless_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = Command(monkeypatch, capsys)
    base = builtin.load_model()
    model = tuned(Path("run/adapter"), base=base, size=0.1)
    with serving(Served({"base": base, "tuned": model}, TOKENIZER)) as url:
        ran = command("verify", "run", "--against", f"{url}/v1/")
    assert (ran.code, ran.out.splitlines()[0]) == (0, "right: it computes the adapter")
    assert ran.err == "kept in run/adapter/certificate.json\n"
    with serving(Served({"base": base, "tuned": base}, TOKENIZER)) as url:
        ran = command("verify", "run", "--against", url, "--json")
    assert (ran.code, json.loads(ran.out)["verdict"]) == (1, "no-op")
    assert command("verify", "run", "--against", "nowhere").code == 1
    assert command("verify", "nothing", "--against", "peft").code == 4
