"""The use of context: the same as a loop over `model(...).loss`, and true of models whose use of it is known."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lorary import builtin
from lorary.analysis.long_context import (
    Block,
    Context,
    Length,
    by_length,
    by_position,
    default_lengths,
    losses,
    stretches,
)
from lorary.analysis.long_context_plot import context_svg, positions_svg
from lorary.analysis.passkey import DEPTHS, Haystack, Retrieval, first_digits, retrieval
from lorary.errors import DataError
from tests import tiny
from tests.train.small import tokenizer

SVG = "{http://www.w3.org/2000/svg}"


class Copier(nn.Module):
    """Goes on as the text went on when its last three tokens last stood within `window` tokens, else knows nothing."""

    def __init__(self, vocabulary: int, window: int) -> None:
        super().__init__()
        self.vocabulary, self.window = vocabulary, window

    def forward(self, ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, self.vocabulary)
        for row, out in zip(ids, logits, strict=True):
            grams = row.unfold(0, 3, 1)  # [tokens - 2, 3]
            at = torch.arange(len(grams))
            before = (at[None] < at[:, None]) & (at[:, None] - at[None] <= self.window)
            same = (grams[:, None] == grams[None]).all(-1) & before  # [now, then]
            last = torch.where(same, at[None], -1).amax(1)
            now = (last >= 0).nonzero()[:, 0]
            out[now + 2, row[last[now] + 3]] = 20.0
        return logits


def scoring(model: Any) -> Any:
    """Log-probabilities from all logits at once."""

    @torch.no_grad()
    def scores(ids: Tensor, start: int) -> Tensor:
        answer = model(ids)
        log_p = getattr(answer, "logits", answer)[:, :-1].log_softmax(-1)
        return log_p.gather(-1, ids[:, 1:, None])[..., 0][:, start - 1 :]

    return scores


def greedy(model: nn.Module, words: Any) -> Any:
    def continued(ids: Tensor, tokens: int) -> str:
        row = ids
        for _ in range(tokens):
            row = torch.cat([row, model(row[None])[0, -1:].argmax(-1)])
        return str(words.decode(row[len(ids) :]))

    return continued


# --- perplexity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_length_is_the_mean_of_the_models_own_loss_over_its_windows(name: str) -> None:
    model = tiny.seeded(name)
    stream = torch.randint(40, (300,), generator=torch.Generator().manual_seed(3))
    text = stretches(stream, 48, 150)
    assert text.shape == (3, 48)
    for length in (5, 16, 48):
        found = by_length(losses(scoring(model), text, length))
        own = []
        for stretch in text:
            for start in range(0, 48 - length + 1, length):
                window = stretch[None, start : start + length]
                own.append(model(input_ids=window, labels=window).loss.item())
        assert (found.tokens, found.windows, found.predicted) == (length, len(own), len(own) * (length - 1))
        assert found.nats == pytest.approx(sum(own) / len(own), rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(sum(own) / len(own)), rel=1e-5)


def test_every_length_sees_the_same_text_in_bounds() -> None:
    stream = torch.arange(1000)
    text = stretches(stream, 64, 512)
    assert text.shape == (8, 64)
    assert (text[0, 0], text[-1, -1]) == (0, 999), "from the beginning to the end of the stream"
    assert len(text.unique()) == text.numel(), "no token twice"
    seen: list[Tensor] = []
    for length in (8, 16, 32, 64):
        asked: list[Tensor] = []

        def scores(ids: Tensor, start: int, asked: list[Tensor] = asked) -> Tensor:
            asked.append(ids)
            return -torch.ones(ids.shape[0], ids.shape[1] - start)

        assert losses(scores, text, length).shape == (512 // length, length - 1)
        seen.append(torch.cat([part.flatten() for part in asked]).sort().values)
    assert all(torch.equal(seen[0], other) for other in seen)
    assert stretches(stream, 600, 10).shape == (1, 600), "one stretch, whatever the budget"
    assert stretches(stream, 300, 10**9).shape == (3, 300), "no more than there is"
    with pytest.raises(DataError, match=r"1,000 tokens, and the longest length is 1,001"):
        stretches(stream, 1001, 10)


@pytest.mark.parametrize(("length", "blocks"), [(64, 16), (33, 16), (7, 3), (2, 1)])
def test_blocks_cover_every_position_once_and_sum_to_the_whole(length: int, blocks: int) -> None:
    lost = torch.rand(5, length - 1, generator=torch.Generator().manual_seed(1)).double()
    found = by_position(lost)
    assert len(found) == blocks
    assert [b.start for b in found] == [0, *(b.stop for b in found[:-1])]
    assert found[-1].stop == length
    assert {b.stop - b.start for b in found} <= {length // blocks, length // blocks + 1}
    assert sum(b.predicted for b in found) == lost.numel() == by_length(lost).predicted
    assert sum(b.nats * b.predicted for b in found) / lost.numel() == pytest.approx(by_length(lost).nats)


def test_a_block_holds_its_own_positions() -> None:
    lost = torch.arange(1.0, 16.0).expand(2, 15)  # the loss at a position is the position
    assert [block.nats for block in by_position(lost, 4)] == [2.0, 5.5, 9.5, 13.5]


def test_lengths_that_are_asked_for_by_default() -> None:
    assert default_lengths([256]) == (64, 128, 256, 512, 1024)
    assert default_lengths([100, 4096, None]) == (1024, 2048, 4096, 8192, 16384)
    assert default_lengths([None]) == (128, 256, 512, 1024, 2048)


# --- passkeys ---------------------------------------------------------------------------------------------------


def merging() -> PreTrainedTokenizerFast:
    """A tokenizer that has tokens of several digits: keys take two to five."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([" ".join(str(n) for n in range(10_000, 100_000, 321))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.mark.parametrize("words", [builtin.load_tokenizer(), tokenizer(), merging()], ids=["base", "bos", "merging"])
