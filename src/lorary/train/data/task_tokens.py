"""Token ids of the tasks that do not train on answers alone.

KTO             prompt_ids, completion_ids, label (a boolean)
GRPO            prompt_ids, and the row's own fields: the trainer encodes the prompt again when it samples answers
classification  input_ids, token_type_ids?, label (an index, a number, or one number for each label)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorary.train.data import chat, encode
from lorary.train.data.row_formats import Preference
from lorary.train.data.task_rows import Judged, Labelled, Labels, Prompt


def encoded(
    row: Judged | Prompt | Labelled, tokenizer: Any, special: Mapping[int, bool], labels: Labels | None
) -> dict[str, Any]:
    """The row that a trainer takes.

    Args:
        row: a `Judged`, `Prompt` or `Labelled`.
        tokenizer: of the base.
        special: the ids of its special tokens.
        labels: of a classification; None leaves them out.

    Raises:
        ValueError: the chat template refuses the row.
    """
    if isinstance(row, Judged):
        same = Preference(row.prompt, row.completion, row.completion, row.where)
        ids, _ = encode.preference(tokenizer, same, special)
        return {"prompt_ids": ids["prompt_ids"], "completion_ids": ids["chosen_ids"], "label": row.good}
    if isinstance(row, Prompt):
        return {"prompt": row.prompt, "prompt_ids": _prompt_ids(row, tokenizer)} | dict(row.fields)
    assert isinstance(row, Labelled)
    found = tokenizer(row.text, row.pair)
    kept = {key: list(found[key]) for key in ("input_ids", "token_type_ids") if key in found}
    return kept | ({"label": labels.encode(row.label)} if labels else {})


def _prompt_ids(row: Prompt, tokenizer: Any) -> list[int]:
    """The ids that the model answers."""
    if isinstance(row.prompt, str):
        return list(tokenizer(row.prompt)["input_ids"])
    text = chat.render(tokenizer, row.prompt, prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def shortened(row: dict[str, Any], most: int) -> dict[str, Any]:
    """A labelled text cut to `most` tokens; its last one stays, which may be a separator."""
    return {key: value if key == "label" else [*value[: most - 1], value[-1]] for key, value in row.items()}
