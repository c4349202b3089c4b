"""sentence-transformers' trainer and Lightning's, where they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import lorary
from lorary import builtin
from lorary.errors import StateError
from tests.train.other_trainers.trainers import METHODS, model, same, values


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The built-in base in float32: sentence-transformers reads adapters in the precision of their base."""
    folder = tmp_path_factory.mktemp("base")
    builtin.load_model().save_pretrained(folder)
    builtin.load_tokenizer().save_pretrained(folder)
    return str(folder)


def embedder(base: str, method: str) -> Any:
    """A SentenceTransformer over the base, its queries and values adapted."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words = Transformer(base)
    made = sentence_transformers.SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension())])
    presets, options = METHODS[method]
    inside = made[0].auto_model
    lorary.attach(inside, lorary.plan(inside, lorary.method(*presets, **options), targets="attention-qv"))
    return made


def embed(folder: Path, made: Any, *, resume: Path | None = None, **settings: Any) -> Any:
    """sentence-transformers' trainer after 4 steps."""
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments

    rows = Dataset.from_list([{"anchor": f"a {i}", "positive": f"b {i}"} for i in range(16)])
    inside = made[0].auto_model
    common: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "report_to": "none"}
    common |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "log_level": "error"}
    trainer = SentenceTransformerTrainer(
        made,
        args=SentenceTransformerTrainingArguments(str(folder), **(common | settings)),
        train_dataset=rows,
        eval_dataset=rows,
        loss=MultipleNegativesRankingLoss(made),
        optimizers=(lorary.optimizer(inside, lr=1e-3), None),
        callbacks=[lorary.TrainerCallback(inside)],
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def test_sentence_transformers_saves_resumes_and_loads_the_best(tmp_path: Path, base: str) -> None:
    whole, resumed, best = embedder(base, "lora+"), embedder(base, "lora+"), embedder(base, "lora+")
    embed(tmp_path, whole)
    embed(tmp_path, resumed, resume=tmp_path / "checkpoint-2")
    inside = [made[0].auto_model for made in (whole, resumed, best)]
    assert same(inside[0], inside[1])
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    run = embed(tmp_path / "b", best, **settings, metric_for_best_model="eval_loss", greater_is_better=True)
    chosen = Path(run.state.best_model_checkpoint)
    fresh = embedder(base, "lora+")[0].auto_model
    fresh.load_adapter(chosen)
    assert same(fresh, inside[2])
    whole.save(str(tmp_path / "final"))
    again = type(whole)(str(tmp_path / "final"))
    assert torch.allclose(
        again.encode(["x"], convert_to_tensor=True).float(), whole.encode(["x"], convert_to_tensor=True), atol=2e-2
    )


def test_sentence_transformers_runs_the_rules(tmp_path: Path, base: str) -> None:
    made = embedder(base, "adalora")
    embed(tmp_path, made, save_strategy="no")
    ranks = [t.numel() for name, t in values(made[0].auto_model).items() if name.endswith(".E")]
    assert sum(ranks) == 2 * len(ranks)


def test_an_adapter_on_a_whole_sentence_transformer_is_not_saved_in_part(tmp_path: Path, base: str) -> None:
    made = embedder(base, "lora+")
    lorary.detach(made[0].auto_model)
    lorary.attach(made, lorary.plan(made, lorary.method("lora", r=2), targets=["*q_proj"]))
    with pytest.raises(StateError, match=r"(?s)attached to the whole SentenceTransformer.*lorary.attach\(part, plan\)"):
        made.save(str(tmp_path))


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated", "ignore::UserWarning:lightning")
@pytest.mark.parametrize("method", ["adalora", "lora+"])
def test_lightning_equals_a_plain_loop(method: str) -> None:
    lightning = pytest.importorskip("lightning")
    tokens = torch.randint(5, 280, (16, 10))

    class Lit(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, inside: Any) -> None:
            super().__init__()
            self.inside = inside

        def training_step(self, batch: Any, _: int) -> Any:
            return self.inside(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            optimizer = lorary.optimizer(self.inside, lr=1e-2)
            lorary.rules(self.inside, int(self.trainer.estimated_stepping_batches), optimizer, automatic=True)
            return optimizer

    theirs, ours = model(method).train(), model(method).train()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(max_steps=4, accelerator="cpu", accumulate_grad_batches=2, gradient_clip_val=0.05, **quiet).fit(
        Lit(theirs), torch.utils.data.DataLoader(tokens, batch_size=2)
    )
    optimizer = lorary.optimizer(ours, lr=1e-2)
    lorary.rules(ours, 4, optimizer, automatic=True)
    for i, batch in enumerate(tokens.split(2)):
        (ours(input_ids=batch, labels=batch).loss / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.05)
            optimizer.step()
            optimizer.zero_grad()
    here, there = values(ours), values(theirs)
    assert {k: t.shape for k, t in here.items()} == {k: t.shape for k, t in there.items()}
    assert all(torch.allclose(t, there[name], atol=1e-6) for name, t in here.items())
    assert not same(ours, model(method))