def test_a_prompt_with_its_answer_is_exactly_as_long_as_asked(words: Any) -> None:
    haystack = Haystack(words, 700)
    sizes = set()
    for length in (haystack.shortest + 2, 500, 633):
        for depth in DEPTHS:
            trial = haystack.trial(length, depth, seed=length)
            assert trial is not None
            assert len(trial.prompt) + len(trial.answer) + 1 == length
            text, other = words.decode(trial.prompt), words.decode(trial.other)
            assert text.count(trial.key) == 2
            assert trial.key not in other
            assert first_digits(words.decode(trial.answer)) == trial.key
            assert words.decode(torch.cat([trial.prompt, trial.answer])).endswith(f"The pass key is {trial.key}")
            assert len(trial.prompt) == len(trial.other)
            between = (trial.prompt != trial.other).nonzero()[:, 0]
            assert len(between) <= 2 * len(trial.answer), "the prompts differ in the key alone"
            until = words.decode(trial.prompt[: int(between[0])])
            assert until.rstrip().endswith("The pass key is")
            before = len(until) / len(text)
            assert length < 500 or abs(before - (0.25 + 0.65 * depth)) < 0.17, "it lies where it was asked for"
            sizes.add(len(trial.answer))
        assert list(trial.prompt).count(0) == (words.bos_token_id == 0), "one BOS"
    assert haystack.trial(haystack.shortest - 6, 0.5, 0) is None
    assert len(sizes) > 1 or words.vocab_size != 400, "keys of several sizes were met"


def test_every_trial_has_a_key_of_its_own() -> None:
    haystack = Haystack(builtin.load_tokenizer(), 200)
    keys = [haystack.trial(200, depth, seed).key for depth in DEPTHS for seed in range(4)]  # type: ignore[union-attr]
    again = [haystack.trial(200, depth, seed).key for depth in DEPTHS for seed in range(4)]  # type: ignore[union-attr]
    assert len(set(keys)) == 20
    assert keys == again
    assert all(len(key) == 5 and key.isdecimal() and key[0] != "0" for key in keys)


