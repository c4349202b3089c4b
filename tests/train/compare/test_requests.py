"""Requests that cannot be compared: each is refused with all of its reasons, and nothing is written."""

# ruff: noqa: E501 (messages stand here as they are printed)

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lorary.analysis.comparison.record import Arm
from lorary.errors import ConfigError, DataError, LoraryError
from lorary.train.compare.compare import compare
from lorary.train.compare.ledger import identity
from lorary.train.compare.request import make_request
from lorary.train.compare.settings import Settings
from lorary.train.config.load import from_dict
from tests.train.compare.tiny import LORA, quick, tree
from tests.train.tasks import rows as rows_file
from tests.train.tasks import saved

RATES = (1e-3,)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("requests")


@pytest.fixture(scope="module")
def words(place: Path) -> dict[str, Any]:
    return tree(place)


def refused(words: dict[str, Any], arms: Any, place: Path, folder: Path, **settings: Any) -> str:
    """The error, after a look that nothing was written."""
    with pytest.raises(LoraryError) as error:
        compare(from_dict(words), arms, quick(place, **settings), folder)
    assert not folder.exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [
        ((), "cannot compare:\n  - arms: there are none\n      hint: name at least one method"),
        (("lora",), "cannot compare:\n  - arms[0]: is a str, not an Arm"),
        (
            (LORA, LORA),
            "cannot compare:\n  - arms: 2 are named 'lora'\n      hint: give each a name of its own",
        ),
        (
            (Arm(" \n", {"name": "lora"}, RATES), Arm("x" * 201, {"name": "lora"}, RATES)),
            "cannot compare:\n"
            "  - arms: ' \\n' is not a name\n      hint: use printable characters, at most 200\n"
            f"  - arms: {'x' * 201!r} is not a name\n      hint: use printable characters, at most 200",
        ),
        (
            (Arm("lora", {"name": "lora"}, (0.1, float("nan"))), Arm("dora", {"name": "dora"}, (0.1, 2.0))),
            "cannot compare:\n"
            "  - lora: rates: are [0.1, nan]\n      hint: use numbers above 0 and at most 1\n"
            "  - dora: rates: are [0.1, 2.0]\n      hint: use numbers above 0 and at most 1",
        ),
        (
            (Arm("one", "lora", RATES), Arm("two", {"name": "lora"}, 1e-3), Arm("three", {"name": "lora"}, "1e-3")),  # type: ignore[arg-type]
            "cannot compare:\n"
            "  - one: method: is 'lora', not a section of a configuration\n"
            "      hint: such as {'name': 'lora', 'r': 8}\n"
            "  - two: rates: is 0.001\n"
            "      hint: use a tuple of learning rates; an empty one for the method's own\n"
            "  - three: rates: is '1e-3'\n"
            "      hint: use a tuple of learning rates; an empty one for the method's own",
        ),
        (
            (Arm(5, {"name": "lora"}, RATES), Arm(["a"], {"name": "lora"}, RATES)),  # type: ignore[arg-type]
            "cannot compare:\n"
            "  - arms: 5 is not a name\n      hint: use printable characters, at most 200\n"
            "  - arms: ['a'] is not a name\n      hint: use printable characters, at most 200",
        ),
        (7, "cannot compare:\n  - arms: is a int, not a sequence of Arm"),
        (
            (Arm("lora", {"name": "lora"}, (0.1, 0.01)),),
            "cannot compare:\n  - lora: rates: are [0.1, 0.01]\n      hint: let them rise, each once",
        ),
    ],
)
def test_arms_that_are_none(words: dict[str, Any], place: Path, tmp_path: Path, arms: Any, sentence: str) -> None:
    assert refused(words, arms, place, tmp_path / "new") == sentence


def test_the_methods_of_all_arms_are_checked_at_once(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    arms = (
        Arm("one", {"name": "lorra"}, RATES),
        Arm("two", {"name": "dora", "rank": "many"}, RATES),
        LORA,
        Arm("three", {"name": "lora", "targets": "nowhere"}, RATES),
    )
    found = refused(words, arms, place, tmp_path / "new")
    assert found.startswith("cannot compare:\n  - one: method.name: ")
    assert "did you mean" in found
    assert "  - two: method." in found
    assert "three" not in found  # its layers are looked for once the methods are valid
    found = refused(words, arms[2:], place, tmp_path / "new")
    assert found.startswith("cannot compare:\n  - three: ")
    assert "nowhere" in found


def test_a_method_that_this_model_cannot_train_is_refused_by_its_name(
    words: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    found = refused(words, (LORA, Arm("biases", {"name": "bitfit"}, RATES)), place, tmp_path / "new")
    assert found.startswith("cannot compare:\n  - biases: ")
    assert "bias" in found


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        (
            {"task": "dpo"},
            "  - task: is `dpo`, whose loss is not scored row by row\n      hint: use sft or classification",
        ),
        (
            {"model": {"id": "MODEL", "adapter": "somewhere"}},
            "  - model.adapter: an adapter to go on from brings its method, and there would be nothing to compare\n"
            "      hint: remove it",
        ),
    ],
)
def test_configurations_that_cannot_be_compared(
    words: dict[str, Any], place: Path, tmp_path: Path, changes: dict[str, Any], reasons: str
) -> None:
    if "model" in changes:
        changes = {"model": changes["model"] | {"id": words["model"]}}
    assert refused(words | changes, (LORA,), place, tmp_path / "new") == f"cannot compare:\n{reasons}"


