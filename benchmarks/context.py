"""What training with shifted groups costs in quality: the built-in base from 256 to 1,024 tokens, perplexity by length.

    python benchmarks/context.py [--processes 2]   # an hour on one core; started again, it goes on
    python benchmarks/context.py --small           # two steps of everything, to see that it runs

LongLoRA trained with shifted groups and with full attention: equal starts, equal batches, equal steps. Learning rates
are chosen on held-out text that reports nothing; full attention is shown at the rate that is best for shifted groups
and at the one that is best for itself. Float32, one thread for each run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lorary
from cases import machine
from lorary import builtin
from lorary.analysis.long_context import Context, Length, by_length, losses, stretches
from lorary.analysis.long_context_plot import context_svg
from lorary.builtin import corpora

KNOWN, LONG, BATCH, WARM_UP, CLIP = 256, 1024, 4, 10, 1.0
LENGTHS = (64, 128, 256, 512, 1024, 2048)
RATES = {"linear": (1e-3, 3e-3), "yarn": (3e-4, 1e-3)}  # by how positions are divided
SEEDS = (0, 1)
DATA = "builtin:python"


@dataclass(frozen=True)
class Job:
    """One model: how its positions are divided, and how it was trained; no rate: not at all.

    Args:
        form: of the positions; none: the base as it is.
        shifted: trained in shifted groups.
        lr: the peak learning rate.
        seed: of the adapters' start and of the batches.
        steps: optimizer steps.
    """

    form: str | None = None
    shifted: bool = False
    lr: float | None = None
    seed: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Judged:
    """Mean nats per predicted token: at the long length on the text that chooses, by length on that of the report."""

    tuning: float
    report: dict[int, float]


@cache
def tokens(split: str) -> Tensor:
    """All tokens of one half of the data, one file after another."""
    tokenizer = builtin.load_tokenizer()
    texts = (row["text"] for row in corpora.load(DATA, split))
    return torch.tensor([i for text in texts for i in tokenizer(text + "\n", verbose=False)["input_ids"]])


def batches(seed: int, steps: int) -> Iterable[Tensor]:
    """Random windows of the training half, [BATCH, LONG]: the same for every arm."""
    ids, generator = tokens("train"), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(ids) - LONG, (BATCH,), generator=generator)
        yield torch.stack([ids[start : start + LONG] for start in starts])


def judge(model: nn.Module, budget: int) -> Judged:
    """The losses of a model on both halves of the held-out files."""

    @torch.inference_mode()
    def scores(ids: Tensor, start: int) -> Tensor:
        said = model(input_ids=ids).logits[:, start - 1 : -1].log_softmax(-1)
        found: Tensor = said.gather(-1, ids[:, start:, None])[..., 0]
        return found

    model.eval()
    held_out = tokens("validation")
    tuning, text = (stretches(half, LENGTHS[-1], budget) for half in held_out.split(-(-len(held_out) // 2)))
    report = {n: by_length(losses(scores, text, n)).nats for n in LENGTHS}
    return Judged(by_length(losses(scores, tuning, LONG)).nats, report)


def trained(job: Job) -> nn.Module:
    """The model of a job."""
    model = builtin.load_model()
    if job.form is None:
        return model
    method = lorary.method("longlora", length=LONG, rope=job.form, shifted=job.shifted, r=8, alpha=16)
    lorary.attach(model, lorary.plan(model, method), seed=job.seed)
    if job.lr is None:
        return model
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=job.lr), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    model.train()
    for ids in batches(job.seed, job.steps):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def done(job: Job, budget: int) -> Judged:
    """Train one model and judge it."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    return judge(trained(job), budget)


