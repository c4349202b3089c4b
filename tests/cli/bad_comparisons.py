"""Comparisons that are refused: the request, and the whole message."""

# ruff: noqa: E501 (messages stand here as they are printed)

from __future__ import annotations

from typing import NamedTuple

from tests.cli.comparisons import START


class Bad(NamedTuple):
    """A request in a folder that `tests.cli.comparisons.fill` has filled, with `text` as its configuration."""

    name: str
    arguments: tuple[str, ...]
    code: int
    message: str
    text: str = START


# fmt: off
TABLE = (
Bad('no methods', ('c.yaml',), 2, """\
error: cannot compare:
  - compare.methods: there are none
      hint: name at least one method: --methods lora,dora
"""),
Bad('unknown methods, with the nearest names', ('c.yaml', '-m', 'lora,dorra,pisa+rslora'), 2, """\
error: invalid configuration c.yaml:
  - --methods: dorra: `dorra` is not a method that lorary knows
      hint: did you mean `dora` or `lora` or `adalora`?
  - --methods: pisa+rslora: `pisa` is not a method that lorary knows
      hint: did you mean `pissa`?
"""),
Bad('a method that is a function of adapters', ('c.yaml', '-m', 'lora,lorahub'), 2, """\
error: invalid configuration c.yaml:
  - --methods: lorahub: `lorahub` is not a method: it mixes adapters that are trained already
      hint: write `lorary lorahub A B --examples FILE --out DIR`, or call lorary.lorahub
"""),
Bad('a name that may mean two methods', ('c.yaml', '-m', 'lora+dora,dora'), 2, """\
error: invalid configuration c.yaml:
  - --methods: `compare.methods[0]` is 'lora+dora', which may mean lora with dora, or lora+ with dora
      hint: write lora++dora for lora+ with dora; dora alone is lora with dora
"""),
Bad('an empty name', ('c.yaml', '-m', 'lora,,dora'), 2, """\
error: invalid configuration c.yaml:
  - --methods: `compare.methods[1]` is '', which names no method
      hint: such as lora, dora+rslora or wide=lora:r=64
"""),
Bad('no preset', ('c.yaml', '-m', 'wide=,=lora'), 2, """\
error: invalid configuration c.yaml:
  - --methods: `compare.methods[0]` is 'wide=', which names no method
      hint: such as lora, dora+rslora or wide=lora:r=64
  - --methods: `compare.methods[1]` is '=lora', which names no method
      hint: such as lora, dora+rslora or wide=lora:r=64
"""),
Bad('options that are not key=value', ('c.yaml', '-m', 'lora:r,lora:=8,dora'), 2, """\
error: invalid configuration c.yaml:
  - --methods: `compare.methods[0]` is 'lora:r', where 'r' is not key=value
      hint: such as lora:r=8:alpha=16
  - --methods: `compare.methods[1]` is 'lora:=8', where '=8' is not key=value
      hint: such as lora:r=8:alpha=16
"""),
Bad('an option twice', ('c.yaml', '-m', 'lora:r=8:r=16,dora'), 2, """\
error: invalid configuration c.yaml:
  - --methods: `compare.methods[0]` is 'lora:r=8:r=16', where `r` is given twice
      hint: keep one of the two
"""),
Bad('unknown options of methods', ('c.yaml', '-m', 'lora:rr=8,vera:save_projection=false'), 2, """\
error: invalid configuration c.yaml:
  - --methods: lora:rr=8: unknown key `rr` in `method`
      hint: known: after, alpha, alphas, also, drop, dropout, exclude, experts, head, layers, name, options, r, ranks, targets, train_in_full
  - --methods: vera:save_projection=false: unknown key `save_projection` in `method`
      hint: did you mean `save_projections`?
"""),
Bad('options out of range', ('c.yaml', '-m', 'lora:r=0,dora:dropout=2'), 2, """\
error: invalid configuration c.yaml:
  - --methods: lora:r=0: `r` must be at least 1, not 0
  - --methods: dora:dropout=2: `dropout` must be below 1, not 2
"""),
Bad('an option that is not YAML', ('c.yaml', '-m', "'dora:targets=[q_proj,lora'"), 2, """\
error: invalid configuration c.yaml:
  - --methods: `compare.methods[0]` is 'dora:targets=[q_proj', where '[q_proj' is not YAML
      hint: close every bracket and quote
"""),
Bad('methods that contradict themselves', ('c.yaml', '-m', 'vera+melora,pissa+olora,full+lora,lora'), 2, """\
error: invalid configuration c.yaml:
  - --methods: vera+melora: `delta`: vera and melora both choose what is trained: SharedProjectionDelta and BlockDiagonal
      hint: leave one of the two out
  - --methods: pissa+olora: `init`: pissa and olora both choose the initialisation: SVDInit and QRInit
      hint: leave one of the two out
  - --methods: full+lora: `full`: every base weight trains in full, so LowRank would be redundant
      hint: use one of the two
"""),
Bad('an option that a method does not have', ('c.yaml', '-m', 'vera:alpha=16,bitfit:r=8,lora'), 2, """\
error: invalid configuration c.yaml:
  - --methods: vera:alpha=16: `alpha`: vera sets ConstantScale(s=1.0), which has no alpha
      hint: leave it out
  - --methods: bitfit:r=8: `r` is not an option of bitfit
      hint: it is an option of lora, glora, vera, melora, multilora, hira, miss, loha, lokr, adalora, delta-lora, o-lora
"""),
Bad('a single rate', ('c.yaml', '--methods', 'lora,dora', '--rates', '1e-4'), 2, """\
error: invalid configuration c.yaml:
  - --rates: `rates` has 1 learning rate, too few for a search
      hint: list at least 3, such as 1e-4, 3e-4, 1e-3
"""),
Bad('two rates', ('c.yaml', '--methods', 'lora,dora', '--rates', '1e-4,1e-3'), 2, """\
error: invalid configuration c.yaml:
  - --rates: `rates` has 2 learning rates, too few for a search
      hint: list at least 3, such as 1e-4, 3e-4, 1e-3
"""),
Bad('an even number of rates', ('c.yaml', '--methods', 'lora,dora', '--rates', '4'), 2, """\
error: invalid configuration c.yaml:
  - --rates: `rates` must be an odd number from 3 to 99, not 4
      hint: the middle one is the method's own, with as many on each side
"""),
Bad('one rate as a number', ('c.yaml', '--methods', 'lora,dora', '--rates', '1'), 2, """\
error: invalid configuration c.yaml:
  - --rates: `rates` has 1 learning rate, too few for a search
      hint: list at least 3, such as 1e-4, 3e-4, 1e-3
"""),
Bad('negative rates', ('c.yaml', '--methods', 'lora,dora', '--rates', '-1e-4,1e-4,1e-3'), 2, """\
error: invalid configuration c.yaml:
  - --rates: `rates` names '-1e-4', which is not a learning rate
      hint: use numbers above 0 and at most 1
"""),
Bad('rates that do not rise', ('c.yaml', '--methods', 'lora,dora', '--rates', '1e-3,1e-3,1e-2'), 2, """\
error: invalid configuration c.yaml:
  - --rates: `rates` are 0.001, 0.001, 0.01
      hint: let them rise, each once
"""),
Bad('rates that are words', ('c.yaml', '--methods', 'lora,dora', '--rates', 'fast'), 2, """\
error: invalid configuration c.yaml:
  - --rates: `rates` names 'fast', which is not a learning rate
      hint: use numbers above 0 and at most 1
"""),
Bad('a method with fewer rates', ('c.yaml', '-m', 'lora,dora:rates=[1e-4,1e-3]'), 2, """\
error: invalid configuration c.yaml:
  - --methods: `compare.methods[1].rates` has 2 learning rates, too few for a search
      hint: list at least 3, such as 1e-4, 3e-4, 1e-3
"""),
Bad('a method with more rates', ('c.yaml', '-m', 'lora,dora:rates=[1e-5,1e-4,3e-4,1e-3,1e-2]'), 2, """\
error: cannot compare:
  - dora:rates=[1e-5,1e-4,3e-4,1e-3,1e-2]: rates: lists 5 learning rates, and 3 are tried for the other methods
      hint: give every method the same search
"""),
Bad('no seeds', ('c.yaml', '--methods', 'lora,dora', '--seeds', '0'), 2, """\
error: invalid configuration c.yaml:
  - --seeds: `seeds` must be at least 1, not 0
"""),
Bad('seeds and workers that are no numbers', ('c.yaml', '--methods', 'lora,dora', '--seeds', 'two', '--workers', '1.5'), 2, """\
error: invalid configuration c.yaml:
  - --seeds: `seeds` must be a whole number, not the text 'two'
  - --workers: `workers` must be a whole number, not 1.5
"""),
Bad('a budget without a unit', ('c.yaml', '--methods', 'lora,dora', '--budget', '20'), 2, """\
error: invalid configuration c.yaml:
  - --budget: `budget` is 20, which is not a time
      hint: write a number with its unit, such as 90s, 20min or 1.5h
"""),
Bad('a budget that is no time', ('c.yaml', '--methods', 'lora,dora', '--budget', 'soon'), 2, """\
error: invalid configuration c.yaml:
  - --budget: `budget` is 'soon', which is not a time
      hint: write a number with its unit, such as 90s, 20min or 1.5h
"""),
Bad('no time at all', ('c.yaml', '--methods', 'lora,dora', '--budget', '0min'), 2, """\
error: invalid configuration c.yaml:
  - --budget: `budget` is zero
      hint: leave it out, for as long as it takes
"""),
Bad('an unknown view', ('c.yaml', '--methods', 'lora,dora', '--match', 'parameter'), 2, """\
error: invalid configuration c.yaml:
  - --match: `match` must be one of `rank`, `parameters`, not the text 'parameter'
      hint: did you mean `parameters`?
"""),
Bad('no steps', ('c.yaml', '--methods', 'lora,dora', '--steps', '0'), 2, """\
error: invalid configuration c.yaml:
  - --steps: `max_steps` must be at least 1, not 0
"""),
Bad('an unknown key in the section', ('c.yaml', '--methods', 'lora,dora'), 2, """\
error: invalid configuration c.yaml:
  - c.yaml:4:11: unknown key `method` in `compare`
      hint: it belongs at the top level
  - c.yaml:4:25: unknown key `seed` in `compare`
      hint: it belongs under `data:` or it belongs under `training:`
""", START + 'compare: {method: dora, seed: 3}\n'),
Bad('a section that is a number', ('c.yaml',), 2, """\
error: invalid configuration c.yaml:
  - c.yaml:4:1: `compare` must be a list, not 3
""", START + 'compare: 3\n'),
Bad('methods in the file that are none', ('c.yaml',), 2, """\
error: invalid configuration c.yaml:
  - c.yaml:6:7: `compare.methods[0].method` is missing
      hint: for example `method: dora`
  - c.yaml:7:22: unknown key `rate` in `compare.methods[1]`
      hint: did you mean `rates`?
  - c.yaml:8:7: `compare.methods[2]` must be keys and values, not 3
  - c.yaml:9:8: `compare.methods[3].name` is empty
""", START + "compare:\n  methods:\n    - {name: a}\n    - {method: lora, rate: 1}\n    - 3\n    - {name: '', method: lora}\n    - {name: b, method: [lora, 4]}\n"),
Bad('everything at once', ('c.yaml', '-m', 'lora,dorra', '--rates', '1', '--budget', '20', '--seeds', '-1', '--match', 'r'), 2, """\
error: invalid configuration c.yaml:
  - c.yaml:3:12: unknown key `max_step` in `training`
      hint: did you mean `max_steps`?
  - --rates: `rates` has 1 learning rate, too few for a search
      hint: list at least 3, such as 1e-4, 3e-4, 1e-3
  - --seeds: `seeds` must be at least 1, not -1
  - --budget: `budget` is 20, which is not a time
      hint: write a number with its unit, such as 90s, 20min or 1.5h
  - --match: `match` must be one of `rank`, `parameters`, not the text 'r'
  - --methods: dorra: `dorra` is not a method that lorary knows
      hint: did you mean `dora` or `lora` or `adalora`?
""", """\
model: builtin:base
data: {train: rows.jsonl, validation_split: 0.5}
training: {max_step: 4}
"""),
Bad('the same method twice', ('c.yaml', '-m', 'lora,dora,lora'), 2, """\
error: cannot compare:
  - arms: 2 are named 'lora'
      hint: give each a name of its own
"""),
Bad('a name that controls the terminal', ('c.yaml', '-m', '\x1b[2J=lora,dora'), 2, """\
error: cannot compare:
  - arms: '\\x1b[2J' is not a name
      hint: use printable characters, at most 200
"""),
Bad('a reference that is not compared', ('c.yaml', '--methods', 'lora,dora', '--reference', 'loar'), 2, """\
error: cannot compare:
  - reference: there is no arm 'loar'
      hint: did you mean `lora`?
"""),
Bad('no held-out rows, and a task that is not scored', ('c.yaml', '--methods', 'lora,dora'), 2, """\
error: cannot compare:
  - task: is `dpo`, whose loss is not scored row by row
      hint: use sft or classification
  - data.validation: no rows are held out, on which rates are chosen and methods judged
      hint: set data.validation or data.validation_split
""", """\
model: builtin:base
task: dpo
data: rows.jsonl
"""),
Bad('GRPO', ('c.yaml', '--methods', 'lora,dora'), 2, """\
error: cannot compare:
  - task: is `grpo`, whose loss is not scored row by row
      hint: use sft or classification
""", """\
model: builtin:base
task: grpo
data: {train: rows.jsonl, validation_split: 0.5}
training: {reward: 'r.py:f', batch_size: 8}
"""),
Bad('an adapter to go on from', ('c.yaml', '--methods', 'lora,dora'), 2, """\
error: cannot compare:
  - model.adapter: an adapter to go on from brings its method, and there would be nothing to compare
      hint: remove it
""", """\
model: {id: builtin:base, adapter: out}
data: {train: rows.jsonl, validation_split: 0.5}
"""),
Bad('a stream', ('c.yaml', '--methods', 'lora,dora'), 2, """\
error: cannot compare:
  - data.streaming: the runs of a comparison read the same rows again and again
      hint: remove it
""", """\
model: builtin:base
data: {train: rows.jsonl, validation: rows.jsonl, streaming: true, overlong: truncate}
training: {max_steps: 4}
"""),
Bad('options of a method that is not compared', ('c.yaml', '--methods', 'lora,dora'), 2, """\
error: cannot compare:
  - method.train_in_full: has no effect: each method that is compared has its own
      hint: write it into the methods, as {name: lora, method: {name: lora, train_in_full: ...}}
  - method.ranks: has no effect: each method that is compared has its own
      hint: write it into the methods, as {name: lora, method: {name: lora, ranks: ...}}
""", """\
model: builtin:base
method: {train_in_full: norms, ranks: {q_proj: 4}}
data: {train: rows.jsonl, validation_split: 0.5}
training: {max_steps: 4}
"""),
Bad('a budget that is not a number', ('c.yaml', '--methods', 'lora,dora', '--budget', 'nan'), 2, """\
error: invalid configuration c.yaml:
  - --budget: `budget` is 'nan', which is not a time
      hint: write a number with its unit, such as 90s, 20min or 1.5h
"""),
Bad('rates without an end', ('c.yaml', '--methods', 'lora,dora', '--rates', '1e-4,.inf,.nan'), 2, """\
error: invalid configuration c.yaml:
  - --rates: `rates` names '.inf', which is not a learning rate
      hint: use numbers above 0 and at most 1
"""),
Bad('more processes than any machine has', ('c.yaml', '--methods', 'lora,dora', '--workers', '9999'), 2, """\
error: invalid configuration c.yaml:
  - --workers: `workers` must be at most 1,024, not 9999
"""),
Bad('general text for classifiers', ('c.yaml', '--methods', 'lora,dora', '--general', 'builtin:topics'), 2, """\
error: cannot compare:
  - compare.general: has no effect on classifiers, which do not predict text
      hint: remove it
""", """\
model: builtin:base
task: classification
data: {train: rows.jsonl, validation_split: 0.5, labels: [a, b]}
"""),
Bad('biases of a model without any', ('c.yaml', '-m', 'lora,bitfit'), 2, """\
error: cannot compare:
  - bitfit: full: this model has no biases to train (Llama-like models have none)
      hint: use another method
"""),
Bad('layers that are not there', ('c.yaml', '-m', 'lora:targets=q_porj,dora'), 2, """\
error: cannot compare:
  - lora:targets=q_porj: method.targets: `targets`: `q_porj` matches no layer
      hint: did you mean `q_proj` or `v_proj` or `o_proj`? this model's layers:
        model.embed_tokens  Embedding 2048x192
        model.layers.{0-5}.self_attn.q_proj  Linear 192x192  x6
        model.layers.{0-5}.self_attn.k_proj  Linear 96x192  x6
        model.layers.{0-5}.self_attn.v_proj  Linear 96x192  x6
        model.layers.{0-5}.self_attn.o_proj  Linear 192x192  x6
        model.layers.{0-5}.mlp.gate_proj  Linear 576x192  x6
        model.layers.{0-5}.mlp.up_proj  Linear 576x192  x6
        model.layers.{0-5}.mlp.down_proj  Linear 192x576  x6
        lm_head  Linear 2048x192
"""),
Bad('methods that adapt other layers', ('c.yaml', '-m', 'lora,dora:exclude=o_proj'), 2, """\
error: cannot compare:
  - dora:exclude=o_proj: adapts 36 layers, lora 42: model.layers.0.self_attn.o_proj, model.layers.1.self_attn.o_proj, model.layers.2.self_attn.o_proj and 3 more differ
      hint: set method.targets to layers that all can adapt, or give the arm targets of its own
"""),
Bad("a context beyond the method's", ('c.yaml', '-m', 'lora,longlora:length=512'), 2, """\
error: invalid configuration c.yaml:
  - --methods: longlora:length=512: `data.max_length`: rows of up to 1,024 tokens, but the method extends the context to 512
      hint: set method.options: {length: 1024}
"""),
Bad('prompts that leave no room', ('c.yaml', '-m', 'lora,prompt-tuning:tokens=600'), 2, """\
error: cannot compare:
  - prompt-tuning:tokens=600: context: takes 600 positions, and LlamaForCausalLM has 256
      hint: use fewer tokens
"""),
Bad('too few held-out rows', ('c.yaml', '--methods', 'lora,dora'), 3, """\
error: there are too few held-out rows:
  - data.validation: 0 of them can be chosen on, and 1 judged on
      hint: hold out more
""", """\
model: builtin:base
data: {train: rows.jsonl, validation_split: 0.1}
training: {max_steps: 4}
"""),
Bad('no file of rows', ('c.yaml', '--methods', 'lora,dora'), 3, """\
error: cannot read row.jsonl:
  - there is no such file or folder
      hint: did you mean `rows.jsonl`?
""", """\
model: builtin:base
data: {train: row.jsonl, validation_split: 0.5}
training: {max_steps: 4}
"""),
Bad('general text that is not there', ('c.yaml', '--methods', 'lora,dora', '--general', 'builtin:pyton'), 3, """\
error: no built-in data set is called 'builtin:pyton'
  - unknown name
      hint: did you mean `builtin:python` or `builtin:topics` or `builtin:docstrings`?
"""),
Bad('a file in place of the folder', ('c.yaml', '--methods', 'lora,dora', '--out', 'rows.jsonl'), 2, """\
error: cannot compare in 'FOLDER/rows.jsonl':
  - folder: is a file
      hint: name a folder
"""),
Bad('a folder of something else', ('c.yaml', '--methods', 'lora,dora', '--out', 'other'), 2, """\
error: cannot compare in 'FOLDER/other':
  - folder: holds files of something else: notes.txt
      hint: it has no comparison.json; name another folder
"""),
Bad('a folder of another comparison', ('c.yaml', '--methods', 'lora,dora', '--out', 'done', '--seeds', '3'), 2, """\
error: the folder holds another comparison:
  - settings.seeds: 2 in the folder, 3 here
      hint: repeat the request that it was begun with, pass overwrite, or name another folder
"""),
Bad('a damaged record', ('c.yaml', '--methods', 'lora,dora', '--out', 'damaged'), 4, """\
error: cannot read the comparison 'FOLDER/damaged/comparison.json':
  - comparison.json: not JSON: expecting property name enclosed in double quotes (column 2)
"""),
Bad('nothing to go on with', ('c.yaml', '--methods', 'lora,dora', '--resume'), 2, """\
error: cannot compare:
  - --resume: there is no comparison in 'comparison' to go on with
      hint: leave it out to begin one
"""),
Bad('switches that exclude each other', ('c.yaml', '--methods', 'lora,dora', '--resume', '--overwrite', '--dry-run'), 2, """\
error: cannot compare:
  - --resume: goes on with what is in the folder, and --overwrite removes it
      hint: keep one of the two
  - --resume: runs, and --dry-run does not
      hint: keep one of the two
  - --resume: there is no comparison in 'comparison' to go on with
      hint: leave it out to begin one
"""),
Bad('no configuration', ('d.yaml', '--methods', 'lora,dora'), 2, """\
error: cannot compare:
  - d.yaml: is neither a configuration nor the folder of a comparison
      hint: name a YAML file, such as `lorary init` writes, or a folder that this command has written
"""),
Bad('the record in place of its folder', ('done/comparison.json',), 2, """\
error: cannot compare:
  - done/comparison.json: is the record of a comparison
      hint: name its folder, done
"""),
Bad('a folder without a comparison', ('other',), 4, """\
error: cannot read the comparison 'other/comparison.json':
  - comparison.json: is missing
"""),
Bad('options beside a folder', ('done', '--methods', 'lora,dora', '--seeds', '3', '--budget', '1h', '--out', 'x'), 2, """\
error: cannot compare:
  - --methods: has no effect on a comparison that is only shown
      hint: remove it, or name a configuration
  - --seeds: has no effect on a comparison that is only shown
      hint: remove it, or name a configuration
  - --budget: has no effect on a comparison that is only shown
      hint: add --resume
  - --out: has no effect on a comparison that is only shown
      hint: remove it, or name a configuration
"""),
Bad('options beside a folder that goes on', ('done', '--resume', '--methods', 'lora,dora', '--set', 'training.lr=1'), 2, """\
error: cannot compare:
  - --methods: has no effect on a comparison that goes on
      hint: remove it, or name a configuration
  - --set: has no effect on a comparison that goes on
      hint: remove it, or name a configuration
"""),
Bad('a budget of a folder that goes on', ('done', '--resume', '--budget', '20', '--workers', 'many'), 2, """\
error: invalid configuration:
  - --budget: `budget` is 20, which is not a time
      hint: write a number with its unit, such as 90s, 20min or 1.5h
  - --workers: `workers` must be a whole number, not the text 'many'
"""),
Bad('a reference of a folder that is not compared', ('done', '--reference', 'lroa'), 3, """\
error: cannot compare:
  - reference: there is no method 'lroa'
      hint: did you mean `lora`?
"""),
Bad('not a request that can go on', ('strange', '--resume'), 4, """\
error: cannot go on with the comparison in 'strange':
  - settings.request: does not say how the comparison was begun
      hint: compare again
"""),
)
