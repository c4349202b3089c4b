"""The options of `lorary compare`, which are keys of the configuration, and those that exclude each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorary.errors import ConfigError, Diagnostic

_KEYS = {"--steps": "training.max_steps"}  # the others are keys of the section `compare`
_SHOWN, _GOES_ON = ("--reference",), ("--budget", "--workers")


@dataclass(frozen=True)
class Options:
    """The options as they are given.

    Args:
        values: option -> its text.
        general: sources of general text.
        sets: `key=value` each.
        out: folder of the comparison.
        switches: option -> whether it is given.
    """

    values: Mapping[str, str]
    general: tuple[str, ...]
    sets: tuple[str, ...]
    out: Path | None
    switches: Mapping[str, bool]

    @property
    def folder(self) -> Path:
        """The folder of the comparison."""
        from lorary.files.home import expanded

        return expanded(self.out or Path("comparison"))

    @property
    def flags(self) -> dict[str, tuple[str, str]]:
        """Option -> (key of the configuration, value), for `lorary.train.config.load`."""
        found = {name: (_KEYS.get(name, f"compare.{name[2:]}"), value) for name, value in self.values.items()}
        if "--steps" in found:
            found["--steps, in place of epochs"] = ("training.epochs", "null")
        if self.general:
            found["--general"] = ("compare.general", json.dumps([source for source in self.general if source]))
        return found

    @property
    def given(self) -> list[str]:
        """The names of all options that are given."""
        more = {"--general": self.general, "--set": self.sets, "--out": self.out, **self.switches}
        return [*self.values, *(name for name, value in more.items() if value)]


def check_options(source: Path, options: Options) -> None:
    """Check the options of a comparison that is begun by a configuration.

    Raises:
        ConfigError: every contradiction.
    """
    problems = [*_source_problems(source), *_switch_problems(options)]
    if problems:
        raise ConfigError("cannot compare:", problems)


def _source_problems(source: Path) -> Iterator[Diagnostic]:
    if not source.exists():
        fix = "name a YAML file, such as `lorary init` writes, or a folder that this command has written"
        yield Diagnostic(str(source), "is neither a configuration nor the folder of a comparison", fix)
    elif source.name == "comparison.json":
        yield Diagnostic(str(source), "is the record of a comparison", f"name its folder, {source.parent}")


def _switch_problems(options: Options) -> Iterator[Diagnostic]:
    switches = options.switches
    if switches["--resume"] and switches["--overwrite"]:
        what = "goes on with what is in the folder, and --overwrite removes it"
        yield Diagnostic("--resume", what, "keep one of the two")
    if switches["--resume"] and switches["--dry-run"]:
        yield Diagnostic("--resume", "runs, and --dry-run does not", "keep one of the two")
    if switches["--resume"] and not (options.folder / "comparison.json").is_file():
        what = f"there is no comparison in {str(options.folder)!r} to go on with"
        yield Diagnostic("--resume", what, "leave it out to begin one")


def check_folder_options(options: Options) -> None:
    """Check the options beside the folder of a comparison, which has the others in its record.

    Raises:
        ConfigError: every option that has no effect there.
    """
    resume = options.switches["--resume"]
    fine = ("--resume", *(_GOES_ON if resume else _SHOWN))
    what = f"has no effect on a comparison that {'goes on' if resume else 'is only shown'}"
    problems = [
        Diagnostic(name, what, "add --resume" if name in _GOES_ON else "remove it, or name a configuration")
        for name in options.given
        if name not in fine
    ]
    if problems:
        raise ConfigError("cannot compare:", problems)
