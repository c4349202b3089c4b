"""The rules of advice, one function per decision, in the order in which they depend on each other."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lorary.errors import ConfigError, Diagnostic
from lorary.methods.lora import LowRank
from lorary.model.planning import has_common_targets
from lorary.train.advice import rates
from lorary.train.advice.draft import Draft
from lorary.train.advice.facts import Facts
from lorary.train.config.config import LORA_LR, default_lr

REGRET = "Schulman et al. 2025, LoRA Without Regret"
TINKER = "Tinker docs, LoRA primer"
PRACTICE = "practice of Unsloth, Axolotl and LLaMA-Factory"
REPEATS = "Muennighoff et al. 2023, arXiv:2305.16264"
LONGLORA = "Chen et al. 2023, arXiv:2309.12307"
DATA, MODEL = "the data", "the model"

RANK, ALPHA, HIGHEST_RANK = 32, 32.0, 128
BATCH, LARGE_BATCH, LEAST_BATCH, MICRO_BATCH = 16, 32, 4, 8
MANY_ROWS = 100_000  # from here on the larger batch
EPOCHS = ((1_000, 3.0), (10_000, 2.0))  # below so many rows -> epochs; else 1
EVALUATIONS = 4  # in an epoch, where the best of them is kept
EXTENDED = 25  # times the context that LongLoRA was shown at: 4,096 to 100,000 tokens
REPEATED = 4  # passes over the same row after which it teaches little
TEXT_ROW = 2048  # tokens of a row of plain text at most: attention is quadratic
ROW_TOKENS = 64  # that a row counts for where its answer is a label or a preference
HELD_OUT_ROWS = (50, 1000)
FEW_HELD_OUT = 20


def data_rules(draft: Draft, facts: Facts) -> None:
    """The length of a row, and what becomes of longer ones; LongLoRA where the context is too short; validation.

    Raises:
        ConfigError: no row is short enough.
    """
    length = _length(draft, facts)
    over = sum(n > length for n in facts.ordered)
    if over and not facts.plain:
        labelled = facts.task == "classification"
        why = "the label holds for the beginning of a text too" if labelled else "a cut answer has no end"
        reason = f"{over:,} of {len(facts.ordered):,} rows are longer than {length:,} tokens; {why}"
        chosen = draft.recommend("data.overlong", "truncate" if labelled else "drop", reason, DATA)
        if chosen == "drop" and min(facts.lengths) > length:
            what = f"all {facts.rows:,} rows are longer than {length:,} tokens, and none is left to train on"
            raise ConfigError("cannot advise:", [Diagnostic("data.train", what, "shorten or split the texts")])
    _validation(draft, facts, length)
    _packing(draft, facts, length)


def _length(draft: Draft, facts: Facts) -> int:
    """`data.max_length`, with LongLoRA for rows with answers that the model cannot read."""
    most = 99 if facts.longest > 2 * facts.percentile(99) else 100  # a few outliers decide the memory of every step
    wanted = facts.percentile(most)
    what = "the longest row has" if most == 100 else "99 % of the rows have up to"
    reason = f"{what} {wanted:,} tokens"
    length = max(8 * math.ceil(wanted / 8), 8)
    if facts.plain and length > TEXT_ROW:
        length, reason = TEXT_ROW, f"{reason}; plain text is split into rows of {TEXT_ROW:,}"
    if facts.context is None or length <= facts.context:
        return int(draft.recommend("data.max_length", length, reason, DATA))
    share = sum(n > facts.context for n in facts.lengths) / len(facts.lengths)
    short = f"the model reads {facts.context:,}"
    if facts.plain or share <= 0.01 or not facts.scalable or facts.task != "sft":
        return int(draft.recommend("data.max_length", facts.context, f"{reason}, and {short}", MODEL))
    longer = facts.context * math.ceil(length / facts.context)
    if longer > EXTENDED * facts.context:
        short += f"; LongLoRA has been shown up to {EXTENDED} times as many"
        return int(draft.recommend("data.max_length", facts.context, f"{reason}, and {short}", LONGLORA))
    why = f"{share:.0%} of the rows are longer than the {facts.context:,} tokens that the model reads"
    if tuple(draft.recommend("method.name", ("longlora",), why, LONGLORA)) == ("longlora",):
        draft.recommend("method.options", {"length": longer}, f"the next multiple of {facts.context:,}", LONGLORA)
        return int(draft.recommend("data.max_length", length, reason, DATA))
    return int(draft.recommend("data.max_length", facts.context, f"{reason}, and {short}", MODEL))


def _validation(draft: Draft, facts: Facts, length: int) -> None:
    """Held-out rows: the data's own, or a share of at most a tenth."""
    if facts.held_out:
        if not draft.is_given("data.validation") and (own := draft.value("data.validation")):
            draft.recommend("data.validation", own, "the built-in data have held-out files of their own", DATA)
        if (count := _cut(facts, facts.held_out_lengths, length)) < FEW_HELD_OUT:
            draft.warnings.append(f"only {count} rows are held out: their loss is noisy")
        return
    if draft.is_given("data.validation_split"):
        return
    if facts.rows < 2:
        draft.warnings.append("there is a single row: nothing can be held out")
        return
    least, most = HELD_OUT_ROWS
    wanted = min(max(facts.rows // 20, least), most, max(facts.rows // 10, 1))
    share = round(wanted / facts.rows, 4) or 0.0001
    reason = f"{wanted:,} of {facts.rows:,} rows: enough to see overfitting, and a tenth at most"
    draft.recommend("data.validation_split", share, reason, DATA)
    if (count := round(wanted / facts.rows * _cut(facts, facts.lengths, length))) < FEW_HELD_OUT:
        draft.warnings.append(f"only {count} rows can be held out: their loss is noisy")


def _cut(facts: Facts, lengths: Iterable[int], length: int) -> int:
    """The number of rows of at most `length` tokens that rows become: texts are split."""
    return sum(math.ceil(n / length) if facts.plain else 1 for n in lengths)


def _packing(draft: Draft, facts: Facts, length: int) -> None:
    """Packing where batches would be padding for the most part, and there are enough rows for full ones."""
    if facts.task != "sft" or facts.plain:
        return
    lengths = [min(n, length) for n in facts.lengths]
    batches = [lengths[i : i + MICRO_BATCH] for i in range(0, len(lengths), MICRO_BATCH)]
    padding = 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)
    enough = sum(lengths) >= 100 * BATCH * length
    reason = f"{padding:.0%} of a batch of {MICRO_BATCH} would be padding"
    if padding > 0.5 and not enough:
        reason += ", but packed rows would be too few"
    draft.recommend("data.packing", padding > 0.5 and enough, reason, DATA)


def method_rules(draft: Draft, facts: Facts) -> None:
    """The method, its layers, rank and alpha."""
    if draft.value("method.name") != ("longlora",):
        reason = "nine variants end within 1-2 % of LoRA once each has its own learning rate"
        draft.recommend("method.name", ("lora",), reason, "arXiv:2602.04998")
    if has_common_targets(draft.config.method.build()):
        reason = "attention alone learns less at equal parameters; the MLPs hold most weights"
        draft.recommend("method.targets", ("all-linear",), reason, REGRET)
    if facts.task == "classification":
        draft.recommend(
            "method.head", None, "a new head trains in full, a saved one as it is set", "docs/how-to/tasks.md"
        )
    if isinstance(draft.config.method.build().delta, LowRank) and facts.per_rank:
        _rank(draft, facts)


def _rank(draft: Draft, facts: Facts) -> None:
    """A rank at which the adapter has a number for each token of the answers, if there is such a low rank."""
    wanted, source = RANK, TINKER
    reason = f"{RANK * facts.per_rank:,} numbers for {facts.answers:,} tokens in the loss: more would gain little"
    if not facts.answers:
        reason = "more would cost memory, and gain little"
    if facts.answers > RANK * facts.per_rank:
        enough = 2 ** math.ceil(math.log2(facts.answers / facts.per_rank))
        wanted = min(enough, HIGHEST_RANK)
        reason = (
            f"{facts.answers:,} tokens in the loss want as many numbers, and r = {RANK} has {RANK * facts.per_rank:,}"
        )
    largest = facts.weights // 2 // facts.per_rank
    if wanted > largest:
        wanted = 2 ** max(int(math.log2(max(largest, 1))), 0)
        reason, source = "at a higher rank the factors have more than half as many numbers as the weights", MODEL
    r = draft.recommend("method.r", wanted, reason, source)
    if hasattr(draft.config.method.build().scale, "alpha") and "rslora" not in draft.value("method.name"):
        reason = "a constant alpha keeps the best learning rate nearly independent of the rank"
        draft.recommend("method.alpha", ALPHA, reason, REGRET)
    if facts.answers > r * facts.per_rank:
        draft.warnings.append(
            f"the adapter has {r * facts.per_rank:,} numbers for {facts.answers:,} tokens in the loss: "
            "it may learn less than full fine-tuning"
        )


def training_rules(draft: Draft, facts: Facts) -> None:
    """Epochs, batch, steps, learning rate and warm-up."""
    rows = _rows(draft, facts)
    if draft.value("training.max_steps") is None:
        epochs = next((n for most, n in EPOCHS if rows < most), 1.0)
        draft.recommend("training.epochs", epochs, f"{rows:,} rows: 1 to 3 passes, fewer over more rows", PRACTICE)
    batch = _batch(draft, facts, rows)
    steps = _steps(draft, rows, batch)
    repeats = steps * batch > 1.5 * rows
    _rate(draft, facts, rows, batch, steps, repeats)
    if repeats:
        _keep_best(draft, facts, rows, batch)
    warmup = 0.03 if steps >= 300 else 0.05
    draft.recommend("training.warmup", warmup, f"a share of {steps:,} steps; short, as B starts at zero", PRACTICE)
    if steps < rates.SHORT:
        draft.warnings.append(f"{steps:,} steps are few: fewer than {rates.SHORT} seldom reach the end of learning")
    passes = steps * batch / max(rows * facts.unique / facts.rows, 1)
    if passes > REPEATED:
        what = f"every different row is seen {passes:.1f} times"
        draft.warnings.append(f"{what}: from about {REPEATED} times on it teaches little ({REPEATS})")
    if facts.unique < 0.99 * facts.rows:
        draft.warnings.append(f"{facts.rows - facts.unique:,} of {facts.rows:,} rows repeat another")


def _rows(draft: Draft, facts: Facts) -> int:
    """The rows of an epoch: cut, packed, and without those held out or left out."""
    length = draft.value("data.max_length")
    kept = facts.lengths if facts.plain else [min(n, length) for n in facts.lengths]
    if draft.value("data.overlong") == "drop":
        kept = [n for n in facts.lengths if n <= length]
    rows = _cut(facts, kept, length)
    if draft.value("data.packing"):
        rows = math.ceil(sum(kept) / length)
    if draft.value("data.validation_split") and not facts.held_out:
        rows -= round(rows * draft.value("data.validation_split"))
    return max(rows, 1)


def _batch(draft: Draft, facts: Facts, rows: int) -> int:
    """Sequences of an optimizer step; fewer where there would be too few steps."""
    keys = "training.batch_size", "training.gradient_accumulation_steps"
    wanted, reason = BATCH, "16 to 32 sequences; larger batches learn less from the same rows"
    if rows >= MANY_ROWS:
        wanted = LARGE_BATCH
    fixed = draft.value("training.max_steps") is not None
    while wanted > LEAST_BATCH and not fixed and _steps(draft, rows, wanted) < rates.SHORT:
        wanted //= 2
    if wanted < BATCH:
        reason = f"fewer than 16, as {rows:,} rows would give too few steps"
    micro_given, steps_given = (draft.value(key) if draft.is_given(key) else None for key in keys)
    least = 2 if facts.task == "kto" else 1  # KTO compares the answers of a batch
    micro = micro_given or max(min(MICRO_BATCH, wanted // (steps_given or 1)), least)
    micro = draft.recommend(keys[0], micro, f"rows per forward pass, of {wanted} in a step; {reason}", REGRET)
    passes = max(wanted // micro, 1)
    more = draft.recommend(keys[1], passes, f"forward passes for {micro * passes} rows in a step", REGRET)
    return int(micro * more)


def _steps(draft: Draft, rows: int, batch: int) -> int:
    """Optimizer steps of the run."""
    most = draft.value("training.max_steps")
    return int(most or math.ceil((draft.value("training.epochs") or 1) * math.ceil(rows / batch)))


def _keep_best(draft: Draft, facts: Facts, rows: int, batch: int) -> None:
    """The adapter of the best evaluation, with evaluations often enough to find it."""
    held_out = facts.held_out or round(facts.rows * (draft.value("data.validation_split") or 0.0))
    least = 1 if facts.plain else FEW_HELD_OUT  # a single text has many rows; the best of few answers is luck
    if held_out < least or draft.value("training.early_stopping_patience"):
        return
    reason = "rows are seen again: the held-out loss rises once they are learned by heart"
    kept = draft.recommend("training.keep_best", True, reason, rates.BUILTIN)
    if kept and not draft.is_given("training.save_steps"):
        every = math.ceil(rows / batch / EVALUATIONS)
        draft.recommend("training.eval_steps", every, f"{EVALUATIONS} evaluations in an epoch", rates.BUILTIN)


def _rate(draft: Draft, facts: Facts, rows: int, batch: int, steps: int, repeats: bool) -> None:
    """The learning rate: LoRA's, times the factors of the task and of the method."""
    held_out = 0.0 if facts.held_out else draft.value("data.validation_split") or 0.0
    per_row = facts.answers * (1 - held_out) / rows if facts.task == "sft" else ROW_TOKENS
    tokens = max(round(batch * per_row), 1)
    found = rates.lora_rate(facts.family, facts.hidden, tokens, steps, repeats=repeats)
    names = draft.config.method.names
    factor = default_lr(facts.task, names) / LORA_LR
    reason = found.reason
    if factor != 1:
        what = f"{facts.task} with {', '.join(names)}" if facts.task != "sft" else ", ".join(names)
        reason += f"; x {factor:.3g} for {what}"
    source = found.source + (f"; {rates.BUILTIN}" if found.extrapolated else "")
    value = rates.rounded(found.value * factor)
    if value > rates.HIGHEST:
        reason += f"; {rates.HIGHEST:g} is the highest rate of a configuration"
    draft.recommend("training.lr", min(value, rates.HIGHEST), reason, source)
    if found.extrapolated:
        draft.warnings.append(
            f"a hidden size of {facts.hidden:,} is below those of the public sweep: try half and double the rate"
        )
