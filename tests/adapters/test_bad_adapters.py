"""Bad adapters: each refused with every reason in one message, the model and the folder left as they were."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.hostile import PREFIX, Spoil, Spoiled, entry, note, refusal, safetensors

WEIGHTS = "adapter_model.safetensors"


def fifo(s: Spoiled) -> None:
    s.weights.unlink()
    os.mkfifo(s.weights)


def folder_instead(s: Spoiled) -> None:
    s.weights.unlink()
    s.weights.mkdir()


def link(s: Spoiled, target: Path) -> None:
    s.weights.unlink()
    s.weights.symlink_to(target)


def link_outside(s: Spoiled) -> None:
    outside = s.folder.parent / "elsewhere.safetensors"
    s.weights.rename(outside)
    s.weights.symlink_to(outside)


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def only_a_pickle(s: Spoiled) -> None:
    s.weights.unlink()
    (s.folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(s.folder / "ran")))


def pickle_renamed(s: Spoiled) -> None:
    s.weights.write_bytes(pickle.dumps(Trap(s.folder / "ran"), protocol=4) + bytes(64))


def torch_renamed(s: Spoiled) -> None:
    torch.save({"a": torch.ones(3)}, s.weights)


def header(written: object, data: bytes = b"", length: int | None = None) -> Spoil:
    return lambda s: s.weights.write_bytes(safetensors(written, data, length))


def truncated(s: Spoiled) -> None:
    os.truncate(s.weights, s.weights.stat().st_size - 100)


def config(text: str | bytes) -> Spoil:
    return lambda s: s.config.write_bytes(text.encode() if isinstance(text, str) else text)


def say(**words: Any) -> Spoil:
    return lambda s: s.say(**words)


def raw(key: str, text: str) -> Spoil:
    """A configuration with one more field, spelled in JSON as given."""
    return lambda s: s.config.write_text(s.config.read_text().rstrip().removesuffix("}") + f', "{key}": {text}}}')


def without(key: str) -> Spoil:
    def spoil(s: Spoiled) -> None:
        words = json.loads(s.config.read_text())
        del words[key]
        s.config.write_text(json.dumps(words))

    return spoil


def half(s: Spoiled) -> None:
    s.tensors(lambda t: [t.pop(name) for name in list(t) if "layers.1" in name])


def transposed(s: Spoiled) -> None:
    name = PREFIX + "0.self_attn.q_proj.lora_A.weight"
    s.tensors(lambda t: t.update({name: t[name].T.contiguous()}))


def shape(name: str, *size: int) -> Spoil:
    return lambda s: s.tensors(lambda t: t.update({PREFIX + name: torch.ones(size)}))


def all_of_type(dtype: torch.dtype) -> Spoil:
    return lambda s: s.tensors(lambda t: t.update({name: v.to(dtype) for name, v in t.items()}))


def without_prefix_too(s: Spoiled) -> None:
    name = PREFIX + "0.self_attn.q_proj.lora_A.weight"
    s.tensors(lambda t: t.update({name.removeprefix("base_model.model."): t[name] + 1}))


BOMB = r"(([a-z_0-9]+\.?)+)+!"
A0, B0 = "0.self_attn.q_proj.lora_A.weight", "0.self_attn.q_proj.lora_B.weight"

NAMES = [
    f"model.layers.{i}.self_attn.{module}_proj.lora_{factor}.weight"
    for i in (0, 1)
    for module in ("q", "v")
    for factor in "AB"
]


def each(what: str, prefix: str = "") -> str:
    """The same reason for every tensor of the adapter."""
    return "\n".join(f"  - {prefix}{name}: {what}" for name in NAMES)


def other_rank(r: int) -> str:
    """Every tensor, where a rank other than 4 is expected."""
    lines = []
    for name in NAMES:
        out = 16 if ".q_" in name else 8
        found, expected = ([4, 16], [r, 16]) if "lora_A" in name else ([out, 4], [out, r])
        lines.append(f"  - {name}: has the shape {found}, expected {expected}")
    return "\n".join(lines)


# what is done to a PEFT folder, and all of the message but its first line
PEFT: list[tuple[str, Spoil, str]] = [
    ("empty file", lambda s: s.weights.write_bytes(b""), "  - adapter_model.safetensors: is empty"),
    (
        "seven bytes",
        lambda s: s.weights.write_bytes(b"1234567"),
        "  - adapter_model.safetensors: has 7 bytes, too few for a safetensors file",
    ),
    ("weights missing", lambda s: s.weights.unlink(), "  - adapter_model.safetensors: is missing"),
    ("folder instead of weights", folder_instead, "  - adapter_model.safetensors: is a folder, not a plain file"),
    ("named pipe", fifo, "  - adapter_model.safetensors: is a named pipe, not a plain file"),
    ("link to nothing", lambda s: link(s, s.folder / "nothing"), "  - adapter_model.safetensors: is a link to nothing"),
    (
        "link to a device",
        lambda s: link(s, Path("/dev/zero")),
        (
            "  - adapter_model.safetensors: is a link that leaves the folder\n"
            "      hint: copy the file itself into the folder"
        ),
    ),
    (
        "link that leaves the folder",
        link_outside,
        (
            "  - adapter_model.safetensors: is a link that leaves the folder\n"
            "      hint: copy the file itself into the folder"
        ),
    ),
    ("link to itself", lambda s: link(s, s.weights), "  - adapter_model.safetensors: is a link to itself"),
    (
        "only a pickle",
        only_a_pickle,
        (
            "  - adapter_model.bin: is a pickle, which can run code when it is read; it was not opened\n"
            "      hint: if you trust its author, load it with PEFT and save it again: PEFT writes "
            "safetensors"
        ),
    ),
    (
        "pickle under another name",
        pickle_renamed,
        ("  - adapter_model.safetensors: is a pickle under another name; pickles can run code and are never opened"),
    ),
    (
        "torch file under another name",
        torch_renamed,
        ("  - adapter_model.safetensors: is a pickle under another name; pickles can run code and are never opened"),
    ),
    (
        "sparse file of a terabyte",
        lambda s: os.truncate(s.weights, 2**40 + 1),
        (
            "  - adapter_model.safetensors: is 1,099,511,627,777 bytes, more than the 1,099,511,627,776 that "
            "are accepted"
        ),
    ),
    (
        "header of 2^63 bytes",
        header("{}", length=2**63),
        (
            "  - adapter_model.safetensors: announces a header of 9,223,372,036,854,775,808 bytes, more than "
            "the 10,485,760 that are accepted"
        ),
    ),
    (
        "header larger than the file",
        header("{}", length=1000),
        ("  - adapter_model.safetensors: announces a header of 1,000 bytes, but 2 follow: the file is cut short"),
    ),
    (
        "header that is no JSON",
        header("{nothing}"),
        (
            "  - adapter_model.safetensors: the header is damaged: not JSON: expecting property name "
            "enclosed in double quotes (column 2)"
        ),
    ),
    (
        "header that is not UTF-8",
        header(b'{"\xff": 1}'),
        "  - adapter_model.safetensors: the header is damaged: not UTF-8: byte 0xff at offset 2",
    ),
    (
        "header that is a list",
        header("[1, 2, 3]"),
        "  - adapter_model.safetensors: the header begins with '[', not with '{'",
    ),
    (
        "header after a space",
        header(" {}       "),
        "  - adapter_model.safetensors: the header begins with ' ', not with '{'",
    ),
    (
        "header nested deeply",
        header('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        "  - adapter_model.safetensors: the header is damaged: nested too deeply",
    ),
    (
        "header with NaN",
        header('{"a": NaN}'),
        "  - adapter_model.safetensors: the header is damaged: NaN is not a JSON number",
    ),
    ("no tensors at all", header({"__metadata__": {"format": "pt"}}), each("is missing")),
    (
        "a name twice",
        header('{"a": %s, "a": %s}' % (json.dumps(entry()), json.dumps(entry())), bytes(8)),  # noqa: UP031
        "  - adapter_model.safetensors: the header is damaged: the key 'a' appears twice",
    ),
    (
        "a field too many",
        header({"a": entry() | {"more": 1}}, bytes(8)),
        ("  - adapter_model.safetensors: a: its entry must have exactly the fields dtype, shape and data_offsets"),
    ),
    (
        "an entry that is a list",
        header({"a": [1, 2]}, bytes(8)),
        ("  - adapter_model.safetensors: a: its entry must have exactly the fields dtype, shape and data_offsets"),
    ),
    (
        "metadata of numbers",
        header({"__metadata__": {"a": 1}, "b": entry()}, bytes(8)),
        "  - adapter_model.safetensors: __metadata__: must map names to texts",
    ),
    (
        "metadata of 100 kB",
        header({"__metadata__": {"a": "x" * 100_000}, "b": entry()}, bytes(8)),
        "  - adapter_model.safetensors: __metadata__: more than the 65,536 characters that are accepted",
    ),
    (
        "tensors that overlap",
        header({"a": entry(), "b": entry(start=4, stop=12)}, bytes(12)),
        ("  - adapter_model.safetensors: b: begins at byte 4 and overlaps the tensor before it, which ends at 8"),
    ),
    (
        "tensors with a hole between",
        header({"a": entry(), "b": entry(start=12, stop=20)}, bytes(20)),
        "  - adapter_model.safetensors: b: begins at byte 12 and leaves a hole before it, which ends at 8",
    ),
    (
        "bytes after the last tensor",
        header({"a": entry()}, bytes(12)),
        "  - adapter_model.safetensors: 4 bytes follow the last tensor",
    ),
    (
        "data cut short",
        truncated,
        "  - adapter_model.safetensors: the tensors need 1,792 bytes, the file has 1,692: it is cut short",
    ),
    (
        "a shape that overflows",
        header({"a": entry([2**31, 2**31, 4], 0, 0)}),
        (
            "  - adapter_model.safetensors: a: F32 of shape [2147483648, 2147483648, 4] takes "
            "73,786,976,294,838,206,464 bytes, its offsets give it 0"
        ),
    ),
    (
        "a negative extent",
        header({"a": entry([-2, -4])}, bytes(8)),
        ("  - adapter_model.safetensors: a: the shape [-2, -4] is not at most 5 whole numbers up to 2,147,483,648"),
    ),
    (
        "a fractional extent",
        header({"a": entry([2.0])}, bytes(8)),
        ("  - adapter_model.safetensors: a: the shape [2.0] is not at most 5 whole numbers up to 2,147,483,648"),
    ),
    (
        "six dimensions",
        header({"a": entry([1, 1, 1, 1, 1, 2])}, bytes(8)),
        (
            "  - adapter_model.safetensors: a: the shape [1, 1, 1, 1, 1, 2] is not at most 5 whole numbers "
            "up to 2,147,483,648"
        ),
    ),
    (
        "offsets in reverse",
        header({"a": entry(start=8, stop=0)}, bytes(8)),
        "  - adapter_model.safetensors: a: the offsets [8, 0] are not [start, stop]",
    ),
    (
        "integers",
        header({"a": entry([1], dtype="I64")}, bytes(8)),
        "  - adapter_model.safetensors: a: is 'I64'; accepted are F32, F16, BF16",
    ),
    (
        "a dtype that does not exist",
        header({"a": entry([1], dtype="F2")}, bytes(8)),
        "  - adapter_model.safetensors: a: has the unknown dtype 'F2'; accepted are F32, F16, BF16",
    ),
    (
        "a name of 600 characters",
        header({"x" * 600: entry()}, bytes(8)),
        (
            "  - adapter_model.safetensors: 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
            "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx… (600 characters)': a tensor's name has at most 512 characters"
        ),
    ),
    (
        "a name with an escape sequence",
        header({"a\x1b[31m\u202e": entry()}, bytes(8)),
        "  - adapter_model.safetensors: 'a\\x1b[31m\\u202e': a tensor's name is made of printable ASCII",
    ),
    (
        "a name that is a path",
        header({"../../etc/passwd": entry()}, bytes(8)),
        "  - adapter_model.safetensors: '../../etc/passwd': a tensor's name is not a path",
    ),
    (
        "too many tensors",
        header({f"t{i}": entry((0,), 0, 0) for i in range(20_001)}),
        "  - adapter_model.safetensors: 20,001 tensors, more than the 20,000 that are accepted",
    ),
    (
        "several faults of a header",
        header({"a\n": entry(), "b": entry(dtype="F64"), "c": {}}, bytes(8)),
        (
            "  - adapter_model.safetensors: 'a\\n': a tensor's name is made of printable ASCII\n"
            "  - adapter_model.safetensors: b: is 'F64'; accepted are F32, F16, BF16\n"
            "  - adapter_model.safetensors: c: its entry must have exactly the fields dtype, shape and "
            "data_offsets"
        ),
    ),
    ("another rank in the configuration", say(r=8), other_rank(8)),
    (
        "configuration that is no JSON",
        config("{r: 4}"),
        ("  - adapter_config.json: not JSON: expecting property name enclosed in double quotes (column 2)"),
    ),
    ("configuration that is a list", config("[]"), "  - adapter_config.json: is not a JSON object"),
    (
        "configuration that is not UTF-8",
        config(b"\xff\xfe{}"),
        "  - adapter_config.json: not UTF-8: byte 0xff at offset 0",
    ),
    (
        "configuration of 5 MB",
        config('{"a": "' + "x" * 5_000_000 + '"}'),
        "  - adapter_config.json: is 5,000,009 bytes, more than the 4,194,304 that are accepted",
    ),
    ("configuration nested deeply", config("[" * 200_000), "  - adapter_config.json: nested too deeply"),
    (
        "no peft_type",
        without("peft_type"),
        (
            "  - adapter_config.json: has no `peft_type`\n"
            "      hint: lorary reads PEFT's LORA, ADALORA, VERA, IA3, TRAINABLE_TOKENS, PREFIX_TUNING, "
            "PROMPT_TUNING adapters"
        ),
    ),
    (
        "another peft_type",
        say(peft_type="EVIL"),
        (
            "  - adapter_config.json: is of type 'EVIL'\n"
            "      hint: lorary reads PEFT's LORA, ADALORA, VERA, IA3, TRAINABLE_TOKENS, PREFIX_TUNING, "
            "PROMPT_TUNING adapters"
        ),
    ),
    ("a field twice", raw("r", "8"), "  - adapter_config.json: the key 'r' appears twice"),
    ("alpha NaN", raw("alpha", "NaN"), "  - adapter_config.json: NaN is not a JSON number"),
    (
        "alpha infinite",
        say(lora_alpha=1e308),
        ("  - adapter_config.json: lora_alpha: is 1e+308; it takes a positive number of at most 1,000,000"),
    ),
    (
        "alpha that overflows",
        raw("alpha", "1e999"),
        "  - adapter_config.json: the number '1e999' is too large for a float",
    ),
    (
        "alpha negative",
        say(lora_alpha=-6),
        "  - adapter_config.json: lora_alpha: is -6; it takes a positive number of at most 1,000,000",
    ),
    (
        "alpha zero",
        say(lora_alpha=0),
        "  - adapter_config.json: lora_alpha: is 0; it takes a positive number of at most 1,000,000",
    ),
    (
        "alpha true",
        say(lora_alpha=True),
        "  - adapter_config.json: lora_alpha: is true; it takes a positive number of at most 1,000,000",
    ),
    ("rank a text", say(r="4"), "  - adapter_config.json: r: is '4'; it takes a whole number from 1 to 65,536"),
    ("rank zero", say(r=0), "  - adapter_config.json: r: is 0; it takes a whole number from 1 to 65,536"),
    ("rank negative", say(r=-1), "  - adapter_config.json: r: is -1; it takes a whole number from 1 to 65,536"),
    (
        "rank a billion",
        say(r=10**9),
        "  - adapter_config.json: r: is 1000000000; it takes a whole number from 1 to 65,536",
    ),
    ("rank true", say(r=True), "  - adapter_config.json: r: is true; it takes a whole number from 1 to 65,536"),
    ("rank null", say(r=None), "  - adapter_config.json: r: is null; it takes a whole number from 1 to 65,536"),
    ("rank of 5,000 digits", raw("more", "9" * 5000), "  - adapter_config.json: an integer of 5000 digits"),
    (
        "dropout of one",
        say(lora_dropout=1.0),
        "  - adapter_config.json: lora_dropout: is 1.0; it takes a probability in [0, 1)",
    ),
    (
        "a field misspelled",
        raw("lora_alhpa", "8"),
        (
            "  - adapter_config.json: lora_alhpa: is not a field that lorary knows\n"
            "      hint: did you mean `lora_alpha` or `lora_bias`?"
        ),
    ),
    (
        "an unknown field",
        raw("trust_remote_code", "true"),
        (
            "  - adapter_config.json: trust_remote_code: is not a field that lorary knows\n"
            "      hint: a newer PEFT may have written it; strict=False ignores it"
        ),
    ),
    (
        "a flag that is a text",
        say(use_rslora="yes"),
        "  - adapter_config.json: use_rslora: is 'yes'; it takes true or false",
    ),
    (
        "a wrong type in a book-keeping field",
        say(task_type=3),
        "  - adapter_config.json: task_type: is 3; it takes a text",
    ),
    (
        "DoRA without magnitudes",
        say(use_dora=True),
        "\n".join(
            f"  - model.layers.{i}.self_attn.{name}_proj.lora_magnitude_vector: is missing"
            for i in (0, 1)
            for name in "qv"
        ),
    ),
    (
        "biases beside B that are missing",
        say(lora_bias=True),
        "\n".join(
            f"  - model.layers.{i}.self_attn.{name}_proj.lora_B.bias: is missing" for i in (0, 1) for name in "qv"
        ),
    ),
    (
        "biases beside B that are no booleans",
        say(lora_bias="all"),
        "  - adapter_config.json: lora_bias: is 'all'; it takes true or false",
    ),
    (
        "biases beside B and DoRA",
        say(lora_bias=True, use_dora=True),
        "  - adapter_config.json: lora_bias: is set beside use_dora: here an adapter has one of the two",
    ),
    (
        "bare parameters",
        say(target_parameters=["experts.down_proj"]),
        (
            "  - adapter_config.json: target_parameters: names 'experts.down_proj': the model has no such parameter "
            "of experts that is known"
        ),
    ),
    (
        "trained tokens",
        say(trainable_token_indices=[1, 2]),
        "  - model.embed_tokens.token_adapter.trainable_tokens_delta: is missing",
    ),
    (
        "layer_replication of 200,000",
        say(layer_replication=[[0, 1]] * 200_000),
        (
            "  - adapter_config.json: layer_replication: is [[0, 1], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1], "
            "[0, 1], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1],… (1,600,000 characters): a model with repeated "
            "layers is not supported"
        ),
    ),
    (
        "a base that PEFT changes",
        say(init_lora_weights="pissa_niter_16"),
        (
            "  - adapter_config.json: init_lora_weights: is 'pissa_niter_16': these factors belong to a base "
            "that PEFT changes while loading; let PEFT convert the adapter (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        ),
    ),
    (
        "an unknown initialisation",
        say(init_lora_weights="magic"),
        ("  - adapter_config.json: init_lora_weights: is 'magic', an initialisation that lorary does not know"),
    ),
    (
        "an unknown bias",
        say(bias="some"),
        "  - adapter_config.json: bias: is 'some'; it takes one of none, all, lora_only",
    ),
    (
        "targets that are a number",
        say(target_modules=3),
        "  - adapter_config.json: target_modules: is 3, not a list of names",
    ),
    (
        "targets null",
        say(target_modules=None),
        "  - adapter_config.json: target_modules: is null: nothing says which modules are adapted",
    ),
    (
        "targets that match nothing",
        say(target_modules=["q_porj", "v_porj"]),
        (
            "  - adapter_config.json: target_modules: names no layer of this model\n"
            "      hint: the nearest here are q_proj, v_proj\n"
            ""
        )
        + each("adapts a module that the configuration does not name"),
    ),
    (
        "a regular expression that is none",
        say(target_modules="(q_proj"),
        (
            "  - adapter_config.json: target_modules: not a regular expression: missing ), unterminated "
            "subpattern at position 0"
        ),
    ),
    (
        "a regular expression that bombs",
        say(target_modules=BOMB),
        (
            "  - adapter_config.json: target_modules: names no layer of this model\n"
            "      hint: its layers: down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, "
            "up_proj, v_proj\n"
            ""
        )
        + each("adapts a module that the configuration does not name"),
    ),
    (
        "a rank pattern that bombs",
        say(rank_pattern={BOMB: 2, r"(.*a){12}": 3, "q_proj": 8}),
        (
            "  - model.layers.0.self_attn.q_proj.lora_A.weight: has the shape [4, 16], expected [8, 16]\n"
            "  - model.layers.0.self_attn.q_proj.lora_B.weight: has the shape [16, 4], expected [16, 8]\n"
            "  - model.layers.1.self_attn.q_proj.lora_A.weight: has the shape [4, 16], expected [8, 16]\n"
            "  - model.layers.1.self_attn.q_proj.lora_B.weight: has the shape [16, 4], expected [16, 8]"
        ),
    ),
    (
        "a pattern that takes for ever",
        say(target_modules=r"(?:.|..|...|....)*[!?]"),
        "  - adapter_config.json: its patterns take too much time to match",
    ),
    (
        "a pattern that matches roughly",
        say(target_modules=r"(?:.*q_proj){e<=1}"),
        ("  - adapter_config.json: target_modules: a brace that is not a repetition must be written \\{ in a pattern"),
    ),
    (
        "a pattern that refers to no group",
        say(alpha_pattern={r"(q)\2": 2}),
        (
            "  - adapter_config.json: alpha_pattern: '(q)\\\\2': not a regular expression: invalid group reference 2 "
            "at position 4"
        ),
    ),
    (
        "a pattern of too many states",
        say(rank_pattern={"((a{100}){100}){100}": 2}),
        (
            "  - adapter_config.json: rank_pattern: '((a{100}){100}){100}': a pattern of more than 20,000 "
            "states: its repetitions are too large"
        ),
    ),
    (
        "a pattern with flags",
        say(target_modules="(?i)Q_PROJ"),
        "  - adapter_config.json: target_modules: flags inside a pattern are not supported",
    ),
    (
        "a rank pattern out of bounds",
        say(rank_pattern={"q_proj": 0, "v_proj": "x"}),
        (
            "  - adapter_config.json: rank_pattern: 'q_proj': is 0; it takes a whole number from 1 to "
            "65,536; 'v_proj': is 'x'; it takes a whole number from 1 to 65,536"
        ),
    ),
    (
        "a rank pattern that is a list",
        say(rank_pattern=["q_proj"]),
        '  - adapter_config.json: rank_pattern: is ["q_proj"], not an object of patterns and values',
    ),
    (
        "modules_to_save that is a pattern",
        say(modules_to_save=[".*"]),
        "  - adapter_config.json: modules_to_save: '.*' is not a plain module name",
    ),
    (
        "layers with a pattern",
        say(target_modules=".*q_proj", layers_to_transform=[0]),
        ("  - adapter_config.json: layers_to_transform: cannot be combined with a pattern in `target_modules`"),
    ),
    (
        "layers that are texts",
        say(layers_to_transform=["0"]),
        '  - adapter_config.json: layers_to_transform: is ["0"], not a list of layer numbers',
    ),
    ("one tensor missing", lambda s: s.drop(B0), "  - model.layers.0.self_attn.q_proj.lora_B.weight: is missing"),
    (
        "half of the layers",
        half,
        (
            "  - model.layers.1.self_attn.q_proj.lora_A.weight: is missing\n"
            "  - model.layers.1.self_attn.q_proj.lora_B.weight: is missing\n"
            "  - model.layers.1.self_attn.v_proj.lora_A.weight: is missing\n"
            "  - model.layers.1.self_attn.v_proj.lora_B.weight: is missing"
        ),
    ),
    (
        "one tensor renamed",
        lambda s: s.rename(A0, PREFIX + "0.self_attn.q_porj.lora_A.weight"),
        (
            "  - model.layers.0.self_attn.q_proj.lora_A.weight: is missing\n"
            "      hint: the file has model.layers.0.self_attn.q_porj.lora_A.weight\n"
            "  - model.layers.0.self_attn.q_porj.lora_A.weight: adapts a module that the model does not have"
        ),
    ),
    ("an extra tensor", lambda s: s.add("base_model.model.extra", 2, 2), "  - extra: is not a tensor of this adapter"),
    (
        "a base weight",
        lambda s: s.add("base_model.model.model.embed_tokens.weight", 30, 16),
        ("  - model.embed_tokens.weight: would overwrite a weight of the base, and `modules_to_save` does not list it"),
    ),
    (
        "an adapted base weight",
        lambda s: s.add(PREFIX + "0.self_attn.k_proj.base_layer.weight", 8, 16),
        (
            "  - model.layers.0.self_attn.k_proj.base_layer.weight: would overwrite a weight of the base, "
            "and `modules_to_save` does not list it"
        ),
    ),
    (
        "a module that is no target",
        lambda s: s.add(PREFIX + "0.self_attn.k_proj.lora_A.weight", 4, 16),
        ("  - model.layers.0.self_attn.k_proj.lora_A.weight: adapts a module that the configuration does not name"),
    ),
    (
        "a module that is not there",
        lambda s: s.add(PREFIX + "7.self_attn.q_proj.lora_A.weight", 4, 16),
        "  - model.layers.7.self_attn.q_proj.lora_A.weight: adapts a module that the model does not have",
    ),
    (
        "two adapters' names in keys",
        lambda s: (
            s.rename(A0, PREFIX + A0.replace(".weight", ".default.weight")),
            s.add(PREFIX + A0.replace(".weight", ".other.weight"), 4, 16),
        ),
        (
            "  - the file holds several adapters: default, other\n"
            '      hint: save one of them: model.save_pretrained(folder, selected_adapters=["default"])'
        ),
    ),
    (
        "a magnitude",
        lambda s: s.add(PREFIX + "0.self_attn.q_proj.lora_magnitude_vector", 16),
        (
            "  - model.layers.0.self_attn.q_proj.lora_magnitude_vector: belongs to DoRA, which the "
            "configuration does not name"
        ),
    ),
    (
        "with and without prefix",
        without_prefix_too,
        "  - model.layers.0.self_attn.q_proj.lora_A.weight: is there twice, with and without its prefix",
    ),
    (
        "A transposed",
        transposed,
        (
            "  - model.layers.0.self_attn.q_proj.lora_A.weight: has the shape [16, 4], expected [4, 16]\n"
            "      hint: it is transposed"
        ),
    ),
    (
        "A of one dimension",
        shape(A0, 64),
        "  - model.layers.0.self_attn.q_proj.lora_A.weight: has the shape [64], expected [4, 16]",
    ),
    (
        "ranks of A and B differ",
        shape(B0, 16, 5),
        "  - model.layers.0.self_attn.q_proj.lora_B.weight: has the shape [16, 5], expected [16, 4]",
    ),
    (
        "64-bit floats",
        all_of_type(torch.float64),
        each("is 'F64'; accepted are F32, F16, BF16", "adapter_model.safetensors: base_model.model."),
    ),
    (
        "NaN",
        lambda s: s.value(float("nan")),
        ("  - model.layers.0.self_attn.q_proj.lora_A.weight: 1 of 64 values are NaN or infinite, the first at [1, 2]"),
    ),
    (
        "infinity",
        lambda s: s.value(float("inf"), B0),
        ("  - model.layers.0.self_attn.q_proj.lora_B.weight: 1 of 64 values are NaN or infinite, the first at [1, 2]"),
    ),
    (
        "an absurd value",
        lambda s: s.value(1e30),
        (
            "  - model.layers.0.self_attn.q_proj.lora_A.weight: its largest value is 1e+30; a trained "
            "adapter's stay far below 1,000,000"
        ),
    ),
    (
        "everything at once",
        lambda s: (s.say(r="4", use_dora="yes", lora_ranl=4), s.weights.write_bytes(b"")),
        (
            "  - adapter_config.json: r: is '4'; it takes a whole number from 1 to 65,536\n"
            "  - adapter_config.json: use_dora: is 'yes'; it takes true or false\n"
            "  - adapter_model.safetensors: is empty\n"
            "  - adapter_config.json: lora_ranl: is not a field that lorary knows\n"
            "      hint: did you mean `lora_alpha` or `lora_bias` or `lora_ga_config`?"
        ),
    ),
]


def site(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    return note(lambda r: change(r["sites"][0]))


def flip(s: Spoiled) -> None:
    data = bytearray(s.weights.read_bytes())
    data[-1] ^= 1
    s.weights.write_bytes(bytes(data))


NATIVE: list[tuple[str, Spoil, str]] = [
    (
        "record that is no JSON",
        lambda s: s.record.write_text("{"),
        "  - lorary.json: not JSON: expecting property name enclosed in double quotes (column 2)",
    ),
    ("record that is a list", lambda s: s.record.write_text("[]"), "  - lorary.json: is not a JSON object"),
    (
        "record of a newer version",
        note(lambda r: r.update(format=3, lorary="9.1")),
        "  - lorary.json: has format 3, written by lorary '9.1'; this version reads up to 2\n      hint: update lorary",
    ),
    (
        "record of format true",
        note(lambda r: r.update(format=True)),
        "  - lorary.json: format: is true; this version reads 1 to 2",
    ),
    (
        "record of format 0",
        note(lambda r: r.update(format=0)),
        "  - lorary.json: format: is 0; this version reads 1 to 2",
    ),
    (
        "fields missing and left over",
        note(lambda r: (r.pop("base"), r.update(bse=1))),
        ("  - lorary.json: base: is missing\n  - lorary.json: bse: is not a field of the format"),
    ),
    (
        "base that is a list",
        note(lambda r: r.update(base=[])),
        "  - lorary.json: base: must hold the texts architecture, name, structure, weights",
    ),
    (
        "files that leave the folder",
        note(lambda r: r["files"].update({"../x": {"size": 1, "sha256": ""}})),
        (
            "  - lorary.json: files: must describe adapter_config.json and adapter_model.safetensors, or "
            "one of adapter.safetensors and adapter_model.safetensors"
        ),
    ),
    (
        "a component that does not exist",
        note(lambda r: r["method"]["delta"].update(component="LowRnk")),
        ("  - lorary.json: method: delta: 'LowRnk' is not a known component\n      hint: did you mean `LowRank`?"),
    ),
    (
        "a component with its key of both formats",
        note(lambda r: r["method"]["delta"].update(word="LowRank")),
        "  - lorary.json: method: delta: LowRank has no field `word`\n      hint: known: r",
    ),
    (
        "a site with the names of both formats",
        note(lambda r: (r.update(format=1), r["sites"][0].update(inp=2))),
        '  - lorary.json: sites[0]: is {"name": "model.layers.0.self_attn.q_proj", "kind": "linear", "out_features": '
        '16, "in_features":… (125 characters); a site has the fields bias, in_features, kind, name, out_features',
    ),
    (
        "an axis that does not exist",
        note(lambda r: r["method"].update(dlta=3)),
        ("  - lorary.json: method: dlta: is not an axis of a method\n      hint: did you mean `delta`?"),
    ),
    (
        "a rank of zero in the record",
        note(lambda r: r["method"]["delta"].update(r=0)),
        "  - lorary.json: method: delta: LowRank has r = 0; it takes a whole number of at least 1",
    ),
    ("another rank in the record", note(lambda r: r["method"]["delta"].update(r=2)), other_rank(2)),
    (
        "a rank of a billion in the record",
        site(lambda s: s.update(r=10**9)),
        (
            "  - model.layers.0.self_attn.q_proj.lora_A.weight: has the shape [4, 16], expected [1000000000, "
            "16]\n"
            "  - model.layers.0.self_attn.q_proj.lora_B.weight: has the shape [16, 4], expected [16, "
            "1000000000]"
        ),
    ),
    (
        "a site without a kind",
        site(lambda s: s.pop("kind")),
        (
            '  - lorary.json: sites[0]: is {"name": "model.layers.0.self_attn.q_proj", "out_features": 16, '
            '"in_features": 16, "bias": false… (97 characters); a site has the fields bias, '
            "in_features, kind, name, out_features"
        ),
    ),
    (
        "a site of no kind",
        site(lambda s: s.update(kind="quantum")),
        (
            "  - lorary.json: sites[0]: 'quantum' is not a kind of site; the kinds are linear, transposed, conv1d, "
            "conv2d, conv3d, embedding, experts"
        ),
    ),
    (
        "a site of negative size",
        site(lambda s: s.update(out_features=-16)),
        "  - lorary.json: sites[0]: `out_features` is -16, not a whole number of at least 1",
    ),
    (
        "a site twice",
        note(lambda r: r["sites"].append(r["sites"][0])),
        "  - lorary.json: sites[4]: 'model.layers.0.self_attn.q_proj' is there twice",
    ),
    (
        "a site's alpha is a text",
        site(lambda s: s.update(alpha="6")),
        (
            "  - lorary.json: model.layers.0.self_attn.q_proj: scale: AlphaOverRank has alpha = '6'; it takes a "
            "positive finite number"
        ),
    ),
    (
        "a part outside its site",
        site(lambda s: s.update(parts=[{"name": "q", "start": 10, "size": 10, "step": 0, "count": 1}])),
        "  - lorary.json: sites[0]: the part 'q' does not lie within 16 rows",
    ),
    (
        "a convolution's kernel size on a linear",
        site(lambda s: s.update(kernel_size=[3])),
        "  - lorary.json: sites[0]: the kernel size [3] is not that of a linear",
    ),
    (
        "a site that the file lacks",
        site(lambda s: s.update(name="model.layers.0.self_attn.k_proj")),
        (
            "  - model.layers.0.self_attn.k_proj.lora_A.weight: is missing\n"
            "      hint: the file has model.layers.0.self_attn.q_proj.lora_A.weight\n"
            "  - model.layers.0.self_attn.k_proj.lora_B.weight: is missing\n"
            "      hint: the file has model.layers.0.self_attn.q_proj.lora_B.weight\n"
            "  - model.layers.0.self_attn.q_proj.lora_A.weight: belongs to no site and no parameter of the "
            "record\n"
            "  - model.layers.0.self_attn.q_proj.lora_B.weight: belongs to no site and no parameter of the "
            "record"
        ),
    ),
    (
        "one bit of the weights",
        flip,
        (
            "  - adapter_model.safetensors: is not the file that was saved (SHA-256 differs)\n"
            "      hint: restore it, or save the adapter again; if PEFT wrote it since, remove lorary.json "
            "and the folder is read as PEFT's"
        ),
    ),
    (
        "weights of another adapter",
        lambda s: s.value(0.5),
        (
            "  - adapter_model.safetensors: is not the file that was saved (SHA-256 differs)\n"
            "      hint: restore it, or save the adapter again; if PEFT wrote it since, remove lorary.json "
            "and the folder is read as PEFT's"
        ),
    ),
    (
        "configuration changed afterwards",
        lambda s: s.say(lora_alpha=7),
        (
            "  - adapter_config.json: is not the file that was saved (SHA-256 differs)\n"
            "      hint: restore it, or save the adapter again; if PEFT wrote it since, remove lorary.json "
            "and the folder is read as PEFT's"
        ),
    ),
    (
        "configuration missing",
        lambda s: s.config.unlink(),
        ("  - adapter_config.json: is missing\n      hint: restore it, or save the adapter again"),
    ),
    ("weights missing beside the record", lambda s: s.weights.unlink(), "  - adapter_model.safetensors: is missing"),
]


@pytest.mark.parametrize(("spoil", "message"), [c[1:] for c in PEFT], ids=[c[0] for c in PEFT])
def test_a_bad_peft_adapter_is_refused(spoil: Spoil, message: str, tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter")
    spoil(spoiled)
    assert refusal(spoiled) == message


@pytest.mark.parametrize(("spoil", "message"), [c[1:] for c in NATIVE], ids=[c[0] for c in NATIVE])
def test_a_bad_native_adapter_is_refused(spoil: Spoil, message: str, tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter", native=True)
    spoil(spoiled)
    assert refusal(spoiled) == message
