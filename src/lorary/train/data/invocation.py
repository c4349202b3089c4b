"""The rows in which the invocation of an adapter is: in the others there is nothing for it to learn (aLoRA)."""

from __future__ import annotations

from collections.abc import Sequence

from lorary.errors import DataError, Diagnostic
from lorary.train.data.encode import decode
from lorary.train.data.tokenize import Row, Tokens, token_ids


def invocation_notes(tokens: Sequence[int], train: Tokens, held_out: Tokens | None, tokenizer: object) -> list[str]:
    """Notes on the rows without an invocation.

    Args:
        tokens: the invocation's; none: there is nothing to look for.
        train: the training rows.
        held_out: the held-out rows.
        tokenizer: their tokenizer.

    Raises:
        DataError: no training row has it.
    """
    if not tokens or not train.rows:
        return []
    shown = f"the invocation {decode(tokenizer, tokens)!r} ({len(tokens)} tokens)"
    notes = []
    for name, rows in (("training", train.rows), ("held-out", held_out.rows if held_out else ())):
        without = sum(not has_invocation(row, tokens) for row in rows)
        if name == "training" and without == len(rows):
            what = f"{shown} is in none of the {without:,} training rows, so nothing would train"
            fix = "write it into the rows, as your tokenizer splits it there, or give method.options.invocation as ids"
            raise DataError("the training data has errors:", [Diagnostic("", what, fix)])
        if without:
            notes.append(f"{without:,} of {len(rows):,} {name} rows have no {shown[4:]}: the adapter is off there")
    return notes


def has_invocation(row: Row, tokens: Sequence[int]) -> bool:
    """Whether the tokens are in a row, in order; of a preference in its prompt and first answer."""
    ids, wanted, n = token_ids(row), list(tokens), len(tokens)
    return any(ids[i : i + n] == wanted for i, first in enumerate(ids) if first == wanted[0])
