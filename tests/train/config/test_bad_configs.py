"""Invalid configurations: the full message for each mistake, and nothing written."""

# ruff: noqa: E501 (messages stand here as they are printed)

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from lorary.errors import ConfigError
from lorary.train.config.load import load


class Bad(NamedTuple):
    name: str
    text: str
    message: str
    sets: tuple[str, ...] = ()


# fmt: off
TABLE = (
Bad('sources with mistakes', """\
model: builtin:base
data:
  train:
    - {path: a.jsonl, weight: two, limt: 3, type: alpaca, limit: 0}
    - 3
    - {weight: 0}
    - {path: b.jsonl, format: chat, columns: [x]}
""", """\
invalid configuration train.yaml:
  - train.yaml:4:23: `data.train[0].weight` must be a number, not the text 'two'
  - train.yaml:4:36: unknown key `limt` in `data.train[0]`
      hint: did you mean `limit` or `split`?
  - train.yaml:4:45: unknown key `type` in `data.train[0]`
      hint: write `format`
  - train.yaml:4:59: `data.train[0].limit` must be at least 1, not 0
  - train.yaml:5:7: `data.train[1]` must be a text, not 3
  - train.yaml:6:7: `data.train[2].path` is missing
      hint: for example `path: rows.jsonl`
  - train.yaml:6:8: `data.train[2].weight` must be above 0, not 0
  - train.yaml:7:23: `data.train[3].format` must be one of `auto`, `text`, `prompt-completion`, `messages`, `alpaca`, `sharegpt`, `preference`, `prompt-completion-label`, `prompt`, `classification`, not the text 'chat'
  - train.yaml:7:37: `data.train[3].columns` must be keys and values, not a list"""),
Bad('sources that contradict the rest', """\
model: builtin:base
data:
  train: [{path: "a#b", split: c}, {path: d.jsonl, format: preference}]
  validation: {path: e.jsonl, weight: 2}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:3: `data.train`: `a#b` and `split: c` both name a split
      hint: keep one of the two
  - train.yaml:3:3: `data.train`: `d.jsonl`: task `sft` does not train on preference pairs
      hint: set task: dpo or reward, or map the answer with data.columns
  - train.yaml:4:3: `data.validation`: the weight 2 of `e.jsonl` has no effect on held-out rows
      hint: remove it, or set limit"""),
Bad('pairs among the sources of DPO', """\
model: builtin:base
task: dpo
data:
  train: {path: d.jsonl, format: text}
""", """\
invalid configuration train.yaml:
  - train.yaml:4:3: `data.train`: `d.jsonl`: task `dpo` trains on preference pairs, not `text`
      hint: use `preference` or task: sft"""),
Bad('an unknown word for special tokens', """\
model: builtin:base
data: {train: a.jsonl, special_tokens: escap, separator: ""}
""", """\
invalid configuration train.yaml:
  - train.yaml:2:24: `special_tokens` must be one of `keep`, `escape`, `refuse`, not the text 'escap'
      hint: did you mean `escape`?
  - train.yaml:2:47: `separator` is empty"""),
Bad('a mistyped key', """\
model: builtin:base
data: builtin:docstrings
method:
  r: 8
  alhpa: 16
""", """\
invalid configuration train.yaml:
  - train.yaml:5:3: unknown key `alhpa` in `method`
      hint: did you mean `alpha` or `alphas`?"""),
Bad('bf16 where the weights are in another half precision', """\
model: {id: builtin:base, dtype: float16}
data: builtin:docstrings
training: {bf16: true}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:12: `training.bf16`: weights in float16 compute in float16
      hint: keep one of the two"""),
Bad('bf16 twice', """\
model: {id: builtin:base, dtype: bfloat16}
data: builtin:docstrings
training: {bf16: true}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:12: `training.bf16`: has no effect: weights in bfloat16 compute in bfloat16
      hint: remove it"""),
Bad('keeping the best without held-out data', """\
model: builtin:base
data: builtin:docstrings
training: {keep_best: true}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:12: `training.keep_best`: has no effect without held-out data
      hint: set data.validation or data.validation_split"""),
Bad('keeping the best between two evaluations', """\
model: builtin:base
data: {train: builtin:docstrings, validation_split: 0.1}
training: {keep_best: true, eval_steps: 2, save_steps: 3}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:44: `training.save_steps`: 3 is not a multiple of eval_steps (2), so checkpoints would miss evaluations
      hint: leave save_steps empty: it follows eval_steps"""),
Bad('keeping the best twice', """\
model: builtin:base
data: {train: builtin:docstrings, validation_split: 0.1}
training: {keep_best: true, early_stopping_patience: 2}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:12: `training.keep_best`: has no effect beside `early_stopping_patience`, which keeps the best
      hint: remove it"""),
Bad('earlier tasks for a method that cannot continue from them', """\
model: builtin:base
data: builtin:docstrings
method: {name: lora, after: runs/first/adapter}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:22: `method.after`: `lora` cannot continue from earlier tasks
      hint: set method.name: o-lora"""),
Bad('an unknown key', """\
model: builtin:base
data: builtin:docstrings
training:
  zzz: 1
""", """\
invalid configuration train.yaml:
  - train.yaml:4:3: unknown key `zzz` in `training`
      hint: known: adam_beta1, adam_beta2, adam_epsilon, batch_size, bf16, data_seed, dpo_beta, early_stopping_patience, epochs, eval_batch_size, eval_steps, gradient_accumulation_steps, gradient_checkpointing, grpo_beta, keep_best, kto_beta, label_smoothing, logging_steps, lr, max_completion_length, max_grad_norm, max_steps, neftune_noise_alpha, num_generations, optimizer, optimizer_options, reference, report_to, reward, save_steps, save_total_limit, schedule, schedule_options, seed, torch_compile, warmup, weight_decay"""),
Bad('a mistyped key of another section', """\
model: builtin:base
data: builtin:docstrings
training:
  ranl: 16
""", """\
invalid configuration train.yaml:
  - train.yaml:4:3: unknown key `ranl` in `training`
      hint: did you mean `r`, under `method:`?"""),
Bad('a right key in a wrong section', """\
model: builtin:base
data: builtin:docstrings
method:
  batch_size: 4
""", """\
invalid configuration train.yaml:
  - train.yaml:4:3: unknown key `batch_size` in `method`
      hint: it belongs under `training:`"""),
Bad("a section's key at the top", """\
model: builtin:base
data: builtin:docstrings
lr: 1e-4
""", """\
invalid configuration train.yaml:
  - train.yaml:3:1: unknown key `lr`
      hint: it belongs under `training:`"""),
Bad("another tool's name in a wrong section", """\
model: builtin:base
data: builtin:docstrings
method:
  learning_rate: 1e-4
""", """\
invalid configuration train.yaml:
  - train.yaml:4:3: unknown key `learning_rate` in `method`
      hint: it belongs under `training:`, as `lr`"""),
Bad('a mistyped section', """\
model: builtin:base
data: builtin:docstrings
trainin:
  lr: 1e-4
""", """\
invalid configuration train.yaml:
  - train.yaml:3:1: unknown key `trainin`
      hint: did you mean `training`?"""),
Bad('a duplicate key', """\
model: builtin:base
data: builtin:docstrings
training:
  lr: 1e-4
  seed: 1
  lr: 2e-4
""", """\
cannot read train.yaml:
  - train.yaml:6:3: `lr` is given twice; the first is at 4:3
      hint: keep one of them"""),
Bad('a Python object', """\
model: builtin:base
data: builtin:docstrings
output: !!python/object/apply:os.system [ls]
""", """\
cannot read train.yaml:
  - train.yaml:3:9: the tag `tag:yaml.org,2002:python/object/apply:os.system`
      hint: a configuration holds plain values only"""),
Bad('a billion laughs', """\
a: &a [x,x,x,x,x,x,x,x,x,x]
b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]
c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]
d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]
e: [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]
""", """\
cannot read train.yaml:
  - train.yaml:5:5: more than 20,000 values"""),
Bad('a value that holds itself', """\
model: &m
  id: *m
""", """\
cannot read train.yaml:
  - train.yaml:2:7: `*m` contains itself"""),
Bad('a tab', 'model:\n\tid: builtin:base\n', """\
cannot read train.yaml:
  - train.yaml:2:1: a tab
      hint: YAML indents with spaces"""),
Bad('nesting', """\
a: [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[
""", """\
cannot read train.yaml:
  - train.yaml:1:23: nested deeper than 20 levels"""),
Bad('two documents', """\
model: builtin:base
data: builtin:docstrings
---
model: builtin:base
data: builtin:docstrings
""", """\
cannot read train.yaml:
  - train.yaml:3:1: a second document
      hint: keep one configuration per file"""),
Bad('a merge key', """\
x: &x {id: a}
model:
  <<: *x
""", """\
cannot read train.yaml:
  - train.yaml:3:3: a merge key `<<`
      hint: write the keys out"""),
Bad('unclosed', """\
model: [builtin:base
""", """\
cannot read train.yaml:
  - train.yaml:2:1: this is not YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'
      hint: close every bracket, and quote text that contains `: `, `#`, `*`, `%` or `@`"""),
Bad('a bare colon', """\
model: builtin: base
""", """\
cannot read train.yaml:
  - train.yaml:1:15: this is not YAML: mapping values are not allowed here
      hint: close every bracket, and quote text that contains `: `, `#`, `*`, `%` or `@`"""),
Bad('a list', """\
- model: builtin:base
""", """\
invalid configuration train.yaml:
  - train.yaml:1:1: it holds a list, not keys and values
      hint: `lorary init` writes one to start from"""),
Bad('nothing', '', """\
invalid configuration train.yaml:
  - it is empty
      hint: `lorary init` writes one to start from"""),
Bad('a text', """\
train
""", """\
invalid configuration train.yaml:
  - train.yaml:1:1: it holds the text 'train', not keys and values
      hint: `lorary init` writes one to start from"""),
Bad('nothing but a method', """\
method: lora
""", """\
invalid configuration train.yaml:
  - train.yaml:1:1: `model` is missing
      hint: for example `model: builtin:base`
  - train.yaml:1:1: `data` is missing
      hint: for example `data: builtin:docstrings`"""),
Bad('rates and counts out of range', """\
model: builtin:base
data: builtin:docstrings
training:
  lr: 10
  epochs: 0
  batch_size: 0
  save_steps: 0
  warmup: -1
  weight_decay: .inf
  seed: 4294967296
""", """\
invalid configuration train.yaml:
  - train.yaml:4:3: `lr` must be at most 1, not 10
  - train.yaml:5:3: `epochs` must be above 0, not 0
  - train.yaml:6:3: `batch_size` must be at least 1, not 0
  - train.yaml:7:3: `save_steps` must be at least 1, not 0
  - train.yaml:8:3: `warmup` must be at least 0, not -1
  - train.yaml:9:3: `weight_decay` must be a finite number, not inf
  - train.yaml:10:3: `seed` must be at most 4,294,967,295, not 4294967296"""),
Bad('switches that are not booleans', """\
model: builtin:base
data: builtin:docstrings
x: {train: a.jsonl, packing: maybe}
training: {gradient_checkpointing: 2}
use_rslora: please
""", """\
invalid configuration train.yaml:
  - train.yaml:3:1: unknown key `x`
      hint: known: compare, data, method, model, output, task, training
  - train.yaml:4:12: `gradient_checkpointing` must be true or false, not 2
  - train.yaml:5:1: `use_rslora` must be true or false, not the text 'please'"""),
Bad('unknown choices', """\
model: builtin:base
data: builtin:docstrings
task: ppo
training: {schedule: cosin, optimizer: adam, report_to: [tensorbord, none]}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:1: `task` must be one of `sft`, `dpo`, `kto`, `grpo`, `reward`, `classification`, not the text 'ppo'
      hint: did you mean `dpo`?
  - train.yaml:4:12: `schedule` is 'cosin', which is not a name that Transformers knows
      hint: did you mean `cosine`?
  - train.yaml:4:29: `optimizer` is 'adam', which is not a name that Transformers knows
      hint: did you mean `adamw_torch`?
  - train.yaml:4:58: `training.report_to[0]` must be one of `none`, `tensorboard`, `wandb`, `trackio`, not the text 'tensorbord'
      hint: did you mean `tensorboard`?"""),
Bad('an unknown method', """\
model: builtin:base
data: builtin:docstrings
method: lora,rslorra
""", """\
invalid configuration train.yaml:
  - train.yaml:3:1: `rslorra` is not a method that lorary knows
      hint: did you mean `rslora` or `lora` or `qlora`?"""),
Bad('an option of another method', """\
model: builtin:base
data: builtin:docstrings
method: {name: rslora, ratio: 4}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:24: `ratio` is not an option of lora + rslora
      hint: it is an option of lora+, delta-lora"""),
Bad('options that are not a mapping', """\
model: builtin:base
data: builtin:docstrings
method: {name: lora+, options: lora, ratio: 4}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:23: `options` must be keys and values, not the text 'lora'"""),
Bad('a rank for a method without one', """\
model: builtin:base
data: builtin:docstrings
method: {name: bitfit, r: 8}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:24: `r` is not an option of bitfit
      hint: it is an option of lora, glora, vera, melora, multilora, hira, miss, loha, lokr, adalora, delta-lora, o-lora"""),
Bad('methods that contradict', """\
model: builtin:base
data: builtin:docstrings
method: [lora+, lora-fa]
""", """\
invalid configuration train.yaml:
  - train.yaml:3:1: `lr`: a learning-rate ratio has no effect: {B} is the only trained tensor
      hint: set the learning rate itself, without a multiplier"""),
Bad('two names of one key', """\
model: builtin:base
data: builtin:docstrings
training:
  lr: 1e-4
learning_rate: 2e-4
""", """\
invalid configuration train.yaml:
  - train.yaml:5:1: `learning_rate` and `lr` (train.yaml:4:3) both set `training.lr`
      hint: keep one of the two"""),
Bad('a switch and a share', """\
model: builtin:base
data: builtin:docstrings
train_on_inputs: 1
warmup_ratio: 3
""", """\
invalid configuration train.yaml:
  - train.yaml:3:1: `train_on_inputs` must be true or false, not 1
  - train.yaml:4:1: `warmup_ratio` is a share of the steps and must be below 1, not 3"""),
Bad('a secret', """\
model: builtin:base
data: builtin:docstrings
hf_token: hf_abc
""", """\
invalid configuration train.yaml:
  - train.yaml:3:1: unknown key `hf_token`
      hint: keep secrets out of files; set HF_TOKEN instead"""),
Bad("PEFT's regular expressions", """\
model: builtin:base
data: builtin:docstrings
method:
  rank_pattern: {'(.*q_proj': 8}
  modules_to_save: [lm_head]
""", """\
invalid configuration train.yaml:
  - train.yaml:4:3: `method.ranks['re:(.*q_proj']` is not a regular expression: missing ), unterminated subpattern at position 0"""),
Bad('no held-out data to stop on', """\
model: builtin:base
data: builtin:docstrings
training: {early_stopping_patience: 3, eval_steps: 5}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:12: `training.early_stopping_patience`: has no effect without held-out data
      hint: set data.validation or data.validation_split
  - train.yaml:3:40: `training.eval_steps`: has no effect without held-out data
      hint: set data.validation or data.validation_split"""),
Bad('two ends and a late warmup', """\
model: builtin:base
data: builtin:docstrings
training: {epochs: 1, max_steps: 10, warmup: 20}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:12: `training.epochs`: `epochs` and `max_steps` both set the length
      hint: keep one of the two
  - train.yaml:3:38: `training.warmup`: 20 warmup steps, but the run ends after 10
      hint: a value below 1 is a share of the steps"""),
Bad('half a step', """\
model: builtin:base
data: builtin:docstrings
training: {warmup: 2.5}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:12: `training.warmup`: a value of 1 or more is a number of steps, and 2.5 is not a whole number
      hint: 0.03 is three percent of the steps"""),
Bad('checkpoints between evaluations', """\
model: builtin:base
data: {train: a.jsonl, validation: b.jsonl}
training: {early_stopping_patience: 2, eval_steps: 4, save_steps: 6}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:55: `training.save_steps`: 6 is not a multiple of eval_steps (4), so checkpoints would miss evaluations
      hint: leave save_steps empty: it follows eval_steps"""),
Bad("SFT's options in DPO", """\
model: builtin:base
data: {train: a.jsonl, packing: true, loss: all, format: text}
task: dpo
""", """\
invalid configuration train.yaml:
  - train.yaml:2:24: `data.packing`: preference pairs are not packed
      hint: remove it, or set task: sft
  - train.yaml:2:39: `data.loss`: has no effect when task is `dpo`: the loss compares the answers
      hint: remove it
  - train.yaml:2:50: `data.format`: task `dpo` trains on preference pairs, not `text`
      hint: use `preference` or task: sft"""),
Bad("DPO's options in SFT", """\
model: builtin:base
data: {train: a.jsonl, format: preference}
training: {dpo_beta: 0.1}
""", """\
invalid configuration train.yaml:
  - train.yaml:2:24: `data.format`: task `sft` does not train on preference pairs
      hint: set task: dpo or reward, or map the answer with data.columns
  - train.yaml:3:12: `training.dpo_beta`: has no effect when task is `sft`
      hint: remove it, or set task: dpo"""),
Bad("fields of other tasks", """\
model: builtin:base
task: kto
data: {train: a.jsonl, labels: [a, b], format: classification}
training: {batch_size: 1, reward: "r.py:f", dpo_beta: 0.1}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:24: `data.labels`: has no effect when task is `kto`
      hint: remove it, or set task: classification
  - train.yaml:3:40: `data.format`: task `kto` trains on answers with a label, not `classification`
      hint: use `prompt-completion-label` or task: classification
  - train.yaml:4:12: `training.batch_size`: KTO compares the answers of a batch, and a batch of one has nothing to compare
      hint: use 2 or more; gradient_accumulation_steps may be 1
  - train.yaml:4:27: `training.reward`: has no effect when task is `kto`
      hint: remove it, or set task: grpo
  - train.yaml:4:45: `training.dpo_beta`: has no effect when task is `kto`
      hint: remove it, or set task: dpo"""),
Bad("groups of answers", """\
model: builtin:base
task: grpo
data: {train: a.jsonl, packing: true, loss: all, overlong: truncate}
training: {num_generations: 5, eval_batch_size: 4}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:24: `data.packing`: prompts are not packed
      hint: remove it, or set task: sft
  - train.yaml:3:39: `data.loss`: has no effect when task is `grpo`: the answers are sampled
      hint: remove it
  - train.yaml:3:50: `data.overlong`: prompts cannot be cut: their end is the question
      hint: use drop or error
  - train.yaml:4:1: `training.reward`: task `grpo` needs a reward function
      hint: write one in a file and name it: rewards.py:function
  - train.yaml:4:12: `training.num_generations`: a step has 4 x 4 = 16 answers, in groups of 5
      hint: make batch_size a multiple of num_generations
  - train.yaml:4:32: `training.eval_batch_size`: 4 is not a multiple of num_generations (5)
      hint: use 5"""),
Bad('two ways to hold out', """\
model: builtin:base
data: {train: a.jsonl, validation: b.jsonl, validation_split: 0.1}
""", """\
invalid configuration train.yaml:
  - train.yaml:2:45: `data.validation_split`: has no effect beside `data.validation`
      hint: keep one of the two"""),
Bad('a seed of no draw', """\
model: builtin:base
data: {train: a.jsonl, validation: b.jsonl, seed: 7}
""", """\
invalid configuration train.yaml:
  - train.yaml:2:45: `data.seed`: has no effect: no rows are drawn, neither by `validation_split` nor by a weight
      hint: remove it"""),
Bad('the root as output', """\
model: builtin:base
data: builtin:docstrings
output: /
""", """\
invalid configuration train.yaml:
  - train.yaml:3:1: `output`: `/` is the root, home or working folder
      hint: name a folder of its own, such as runs/first"""),
Bad("the data's folder as output", """\
model: builtin:base
data: {train: here/rows.jsonl}
output: here
""", """\
invalid configuration train.yaml:
  - train.yaml:3:1: `output`: `here` contains the training data (`here/rows.jsonl`)
      hint: name another folder"""),
Bad('ranks that are not numbers', """\
model: builtin:base
data: builtin:docstrings
method: {ranks: {'*.q_proj': 0, '*.k_proj': many}, targets: [q_proj, 3]}
""", """\
invalid configuration train.yaml:
  - train.yaml:3:18: `method.ranks['*.q_proj']` must be at least 1, not 0
  - train.yaml:3:33: `method.ranks['*.k_proj']` must be a whole number, not the text 'many'
  - train.yaml:3:70: `method.targets[1]` must be a text, not 3"""),
Bad('a section that is a list', """\
model: builtin:base
data: builtin:docstrings
training: [lr]
""", """\
invalid configuration train.yaml:
  - train.yaml:3:1: `training` must hold keys and values, not a list"""),
Bad('overrides without a value', """\
model: builtin:base
data: builtin:docstrings
""", """\
cannot read the overrides:
  - --set training.lr: is not key=value
      hint: write --set section.key=value, such as --set training.lr=1e-4
  - --set =3: is not key=value
      hint: write --set section.key=value, such as --set training.lr=1e-4
  - --set a..b=1: is not key=value
      hint: write --set section.key=value, such as --set training.lr=1e-4""", ('training.lr', '=3', 'a..b=1')),
Bad('bad overrides', """\
model: builtin:base
data: builtin:docstrings
method: {r: 8}
""", """\
cannot read the overrides:
  - --set data.train: this is not YAML: while parsing a flow node expected the node content, but found '<stream end>'
      hint: close every bracket, and quote text that contains `: `, `#`, `*`, `%` or `@`""", ('method.r=0', 'training.sed=1', 'data.train=[', 'lr=3')),
Bad('more bad overrides', """\
model: builtin:base
data: builtin:docstrings
method: {r: 8}
""", """\
invalid configuration train.yaml:
  - --set training.sed: unknown key `sed` in `training`
      hint: did you mean `seed`?
  - --set lr: unknown key `lr`
      hint: it belongs under `training:`
  - --set method.r: `r` must be at least 1, not 0""", ('method.r=0', 'training.sed=1', 'lr=3')),
Bad('a control character', "model: builtin:base\ndata: builtin:docstrings\noutput: 'a\x07b'\n", """\
cannot read train.yaml:
  - train.yaml:3: the character U+0007 is not allowed"""),
)
# fmt: on