class Ledger:
    """Every finished job, kept in one file at once."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path, self.options = path, options
        self.found: dict[Job, Judged] = {}
        if path.exists():
            for row in json.loads(path.read_text(encoding="utf-8"))["runs"]:
                report = {int(n): nats for n, nats in row["report"].items()}
                self.found[Job(**row["job"])] = Judged(row["tuning"], report)

    def run(self, jobs: Iterable[Job], what: str) -> None:
        """Do what is not done yet."""
        left = [job for job in dict.fromkeys(jobs) if job not in self.found]
        with ProcessPoolExecutor(self.options.processes) as pool:
            waiting = [(job, pool.submit(done, job, self.options.tokens)) for job in left]
            for job, result in track(waiting, what, disable=not left):
                self.found[job] = result.result()
                self.write()

    def write(self) -> None:
        """Beside the old file, and put in its place."""
        runs = [{"job": asdict(job)} | asdict(judged) for job, judged in self.found.items()]
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps({"machine": machine(self.options), "runs": runs}, indent=1) + "\n", "utf-8")
        os.replace(beside, self.path)


def report(ledger: Ledger, groups: dict[str, list[Job]]) -> list[Context]:
    """The mean over the seeds of each group of jobs, as the plot takes it."""
    contexts = []
    for name, jobs in groups.items():
        nats = {n: statistics.fmean(ledger.found[job].report[n] for job in jobs) for n in LENGTHS}
        reads = LONG if jobs[0].form else KNOWN
        contexts.append(Context(name, reads, tuple(Length(n, 0, 0, x) for n, x in nats.items()), ()))
    return contexts


def gap(ledger: Ledger, ours: list[Job], theirs: list[Job]) -> str:
    """How much higher the perplexity at the long length is: the mean over paired seeds, and its range."""
    pairs = zip(ours, theirs, strict=True)
    found = [math.exp(ledger.found[a].report[LONG] - ledger.found[b].report[LONG]) - 1 for a, b in pairs]
    return f"{statistics.fmean(found):+.1%} ({min(found):+.1%} to {max(found):+.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=32_768, help="of held-out text on which a model is judged")
    parser.add_argument("--small", action="store_true", help="two steps, one seed: to see that it runs")
    parser.add_argument("--out", type=Path, help="default: results/context.json; a passing file with --small")
    options = parser.parse_args()
    seeds = SEEDS[:1] if options.small else SEEDS
    if options.small:
        options.steps, options.tokens = 2, 2048
    folder = Path(tempfile.mkdtemp()) if options.small else Path(__file__).parent / "results"
    ledger = Ledger(options.out or folder / "context.json", options)

    def jobs(form: str, shifted: bool, lr: float) -> list[Job]:
        return [Job(form, shifted, lr, seed, options.steps) for seed in seeds]

    def best(form: str, shifted: bool) -> float:
        return min(RATES[form], key=lambda lr: ledger.found[jobs(form, shifted, lr)[0]].tuning)

    starts = {form: [Job(form)] for form in RATES}
    ledger.run([Job(), *(job for start in starts.values() for job in start)], "as they are")
    both = (True, False)
    ledger.run([jobs(form, s, lr)[0] for form in RATES for s in both for lr in RATES[form]], "learning rates")
    groups, console = {"base": [Job()]}, Console(width=140)
    gaps = Table("positions", "lr", "shifted groups over full attention", "full attention's best lr", "over that")
    for form in RATES:
        ours, theirs = best(form, True), best(form, False)
        arms = jobs(form, True, ours), jobs(form, False, ours), jobs(form, False, theirs)
        ledger.run([job for arm in arms for job in arm], form)
        groups |= {f"{form}, untrained": starts[form]}
        groups |= {f"{form}, shifted groups": arms[0], f"{form}, full attention": arms[2]}
        gaps.add_row(form, f"{ours:g}", gap(ledger, arms[0], arms[1]), f"{theirs:g}", gap(ledger, arms[0], arms[2]))
    contexts = report(ledger, groups)
    table = Table("perplexity", *(f"{n:,}" for n in LENGTHS), title=f"{DATA}, held out")
    for context in contexts:
        table.add_row(context.model, *(f"{length.perplexity:.2f}" for length in context.lengths))
    console.print(table, gaps)
    if not options.small:
        title = f"{builtin.NAME} from {KNOWN} to {LONG:,} tokens"
        ledger.path.with_suffix(".svg").write_text(context_svg(contexts, title), encoding="utf-8")


if __name__ == "__main__":
    main()
