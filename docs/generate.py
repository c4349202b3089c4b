"""Writes the reference pages that the code knows best: `python docs/generate.py` (a part of `make docs`).

The configuration's page is made from the models in `lorary.train.config.config`, the commands' from the command line
itself, the head of every method's page from its preset, and the combinations from their table, so that none can
disagree with the code; a test fails if a committed page is out of date.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from compared_page import compared_page, stored
from compared_page import picture as compared_picture
from method_picture import EXAMPLE, method_svg
from numbers_page import numbers_page
from pydantic import BaseModel
from serving_page import serving_page

import lorary
from lorary.cli import COMMANDS, app
from lorary.cli.method_page import cell, method_page, paper, stem, value
from lorary.methods.compatibility import verdict
from lorary.spec.interfaces import Sequential
from lorary.spec.presets import FUNCTIONS
from lorary.train.config.config import Config
from lorary.train.config.sources import Source

HERE = Path(__file__).resolve().parent

CONFIG_HEAD = """# Configuration

One YAML file is one training run. `lorary init` writes it with every key, default and sentence below as comments;
`lorary init --schema` prints its JSON schema, for editors. It is strict: an unknown key, an equal key, a value of the
wrong type or out of range, and two keys that contradict each other are errors, each with line and column. They are
reported together; contradictions follow once each key is valid by itself.

On the command line any key can be set over the file: `--set method.r=8 --set training.lr=1e-4`. PEFT's and TRL's
familiar names (`lora_alpha`, `target_modules`, `learning_rate`, ...) are understood, and the resolved configuration
says what became of them.

The least that a file must say:

```yaml
model: builtin:base
data: builtin:docstrings
```
"""

CLI_HEAD = """# Commands

`lorary COMMAND --help` says what stands here. Results go to standard output, everything else to standard error; exit
codes are on [their own page](errors.md). `--debug`, anywhere, adds the traceback of an error.
"""


def config_page() -> str:
    """The page of the configuration."""
    parts, top = [CONFIG_HEAD], []
    for name, info in Config.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            rows = [_row(key, field) for key, field in section.model_fields.items()]
            about = (inspect.getdoc(section) or "").partition("\n")[0]
            parts.append(
                f"\n## `{name}`\n\n{about}\n\n| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"
            )
        else:
            top.append(_row(name, info))
    rows = [_row(key, field) for key, field in Source.model_fields.items()]
    about = "Each item of `data.train` and `data.validation` is a path, or these keys. What is empty is as in `data`."
    parts.append(f"\n## One source\n\n{about}\n\n| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    parts.insert(1, "\n## At the top\n\n| key | default | meaning |\n|---|---|---|\n" + "\n".join(top) + "\n")
    return "".join(parts)


def _row(key: str, field: Any) -> str:
    if field.is_required():
        default = "required"
    elif field.default in (None, ""):
        default = ""
    else:
        default = f"`{value(field.default)}`"
    return f"| `{key}` | {default} | {cell(field.description or '')} |"


def cli_page() -> str:
    """The page of the commands, in the order in which `lorary` knows them."""
    program = typer.main.get_command(app())
    commands: dict[str, Any] = program.commands  # type: ignore[attr-defined]
    return CLI_HEAD + "".join(_command(name, commands[name]) for name in COMMANDS if name in commands)


def _command(name: str, command: Any) -> str:
    if hasattr(command, "commands"):  # it has commands of its own, and does nothing without one
        return "".join(_command(f"{name} {below}", each) for below, each in command.commands.items())
    shown = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    options = [p for p in shown if p.param_type_name == "option"]
    words = " ".join((p.name if p.required else f"[{p.name}]").upper() for p in arguments)
    usage = " ".join(filter(None, ["lorary", name, words, "[OPTIONS]" if options else ""]))
    rows = [f"| `{p.name.upper()}` | {cell(_help(p))} |" for p in arguments]
    rows += [f"| {', '.join(f'`{flag}`' for flag in p.opts)} | {cell(_help(p))} |" for p in options]
    table = "\n| argument or option | meaning |\n|---|---|\n" + "\n".join(rows) + "\n" if rows else ""
    return f"\n## `lorary {name}`\n\n```text\n{usage}\n```\n\n{inspect.cleandoc(command.help or '')}\n{table}"


def _help(parameter: Any) -> str:
    text = (getattr(parameter, "help", "") or "").strip()
    default = parameter.default
    if parameter.required:
        return f"{text} Required."
    if default in (None, False, ()) or callable(default):
        return text
    return f"{text} Default: `{default}`."


# Below this line a method's page is written by hand; above it, here.
BY_HAND = "<!-- By hand from here on; what stands above is written by docs/generate.py. -->"


def written_page(name: str) -> str:
    """A method's page: the head from its preset, and below it the text written by hand."""
    file = HERE / "methods" / f"{stem(name)}.md"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    _, known, body = text.partition(BY_HAND)
    head = method_page(name, f"pictures/{stem(name)}.svg")
    return f"{head}\n{BY_HAND}" + (body if known else f"\n\n{text}")