def refused(sets: tuple[str, ...] = ()) -> str:
    """The message for train.yaml in the working folder."""
    with pytest.raises(ConfigError) as error:
        load("train.yaml", sets)
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_every_mistake_is_explained_at_its_place(bad: Bad, tmp_path: Path) -> None:
    Path("here").mkdir()
    for file in ("here/rows.jsonl", "a.jsonl", "b.jsonl"):
        Path(file).write_text("{}\n")
    Path("train.yaml").write_text(bad.text)
    before = sorted(tmp_path.rglob("*"))
    assert refused(bad.sets) == bad.message
    assert sorted(tmp_path.rglob("*")) == before


VALUES = [  # third line of the file, position of the value, message
    ("method: {r: 0}", "3:10", "`r` must be at least 1, not 0"),
    ("method: {r: -1}", "3:10", "`r` must be at least 1, not -1"),
    ("method: {r: 1000000000}", "3:10", "`r` must be at most 65,536, not 1000000000"),
    ("method: {r: '4'}", "3:10", "`r` must be a whole number, not the text '4'"),
    ("method: {r: 4.5}", "3:10", "`r` must be a whole number, not 4.5"),
    ("method: {r: true}", "3:10", "`r` must be a whole number, not true"),
    ("method: {r: 010}", "3:10", "`r` must be a whole number, not the text '010'"),
    ("method: {alpha: 0}", "3:10", "`alpha` must be above 0, not 0"),
    ("method: {alpha: -2}", "3:10", "`alpha` must be above 0, not -2"),
    ("method: {alpha: .nan}", "3:10", "`alpha` must be a finite number, not nan"),
    ("method: {alpha: 1e308}", "3:10", "`alpha` must be at most 1,000,000, not 1e+308"),
    ("method: {alpha: high}", "3:10", "`alpha` must be a number, not the text 'high'"),
    ("training: {lr: 0}", "3:12", "`lr` must be above 0, not 0"),
]


