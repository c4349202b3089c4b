"""What continues prompts: the serving engine in this process, or Transformers' `generate` where the engine cannot.

The engine is left for a base that it does not compute, for an adapter without a serving form, for a generation
configuration that it does not know, and for a prompt that its memory does not hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorary.adapters.save_load import load_adapter
from lorary.adapters.switch import check_base
from lorary.cli._generation import Answer, Generation, Printer, Writer
from lorary.cli._generation_batches import PlainWriter
from lorary.cli._generation_engine import EngineWriter
from lorary.cli._notes import print_notes
from lorary.errors import ConfigError, Diagnostic, LoraryError
from lorary.model.base import Base

# What a generation configuration may set: the engine reads it, the command line replaces it, or it changes no answer.
_KNOWN = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"),
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p"),
    *("use_cache", "cache_implementation", "return_dict_in_generate", "early_stopping", "length_penalty"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
}


class AnyWriter:
    """Uses the serving engine until it cannot do what is asked, then Transformers' `generate`, with a note.

    Args:
        given: model, adapters, sampling and sizes.
    """

    def __init__(self, given: Generation) -> None:
        self._given = given
        self._in_use: str | None = None
        self._writer: Writer
        try:
            _require_plain_choice(given.model)
            self._writer = EngineWriter(given)
        except LoraryError as error:
            _say_why(error)
            self._writer = PlainWriter(given)

    @property
    def context(self) -> int | None:
        return self._writer.context

    def use(self, name: str | None) -> None:
        try:
            self._writer.use(name)
        except LoraryError as error:
            if name is None or not isinstance(self._writer, EngineWriter):
                raise
            self._require_fit(self._given.folders[name])
            self._leave_engine(error, name)
        self._in_use = name

    def write(self, rows: Sequence[Sequence[int]], printer: Printer | None = None) -> Iterator[Answer]:
        if isinstance(self._writer, EngineWriter) and (most := self._writer.most_tokens) is not None:
            needed = max(map(len, rows), default=0) + self._given.sampling.max_new_tokens
            needed = min(needed, self.context or needed)
            if needed > most:
                what = f"the prompt and its answer may take {needed:,} tokens, and its memory holds {most:,}"
                self._leave_engine(LoraryError(what), self._in_use)
        yield from self._writer.write(rows, printer)

    def close(self) -> None:
        self._writer.close()

    def _require_fit(self, folder: Path) -> None:
        """Refuse an adapter that does not fit the base, as `lorary.load` and `lorary.switch` do."""
        base = Base(self._given.model)
        adapter = load_adapter(folder, model=base)
        where = str(folder) if self._in_use is None else "the adapter"
        check_base(base, adapter, where, force=False)

    def _leave_engine(self, error: LoraryError, name: str | None) -> None:
        """Compute without the engine from now on, with this adapter."""
        _say_why(error)
        self._writer.close()  # the model is as it was before
        self._writer = PlainWriter(self._given)
        self._writer.use(name)


def _say_why(error: LoraryError) -> None:
    reasons = "; ".join(f"{p.where}: {p.what}" if p.where else p.what for p in error.problems[:3])
    print_notes([f"computed without the serving engine: {reasons or error.headline}"])


def _require_plain_choice(model: Any) -> None:
    """Refuse models whose generation configuration changes which token is chosen, by a repetition penalty, say.

    Raises:
        ConfigError: every such setting.
    """
    # 0, 1 and False are where such settings have no effect
    settings = model.generation_config.to_diff_dict().items()
    found = [
        key for key, value in settings if not (key in _KNOWN or key.startswith("_")) and (value or 0) not in (0, 1)
    ]
    if found:
        raise ConfigError("", [Diagnostic("", f"the model's generation configuration sets {', '.join(found)}")])