def picture(name: str) -> str:
    """A method's picture; where tasks come one after another, that of the third."""
    preset = lorary.presets()[name]
    method, title = lorary.method(name, **preset.example), preset.title
    if not isinstance(method.delta, Sequential):
        return method_svg(method, title)
    before = (torch.zeros(EXAMPLE.out_features, method.delta.r), torch.zeros(method.delta.r, EXAMPLE.in_features))
    delta, _ = method.delta.after([before, before], 1.0)
    return method_svg(method.replace(delta=delta), f"{title}: the third task")


COMBINATIONS_HEAD = """# Combinations

Presets combine by union: each sets the components of some axes and leaves the others alone. **Y**: they combine.
**r**: they combine with the restriction below. **N**: refused, for the reason below, which is also the error message.
Every Y and r of this page trains in the tests, and every N is refused there.

More than two combine if each pair does, such as `dora,rslora,pissa,lora+`. The numbers above the columns are
those of the rows.

"""


def combinations_page() -> str:
    """The page of the table of combinations."""
    names = list(lorary.presets())
    linked = {name: f"[`{name}`](methods/{stem(name)}.md)" for name in names}
    rows = [["", "", *map(str, range(2, len(names) + 1))], ["---"] * (len(names) + 1)]
    whys: dict[str, dict[str, list[str]]] = {"r": {}, "N": {}}
    for i, one in enumerate(names):
        row = [""] * min(i, len(names) - 1)
        for other in names[i + 1 :]:
            found = verdict(one, other)
            row.append(found.letter)
            if found.why:
                whys[found.letter].setdefault(found.why, []).append(f"{linked[one]} with {linked[other]}")
        rows.append([str(i + 1), linked[one], *row])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    listed = {
        letter: "\n".join(f"- {', '.join(pairs)}: {cell(why)}" for why, pairs in found.items())
        for letter, found in whys.items()
    }
    return f"{COMBINATIONS_HEAD}{table}\n\n## Restrictions\n\n{listed['r']}\n\n## Refusals\n\n{listed['N']}\n"


INDEX_HEAD = """# The methods

A method is a record of components, one per axis. A preset is a paper's name for some of them; LoRA's components are the
defaults for the others. Presets combine by union; a [table](../combinations.md) shows which pairs do.

| preset | equation | paper | what it changes | when |
|---|---|---|---|---|
"""


def index_page() -> str:
    """The page over the methods' pages."""
    file = HERE / "methods" / "index.md"
    found = [*lorary.presets().values(), *FUNCTIONS.values()]
    rows = [
        f"| [`{p.name}`]({stem(p.name)}.md) | `{_pipe(p.summary)}` | {paper(p.citation) if p.year else ''} | "
        f"{p.changes if isinstance(p.changes, str) else ', '.join(p.changes)} | {cell(p.when)} |"
        for p in found
    ]
    toctree = "```{toctree}\n:hidden:\n\n" + "\n".join(stem(p.name) for p in found) + "\n```"
    by_hand = file.read_text(encoding="utf-8").partition(BY_HAND)[2]
    return INDEX_HEAD + "\n".join(rows) + f"\n\n{toctree}\n\n{BY_HAND}{by_hand}"


_README = "<!-- The methods; written by docs/generate.py. -->"


def readme() -> str:
    """The README, with its table of methods from the presets."""
    rows = [
        f"| [`{found.name}`](docs/methods/{stem(found.name)}.md) | `{_pipe(found.summary)}` |"
        for found in (*lorary.presets().values(), *FUNCTIONS.values())
    ]
    table = "| method | equation |\n|---|---|\n" + "\n".join(rows)
    before, _, after = (HERE.parent / "README.md").read_text(encoding="utf-8").split(_README)
    return f"{before}{_README}\n\n{table}\n\n{_README}{after}"


def _pipe(code: str) -> str:
    """Code inside a table."""
    return code.replace("|", "\\|")


PAGES: dict[str, Callable[[], str]] = {
    "../README.md": readme,
    "reference/config.md": config_page,
    "reference/cli.md": cli_page,
    "reference/serving.md": serving_page,
    "combinations.md": combinations_page,
    "compared.md": compared_page,
    **{f"pictures/compared-{name}.svg": functools.partial(compared_picture, name) for name in stored()},
    "numbers.md": numbers_page,
    "methods/index.md": index_page,
    **{f"methods/{stem(name)}.md": functools.partial(written_page, name) for name in lorary.presets()},
    **{f"methods/pictures/{stem(name)}.svg": functools.partial(picture, name) for name in lorary.presets()},
}


def main() -> None:
    """Write every page. A method that has no page yet gets one, to be continued by hand."""
    for name, page in PAGES.items():
        file = HERE / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