@pytest.mark.parametrize(("line", "position", "message"), VALUES)
def test_invalid_values_are_explained(line: str, position: str, message: str) -> None:
    Path("train.yaml").write_text(f"model: builtin:base\ndata: builtin:docstrings\n{line}\n")
    assert refused() == f"invalid configuration train.yaml:\n  - train.yaml:{position}: {message}"


FILES = {
    "no such file": (None, "cannot read the configuration train.yaml: No such file or directory"),
    "bytes": (
        b"model: x\noutput: \xff\n",
        "train.yaml is not text:\n  - train.yaml:2: byte 0xff is not UTF-8\n      hint: save it as UTF-8",
    ),
    "a megabyte and more": (
        b"#" * 1_000_001,
        "cannot read the configuration train.yaml: it is larger than 1,000,000 bytes",
    ),
    "a NUL": (b"model: \0", "cannot read train.yaml:\n  - train.yaml:1: the character U+0000 is not allowed"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_without_text_are_refused(name: str) -> None:
    data, message = FILES[name]
    if data is not None:
        Path("train.yaml").write_bytes(data)
    assert refused() == message


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe, which would block", "a folder"])
def test_only_regular_files_are_opened(make: Callable[[str], None]) -> None:
    make("train.yaml")
    assert refused() == "cannot read the configuration train.yaml: it is not a regular file"
