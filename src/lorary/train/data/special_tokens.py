"""Special tokens inside the texts of rows: kept, escaped or refused, and always counted.

A tokenizer finds `<|im_end|>` wherever it stands: typed into a user's message, it ends the turn. Escaped, such a text
is tokenized as any other text, and the template's own special tokens stay what they are. Transformers offers
`split_special_tokens` and `sanitize_control_tokens` for this, but both look up the pieces in the model's vocabulary,
where a Unigram tokenizer finds `</s>` again, and the second cuts the text, and gives no offsets for a mask. Here the
text is tokenized in one go, by a twin of the tokenizer whose special tokens have names that no text can hold.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

from lorary.errors import DataError, Diagnostic
from lorary.train.data._records import texts
from lorary.train.data.row_formats import Chat, Example, Pair, Preference, Text
from lorary.train.data.task_rows import Judged, Prompt

_GUARD = "\U0010fffd"  # around the number of a token that a text contains, while the template works on it
_GUARDED = re.compile(f"{_GUARD}(\\d+){_GUARD}")


class SpecialTokens:
    """What becomes of special tokens in the texts of examples, and how many there were.

    Args:
        tokenizer: a fast Transformers tokenizer.
        policy: "keep", "escape" or "refuse".
    """

    def __init__(self, tokenizer: Any, policy: str) -> None:
        self.tokenizer, self.policy = tokenizer, policy
        self.rows = 0
        self.found: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.ids = _special_tokens(tokenizer)
        self._pattern = _any_of(self.ids)

    def tokenizer_for(self, example: Example) -> Any:
        """The tokenizer for an example.

        Raises:
            ValueError: the example has special tokens, and these are refused.
        """
        here = dict.fromkeys(match[0] for text in self._texts(example) for match in self._pattern.finditer(text))
        if not here:
            return self.tokenizer
        self.rows += 1
        self.found.update(here.keys())
        for token in here:
            self.first.setdefault(token, example.where)
        if self.policy == "refuse":
            tokens = f"the special token{'s' * (len(here) > 1)} {', '.join(map(repr, here))}"
            raise ValueError(f"its text contains {tokens}; data.special_tokens: escape reads them as text")
        return self._escaping if self.policy == "escape" else self.tokenizer

    @property
    def notes(self) -> tuple[str, ...]:
        """The number of rows, and each token with the number of its rows and the first of them."""
        if not self.rows:
            return ()
        shown = [f"{token!r} in {count:,} (first: {self.first[token]})" for token, count in self.found.most_common(5)]
        more = f", and {len(self.found) - 5:,} others" if len(self.found) > 5 else ""
        rows = f"{self.rows:,} row{'s have' if self.rows > 1 else ' has'} special tokens in the text"
        if self.policy == "escape":
            return (f"{rows}, escaped: {', '.join(shown)}{more}",)
        fix = "set data.special_tokens: escape if they are meant as text, or refuse"
        return (f"{rows}, which act as such: {', '.join(shown)}{more}; {fix}",)

    def _texts(self, example: Example) -> Iterator[str]:
        """The texts of an example; a BOS or EOS at its ends, where the tokenizer writes one itself, does not count."""
        begins, ends = (self.tokenizer.bos_token or "", self.tokenizer.eos_token or "")
        if self.policy != "keep":
            begins = ends = ""
        if isinstance(example, Text):
            yield example.text.removeprefix(begins).removesuffix(ends)
        elif isinstance(example, Pair):
            yield example.prompt.removeprefix(begins)
            yield example.completion.removesuffix(ends)
        elif isinstance(example, Chat):
            yield from texts([example.messages, example.tools])
        elif isinstance(example, Preference):
            yield from texts([example.prompt, example.chosen, example.rejected, example.tools])
        elif isinstance(example, Judged):
            yield from texts([example.prompt, example.completion])
        elif isinstance(example, Prompt):
            yield from texts(example.prompt)
        else:
            yield from texts([example.text, example.pair])

    @cached_property
    def _escaping(self) -> EscapingTokenizer:
        return EscapingTokenizer(self.tokenizer, self.ids)


class EscapingTokenizer:
    """A tokenizer that reads special tokens in texts as text; everything else is the tokenizer's own.

    Args:
        tokenizer: a fast Transformers tokenizer.
        ids: its special tokens.

    Raises:
        DataError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, ids: Mapping[str, int]) -> None:
        self.tokenizer, self.names = tokenizer, {i: token for token, i in ids.items()}
        self._pattern, self._ids = _any_of(ids), ids
        self._twin = _twin(tokenizer, ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(
        self,
        text: str,
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
    ) -> dict[str, Any]:
        """Token ids of a text, or of a pair, with the characters and the text of each token."""
        encoded = self._twin.encode(text, text_pair, add_special_tokens=add_special_tokens)
        found = {"input_ids": encoded.ids, "offset_mapping": encoded.offsets}
        types = {"token_type_ids": encoded.type_ids} if "token_type_ids" in self.tokenizer.model_input_names else {}
        return found | types

    def apply_chat_template(
        self, messages: Any, tools: Any = None, tokenize: bool = False, add_generation_prompt: bool = False, **_: Any
    ) -> Any:
        """The conversation as text for this tokenizer; with `tokenize`, its ids and the mask of its marks."""
        from lorary.layers.transformers_internals import render_jinja_template

        if any(_GUARD in text for text in texts([messages, tools])):
            raise ValueError("contains U+10FFFD, so its special tokens cannot be escaped")
        messages, tools = _mapped([messages, tools], self._guard)
        (rendered,), spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.tokenizer.get_chat_template(None, tools),
            return_assistant_tokens_mask=tokenize,
            add_generation_prompt=add_generation_prompt,
            **self.tokenizer.special_tokens_map,
        )
        if not tokenize:
            return self._unguard(rendered)
        edges = [0, *(edge for span in spans[0] for edge in span), len(rendered)]
        pieces = [self._unguard(rendered[a:b]) for a, b in pairwise(edges)]
        places = [sum(map(len, pieces[:i])) for i in range(len(pieces) + 1)]
        marked = list(zip(places[1::2], places[2::2], strict=False))
        encoded = self("".join(pieces), add_special_tokens=False)
        mask = [any(a <= start < b and end > start for a, b in marked) for start, end in encoded["offset_mapping"]]
        return {"input_ids": encoded["input_ids"], "assistant_masks": mask}

    def _guard(self, text: str) -> str:
        """A text of a row for the template: its special tokens as numbers."""
        return self._pattern.sub(lambda match: f"{_GUARD}{self._ids[match[0]]}{_GUARD}", text)

    def _unguard(self, rendered: str) -> str:
        """A rendered text for the twin: the template's special tokens under the twin's names, the row's as text."""
        named = self._pattern.sub(lambda match: _name(self._ids[match[0]]), rendered)
        return _GUARDED.sub(lambda match: self.names[int(match[1])], named)


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens of a tokenizer and their ids; not other added tokens, such as `<think>`."""
    found = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {token: i for token, i in (found | named).items() if token.strip()}


def _any_of(ids: Mapping[str, int]) -> re.Pattern[str]:
    """Any of these tokens, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or "(?!)")


