"""lorary push: the bytes that arrive at a Hub on this machine, what stays behind, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import lorary
from lorary.adapters.card import write_card
from lorary.adapters.provenance import Parent, Provenance
from lorary.adapters.push import plan_upload, upload
from lorary.errors import FileError
from tests import tiny
from tests.adapters.hub_uploads import TOKEN, Received, receiving
from tests.cli.command import Command

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    """A Hub on this machine, and a token for it."""
    found = Received()
    with receiving(found) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


def adapter(folder: Path, *names: str, **changed: Any) -> lorary.Adapter:
    """A saved adapter of a tiny model."""
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method(*names or ("lora",), r=2), "attention"))
    value = dataclasses.replace(lorary.Adapter.of(tiny.shaken(model)), **changed)
    lorary.save_adapter(value, folder, model=model)
    return value


def beside(folder: Path) -> Path:
    """The folder with files that must not leave it."""
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "lorary.json").write_text("{}")
    return folder


def test_the_commit_holds_the_adapter_s_own_bytes_and_a_card(
    tmp_path: Path, received: Received, command: Command
) -> None:
    adapter(tmp_path / "out")
    beside(tmp_path / "out")
    ran = command("push", "out", "ann/mine", "--base", "org/base", "--yes")
    assert ran.code == 0, ran.err
    ((repo, summary, files),) = received.commits
    assert (repo, summary) == ("ann/mine", "Upload the adapter out")
    assert ran.out.endswith(f"/ann/mine/commit/{'89abcdef0123456789abcdef0123456789abcdef'}\n")
    own = ("adapter_config.json", "adapter_model.safetensors", "lorary.json")
    assert sorted(files) == sorted((*own, "README.md"))
    assert all(files[name] == (tmp_path / "out" / name).read_bytes() for name in own)
    assert received.modes == {name: "lfs" if name.endswith("s") else "regular" for name in files}
    assert received.private == {"ann/mine": True}
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict()["base_model"] == "org/base"
    assert card.data.to_dict()["model_name"] == "ann/mine"
    assert '"ann/mine")' in card.text, "the code loads it from the Hub"
    assert not (tmp_path / "out" / "README.md").exists()


def test_nothing_is_asked_without_yes(tmp_path: Path, received: Received, command: Command) -> None:
    adapter(tmp_path / "out")
    beside(tmp_path / "out")
    ran = command("push", "out", "ann/mine")
    assert (ran.code, ran.out) == (0, "")
    assert received == Received()
    lines = ran.err.splitlines()
    assert lines[0] == f"ann/mine (private), from {tmp_path / 'out'}:"
    assert lines[-1] == "nothing was uploaded: --yes does"
    assert "left out: .env, adapter_model.bin, checkpoint-1/, optimizer.pt" in lines
    assert any(line.endswith("README.md (made now)") for line in lines)
    assert "  library_name: peft" in lines
    assert any(line.startswith("note: the card does not name a base on the Hub: pass --base") for line in lines)
    assert "secret" not in ran.err


def test_the_card_of_a_run_loads_the_adapter_from_the_hub(tmp_path: Path) -> None:
    adapter(tmp_path / "out", "lora")
    code = 'model = lorary.load(AutoModelForCausalLM.from_pretrained("org/base"), "{}")\n'
    (tmp_path / "out" / "README.md").write_text("# Mine\n" + code.format("adapter"))
    what = plan_upload(tmp_path / "out", "ann/mine", base="org/base")
    assert what.card == "# Mine\n" + code.format("ann/mine")
    assert any(note.endswith("write base_model: OWNER/NAME into the front matter of README.md") for note in what.notes)


def test_a_card_of_the_user_s_own_is_kept_and_pushed(tmp_path: Path, received: Received) -> None:
    value = adapter(tmp_path / "out", "glora")
    own = "---\nbase_model: org/base\n---\n# Mine\n"
    (tmp_path / "out" / "README.md").write_text(own)
    assert not write_card(tmp_path / "out", value)
    what = plan_upload(tmp_path / "out", "ann/glora")
    assert (what.made, what.notes, what.metadata) == (False, (), ["base_model: org/base"])
    upload(what, public=True, message="first")
    ((_, summary, files),) = received.commits
    assert summary == "first"
    assert files["README.md"].decode() == own
    assert files["adapter.safetensors"] == (tmp_path / "out" / "adapter.safetensors").read_bytes()
    assert received.private == {"ann/glora": False}


def test_the_adapter_of_a_run_folder_is_pushed(tmp_path: Path, received: Received, command: Command) -> None:
    adapter(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert command("push", "run", "ann/run", "--yes", "--public", "-m", "a run").code == 0
    assert set(received.commits[0][2]) >= {"lorary.json", "README.md"}
    assert not any("/" in name for name in received.commits[0][2])


def test_a_second_push_is_a_second_commit_but_a_public_repository_is_no_surprise(
    tmp_path: Path, received: Received, command: Command
) -> None:
    adapter(tmp_path / "out")
    for _ in range(2):
        assert command("push", "out", "ann/mine", "--yes").code == 0
    assert len(received.commits) == 2
    received.private["ann/mine"] = False
    ran = command("push", "out", "ann/mine", "--yes")
    assert (ran.code, len(received.commits)) == (4, 2)
    assert "ann/mine: exists and is public: everybody could read the adapter\n      hint: pass --public" in ran.err
    assert command("push", "out", "ann/mine", "--yes", "--public").code == 0


def test_folders_of_this_machine_in_the_record_are_told(tmp_path: Path) -> None:
    parents = (Parent("/data/ann/a", "", 1.0), Parent("C:\\runs\\b", "", 1.0), Parent("org/c", "", 1.0))
    adapter(tmp_path / "out", provenance=Provenance("sum", parents, {}))
    what = plan_upload(tmp_path / "out", "ann/mine", base="org/base")
    assert what.notes == ("lorary.json names folders of this machine: '/data/ann/a', 'C:\\\\runs\\\\b'",)
    assert "/data" not in what.card, "only the end of a path is on the card"


# --- what is refused --------------------------------------------------------------------------------------------------


def damaged(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def exchanged(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"xyz")


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "lorary.json").unlink()


def outside(folder: Path) -> None:
    secret = folder.parent / "secret.txt"
    secret.write_text("secret")
    (folder / "README.md").symlink_to(secret)


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "README.md")


def no_text(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"\xff\xfe\x00")


def unknown_key(folder: Path) -> None:
    record = json.loads((folder / "lorary.json").read_text())
    (folder / "lorary.json").write_text(json.dumps(record | {"more": 1}))


def only_pickle(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_model.bin").write_bytes(b"a pickle")


def no_adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


BAD = {
    damaged: "adapter_model.safetensors: the tensors need 1,792 bytes, the file has 1,789: it is cut short",
    exchanged: r"adapter_model.safetensors: is not the file that was saved \(SHA-256 differs\)",
    not_finite: "values are NaN or infinite",
    outside: "README.md: is a link that leaves the folder",
    pipe: "README.md: is a named pipe, not a plain file",
    no_text: "README.md: is not a text in UTF-8\n      hint: remove it: a card is then made",
    unknown_key: "more: is not a field of the format",
    only_pickle: "adapter_model.bin",
    no_adapter: "it holds neither lorary.json nor adapter_config.json",
    missing: "there is no such folder",
}


@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_what_could_not_be_loaded_is_not_pushed(
    damage: Any, tmp_path: Path, received: Received, command: Command
) -> None:
    adapter(tmp_path / "out")
    damage(tmp_path / "out")
    ran = command("push", "out", "ann/mine", "--yes")
    assert (ran.code, ran.out) == (4, "")
    with pytest.raises(FileError, match=BAD[damage]):
        plan_upload(tmp_path / "out", "ann/mine")
    assert received == Received()


@pytest.mark.parametrize(
    ("repo", "base", "message"),
    [
        ("mine", None, "the repository: 'mine' has no owner\n      hint: write OWNER/NAME"),
        ("ann/a/b", None, "the repository: 'ann/a/b' is not a Hub id: Repo id must be in the form"),
        ("ann/..", None, "the repository: 'ann/..' is not a Hub id"),
        ("https://hub/ann/a", None, "is not a Hub id"),
        ("ann/mine", "/data/base", "--base: '/data/base' is not a Hub id"),
        ("an n/x", "a--b", "the repository: .*\n.*\n.*--base: 'a--b' is not a Hub id"),
    ],
)
def test_ids_that_are_none(repo: str, base: str | None, message: str, tmp_path: Path) -> None:
    adapter(tmp_path / "out")
    with pytest.raises(FileError, match=message):
        plan_upload(tmp_path / "out", repo, base=base)


def test_the_hub_s_refusals_are_told(
    tmp_path: Path, received: Received, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(tmp_path / "out")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    ran = command("push", "out", "ann/mine", "--yes")
    assert ran.code == 4
    assert ran.err.splitlines()[-3:] == [
        "error: cannot push to ann/mine:",
        "  - ann/mine: the Hub answers 401: Invalid username or password.",
        "      hint: log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    ]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    received.refuses = 413
    assert "the Hub answers 413: the Hub is in a mood" in command("push", "out", "ann/mine", "--yes").err
    received.refuses_lfs = 403
    ran = command("push", "out", "ann/mine", "--yes")
    assert "ann/mine: the upload failed: Error while uploading 'adapter_model.safetensors' to the Hub." in ran.err
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    ran = command("push", "out", "ann/mine", "--yes")
    assert "ann/mine: the Hub cannot be reached:" in ran.err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "cannot push to ann/mine:" in command("push", "out", "ann/mine", "--yes").err
    assert received.commits == []


def test_a_file_that_changes_after_the_check_is_not_pushed(tmp_path: Path, received: Received) -> None:
    adapter(tmp_path / "out")
    what = plan_upload(tmp_path / "out", "ann/mine")
    with (tmp_path / "out" / "lorary.json").open("a") as file:
        file.write(" ")
    with pytest.raises(FileError, match=r"lorary.json: has changed since it was checked\n      hint: push again"):
        upload(what)
    assert received == Received()


def test_a_card_whose_metadata_is_no_yaml_is_noted(tmp_path: Path) -> None:
    adapter(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("---\n: : [\n---\n")
    assert any("the card's metadata cannot be read" in note for note in plan_upload(tmp_path / "out", "ann/mine").notes)