def test_the_best_evaluation_does_not_count(words: dict[str, Any], tmp_path: Path) -> None:
    """Advice keeps it, for a run of its own; a comparison is the same one with it and without."""
    training = words["training"] | {"save_steps": 3}
    without, kept = (from_dict(words | {"training": training | {"keep_best": best}}) for best in (False, True))
    plain, asked = (make_request(one, (LORA,), Settings(), tmp_path) for one in (without, kept))
    assert kept.training.keep_best
    assert identity(asked) == identity(plain)
    assert not asked.config_of(LORA).training.keep_best


def test_without_held_out_rows_nothing_can_be_chosen(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    data = {k: v for k, v in words["data"].items() if k != "validation_split"}
    words = words | {"data": data, "training": {"max_steps": 6}}
    assert refused(words, (LORA,), place, tmp_path / "new") == (
        "cannot compare:\n"
        "  - data.validation: no rows are held out, on which rates are chosen and methods judged\n"
        "      hint: set data.validation or data.validation_split"
    )


def test_too_few_held_out_rows(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    words = words | {"data": words["data"] | {"validation_split": 0.1}}
    with pytest.raises(DataError) as error:
        compare(from_dict(words), (LORA,), quick(place), tmp_path / "new")
    assert str(error.value) == (
        "there are too few held-out rows:\n"
        "  - data.validation: 1 of them can be chosen on, and 1 judged on\n      hint: hold out more"
    )
    assert not (tmp_path / "new").exists()


def test_a_reference_that_is_no_arm(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    found = refused(words, (LORA,), place, tmp_path / "new", reference="lorra", match="parameters")
    assert found == "cannot compare:\n  - reference: there is no arm 'lorra'\n      hint: did you mean `lora`?"


def test_general_text_that_is_not_there(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    found = refused(words, (LORA,), place, tmp_path / "new", general=(str(tmp_path / "nothing.jsonl"),))
    assert "nothing.jsonl" in found


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        ({"rates": 2}, "  - rates: is 2\n      hint: use an odd number: a centre, and as many on each side"),
        ({"rates": 0}, "  - rates: is 0\n      hint: use a whole number of at least 1"),
        ({"rates": True}, "  - rates: is True\n      hint: use a whole number of at least 1"),
        ({"seeds": 0, "workers": 0.5}, "  - seeds: is 0\n      hint: use a whole number of at least 1\n"
         "  - workers: is 0.5\n      hint: use a whole number of at least 1"),
        ({"spacing": 1.0}, "  - spacing: is 1.0\n      hint: use a factor from 1.1 to 1000"),
        ({"spacing": float("nan")}, "  - spacing: is nan\n      hint: use a factor from 1.1 to 1000"),
        ({"budget": -1}, "  - budget: is -1\n      hint: use a number of seconds above 0, or None"),
        ({"budget": "20min"}, "  - budget: is '20min'\n      hint: use a number of seconds above 0, or None"),
        ({"halving": "no"}, "  - halving: is 'no'\n      hint: use True or False"),
        ({"reference": 5}, "  - reference: is 5\n      hint: use the name of a method"),
        ({"general": "builtin:python"}, "  - general: is 'builtin:python'\n      hint: use a tuple of sources, such as ('builtin:python',)"),
        ({"general": ("",)}, "  - general: is ('',)\n      hint: use a tuple of sources, such as ('builtin:python',)"),
        ({"seeds": 10**9, "workers": 1025}, "  - seeds: is 1000000000\n      hint: use a whole number of at most 1,000\n"
         "  - workers: is 1025\n      hint: use a whole number of at most 1,024"),
        ({"match": "bytes"}, "  - match: is 'bytes'\n      hint: use rank or parameters"),
    ],
)  # fmt: skip
def test_settings_out_of_range(settings: dict[str, Any], reasons: str) -> None:
    with pytest.raises(ConfigError) as error:
        Settings(**settings)
    assert str(error.value) == f"invalid settings of a comparison:\n{reasons}"


def test_a_folder_of_something_else_is_left_alone(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError) as error:
            compare(from_dict(words), (LORA,), quick(place), tmp_path, overwrite=overwrite)
        assert str(error.value) == (
            f"cannot compare in {str(tmp_path)!r}:\n"
            "  - folder: holds files of something else: notes.txt\n"
            "      hint: it has no comparison.json; name another folder"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_is_no_folder(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="folder: is a file"):
        compare(from_dict(words), (LORA,), quick(place), path, overwrite=True)
    assert path.read_text() == "mine"


class _HaltError(Exception):
    pass


def test_another_comparison_in_the_folder_is_named_by_what_differs(
    words: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """Unless it is to be overwritten. The budget and the number of processes may differ."""

    def halt(**_: Any) -> None:
        raise _HaltError

    with pytest.raises(_HaltError):
        compare(from_dict(words), (LORA,), quick(place), tmp_path / "c", progress=halt)
    path = tmp_path / "c" / "comparison.json"
    before = path.read_bytes()
    other = Arm("lora", {"name": "lora", "r": 4}, LORA.rates)
    with pytest.raises(ConfigError) as error:
        compare(from_dict(words), (other,), quick(place, seeds=2), tmp_path / "c")
    fix = "      hint: repeat the request that it was begun with, pass overwrite, or name another folder"
    assert str(error.value) == (
        "the folder holds another comparison:\n"
        f"  - arms.lora.method.r: 2 in the folder, 4 here\n{fix}\n"
        f"  - settings.seeds: 1 in the folder, 2 here\n{fix}"
    )
    assert path.read_bytes() == before
    with pytest.raises(_HaltError):
        compare(from_dict(words), (LORA,), quick(place, workers=2, budget=1e4), tmp_path / "c", progress=halt)
    with pytest.raises(_HaltError):
        compare(from_dict(words), (other,), quick(place), tmp_path / "c", progress=halt, overwrite=True)
    assert json.loads(path.read_text())["settings"]["request"]["arms"]["lora"]["method"]["r"] == 4


def test_another_base_or_other_rows_under_a_comparison_are_refused_with_both_digests(tmp_path: Path) -> None:
    """Of the same name, in a comparison of which only the base has been scored."""

    def halt(description: str = "", **_: Any) -> None:
        if description == "lora":
            raise _HaltError

    words = tree(tmp_path)
    request = from_dict(words), (LORA,), quick(tmp_path), tmp_path / "c"
    with pytest.raises(_HaltError):
        compare(*request, progress=halt)
    path = tmp_path / "c" / "comparison.json"
    before = path.read_bytes()
    weights = tmp_path / "base" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    rows = Path(words["data"]["train"])
    rows.write_text(rows.read_text().replace("hello", "world"))
    with pytest.raises(ConfigError) as error:
        compare(*request)
    hint = "hint: restore the {}, pass overwrite, or name another folder"
    found = re.sub(r"\b(?=\w*\d)[0-9a-f]{12}\b", "#", str(error.value)).split("\n")
    assert found[:3] == [
        "the folder holds another comparison:",
        "  - base: other weights: # when it was trained, # here (it was trained on `base`)",
        f"      {hint.format('base')}",
    ]
    rest = "rows: are not those of the runs in the folder: digest # there, # here"
    assert f"  - training {rest}" in found
    assert found[-1] == f"      {hint.format('data')}"
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"trials": 1}'])
def test_a_damaged_record_is_refused_and_kept(words: dict[str, Any], place: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(LoraryError) as error:
        compare(from_dict(words), (LORA,), quick(place), tmp_path)
    assert "comparison.json" in str(error.value)
    assert (tmp_path / "comparison.json").read_text() == text


def test_a_name_is_no_path(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    from lorary.train.compare.bench import run_name
    from lorary.train.compare.request import make_request

    names = ("../../up", "/etc", "..", "a b/c\\d", "lora", "日本")
    arms = [Arm(name, {"name": "lora"}, RATES) for name in names]
    request = make_request(from_dict(words), arms, quick(place), tmp_path)
    found = [run_name(request, name, 1e-3, 7) for name in names]
    assert found == [
        f"runs/{number}/lr-0.001-seed-7" for number in ("01-up", "02-etc", "03", "04-a-b-c-d", "05-lora", "06")
    ]


def test_settings_that_are_none() -> None:
    """Also beside no configuration."""
    with pytest.raises(ConfigError) as error:
        compare({}, (LORA,), {"seeds": 1}, 5)  # type: ignore[arg-type]
    assert str(error.value) == (
        "cannot compare:\n"
        "  - config: is a dict, not a Config: `lorary.train.config.load` reads one\n"
        "  - folder: is a int, not a path\n"
        "  - settings: is a dict, not a Settings"
    )


def test_general_rows_that_are_no_text(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    (tmp_path / "general.jsonl").write_text(json.dumps({"text": "hello", "label": "x"}) + "\n")
    found = refused(words, (LORA,), place, tmp_path / "new", general=(str(tmp_path / "general.jsonl"),))
    assert "general.jsonl" in found
    assert "does not train on labelled texts" in found


def test_numbers_as_labels_have_no_accuracy(place: Path, tmp_path: Path) -> None:
    rows = [{"text": f"hello world {i}", "label": i / 7} for i in range(12)]
    data = {"train": rows_file(tmp_path, rows), "validation_split": 0.5, "max_length": 32}
    words = {"model": saved(tmp_path, "BertModel"), "task": "classification", "data": data}
    words["training"] = {"max_steps": 4, "batch_size": 4}
    assert refused(words, (LORA,), place, tmp_path / "new") == (
        "cannot compare:\n"
        "  - the labels: are numbers, and methods are judged by the cross entropy of a label and by accuracy\n"
        "      hint: use texts as labels"
    )