def _mapped(value: Any, function: Callable[[str], str]) -> Any:
    """The value with a function of every text in it."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {function(str(key)): _mapped(inner, function) for key, inner in value.items()}
    return [_mapped(inner, function) for inner in value] if isinstance(value, list | tuple) else value


def _name(i: int) -> str:
    """A name of a token that no row contains: NUL characters are refused when rows are read."""
    return f"\0{i}\0"


def _twin(tokenizer: Any, ids: Mapping[str, int]) -> Any:
    """The `tokenizers.Tokenizer` behind a tokenizer, its special tokens renamed wherever they occur.

    In the added tokens a text would match them first, and in the vocabulary of the model (always in that of a Unigram,
    whose control tokens are pieces of the highest score) afterwards.
    """
    from tokenizers import Tokenizer

    if getattr(tokenizer, "backend_tokenizer", None) is None:
        what = f"{type(tokenizer).__name__} is not a fast tokenizer, and only these can be escaped"
        fix = "set it to keep or refuse"
        raise DataError("cannot escape special tokens:", [Diagnostic("data.special_tokens", what, fix)])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None}
    for token in state["added_tokens"]:
        if token["content"] in ids:
            token |= {"content": _name(token["id"]), "normalized": False, "single_word": False}
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {_name(i) if token in ids else token: i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[_name(ids[piece]) if piece in ids else piece, score] for piece, score in model["vocab"]]
    if model.get("unk_token") in ids:
        model["unk_token"] = _name(ids[model["unk_token"]])
    twin = Tokenizer.from_str(json.dumps(state))
    moved = [token for token, i in ids.items() if twin.token_to_id(_name(i)) != i]
    if moved:
        what = f"{moved[0]!r} is not where its id says"
        raise DataError("cannot escape special tokens:", [Diagnostic("data.special_tokens", what, "set it to refuse")])
    return twin
