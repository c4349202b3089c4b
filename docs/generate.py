"""Writes the reference pages that the code knows best: `python docs/generate.py` (a part of `make docs`).

The configuration's page is made from the models in `lorary.train.config`, the commands' from the command line itself,
so neither can disagree with what it describes; a test fails where a committed page is not what this would write.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from lorary.cli import COMMANDS, app
from lorary.train.config import Config

HERE = Path(__file__).resolve().parent

CONFIG_HEAD = """# Configuration

One YAML file is one training run. `lorary init` writes it with every key, default and sentence below as comments;
`lorary init --schema` prints its JSON schema, for editors. It is strict: an unknown key, an equal key, a value of the
wrong type or out of range, and two keys that contradict each other are errors, all at once, each with line and column.

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
    parts.insert(1, "\n## At the top\n\n| key | default | meaning |\n|---|---|---|\n" + "\n".join(top) + "\n")
    return "".join(parts)


def _row(key: str, field: Any) -> str:
    if field.is_required():
        default = "required"
    elif field.default is None:
        default = ""
    else:
        default = f"`{_yaml(field.default)}`"
    return f"| `{key}` | {default} | {_cell(field.description or '')} |"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) if value else "[]"
    return str(value)


def cli_page() -> str:
    """The page of the commands, in the order in which `lorary` knows them."""
    program = typer.main.get_command(app())
    commands: dict[str, Any] = program.commands  # type: ignore[attr-defined]
    return CLI_HEAD + "".join(_command(name, commands[name]) for name in COMMANDS if name in commands)


def _command(name: str, command: Any) -> str:
    shown = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    options = [p for p in shown if p.param_type_name == "option"]
    words = " ".join((p.name if p.required else f"[{p.name}]").upper() for p in arguments)
    usage = " ".join(filter(None, ["lorary", name, words, "[OPTIONS]" if options else ""]))
    rows = [f"| `{p.name.upper()}` | {_cell(_help(p))} |" for p in arguments]
    rows += [f"| {', '.join(f'`{flag}`' for flag in p.opts)} | {_cell(_help(p))} |" for p in options]
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


def _cell(text: str) -> str:
    """Text that stands in a table's cell as it is."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").strip()


PAGES = {"reference/config.md": config_page, "reference/cli.md": cli_page}


def main() -> None:
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