def test_one_that_looks_back_finds_the_key_and_one_that_sees_the_end_alone_does_not() -> None:
    words = builtin.load_tokenizer()
    haystack = Haystack(words, 400)
    for window, sees in ((400, set(DEPTHS)), (60, {1.0})):
        model = Copier(len(words), window)
        for depth in DEPTHS:
            cell = retrieval(scoring(model), greedy(model, words), haystack, 400, depth, trials=2)
            assert cell is not None
            assert (cell.length, cell.depth, cell.trials) == (400, depth, 2)
            assert cell.found == (2 if depth in sees else 0), (window, depth)
            if depth in sees:
                assert cell.gain > 5
                assert cell.nats < 1
            else:
                assert cell.gain == 0, "a key that is out of sight changes nothing"


@pytest.mark.parametrize(
    ("said", "found"), [(" 12345", 1), (" 12345.", 1), (" 123456", 0), (" 1234", 0), ("", 0), (" 54321 12345", 0)]
)
def test_found_is_the_key_first_and_nothing_more(said: str, found: int) -> None:
    haystack = Haystack(builtin.load_tokenizer(), 128)
    trial = haystack.trial(128, 0.0, 0)
    assert trial is not None
    text = said.replace("12345", trial.key).replace("1234", trial.key[:4])
    scores = scoring(Copier(2048, 1))
    cell = retrieval(scores, lambda ids, tokens: text, haystack, 128, 0.0, trials=1)
    assert cell is not None
    assert cell.found == found
    assert retrieval(scores, lambda ids, tokens: text, haystack, 64, 0.0, trials=1) is None


# --- the record and its pictures ----------------------------------------------------------------------------------


def made(name: str = "base", max_context: int | None = 256, found: int = 0) -> Context:
    lengths = tuple(Length(n, 4096 // n, 4096 - 4096 // n, 3.0 - 0.1 * i) for i, n in enumerate((128, 256, 512)))
    blocks = tuple(Block(i * 32, i * 32 + 32, 256 - 8 * (i == 0), 3.0 - i / 16) for i in range(16))
    cells = tuple(Retrieval(n, depth, 4, found, 2.0, 2.0 + depth) for n in (256, 512) for depth in DEPTHS)
    return Context(name, max_context, lengths, blocks, cells)


def test_a_record_in_plain_values() -> None:
    record = made().to_dict()
    assert record["lengths"][1] == {
        "tokens": 256, "windows": 16, "predicted": 4080, "nats": 2.9, "perplexity": math.exp(2.9),
    }  # fmt: skip
    assert record["passkeys"][2]["gain"] == 0.5
    whole = made(found=1).all_depths(256)
    assert whole is not None
    assert (whole.trials, whole.found, whole.gain) == (20, 5, 0.5)
    assert made().all_depths(128) is None
    broken = replace(made(), lengths=(Length(8, 1, 7, math.nan), Length(16, 1, 15, 1e4)))
    assert [length["perplexity"] for length in broken.to_dict()["lengths"]] == [None, None]


def words_of(svg: str) -> list[str]:
    return [text.text or "" for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_the_picture_says_every_number_of_the_passkeys() -> None:
    pair = [made("base"), made("out/$a$ & <b>", max_context=512)]
    said = words_of(context_svg(pair))
    assert [said.count(f"{depth:+.2f}") for depth in DEPTHS] == [4] * 5
    assert {"base", "out/$a$ & <b>", "context 256", "context 512"} <= {text.strip() for text in said}
    retrieved = words_of(context_svg([made(found=3), made("other")]))
    assert retrieved.count("75%  +0.5") == 2
    assert retrieved.count("0%  +0.5") == 2
    assert "depth" not in words_of(context_svg([replace(made(), passkeys=())]))


def test_the_pictures_are_true_and_the_same_every_time() -> None:
    svg = context_svg([made()])
    assert svg == context_svg([made()]) != context_svg([made(found=1)])
    label = ET.fromstring(svg).get("aria-label") or ""
    assert label.endswith("base: perplexity 20.09 at 128 tokens, 16.44 at 512; 0 of 40 passkeys retrieved")
    broken = replace(made(max_context=None), lengths=(Length(128, 1, 127, math.nan), Length(256, 1, 255, 3.0)))
    assert "context" not in " ".join(words_of(context_svg([broken])))
    steps = positions_svg([made(), made("other")])
    assert "2.062 in the last" in (ET.fromstring(steps).get("aria-label") or "")
    assert "currentColor" in steps
