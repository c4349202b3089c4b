"""Loss, perplexity and accuracy: equal to a direct computation, whatever the batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import lorary
from lorary.analysis.evaluation import Evaluation, evaluate, score_labels, score_rows
from lorary.errors import DataError
from tests.train.runs import adapted, rows


def direct(model: Any, data: Any) -> tuple[float, float, int]:
    """(mean loss, accuracy, tokens) by Transformers' own logits, one row at a time and without padding."""
    nats, right, tokens = 0.0, 0, 0
    for row in data:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"][1:])
        logits, labels = logits[labels != -100], labels[labels != -100]
        nats += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        tokens += len(labels)
    return nats / tokens, right / tokens, tokens


@pytest.fixture(scope="module")
def model() -> Any:
    made = adapted().eval()
    for parameter in (p for p in made.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return made


@pytest.mark.parametrize("size", [1, 4, 23, 100])
def test_the_means_are_over_tokens_for_every_batch_size(model: Any, size: int) -> None:
    data, done = list(rows()), []
    loss, accuracy, tokens = direct(model, data)
    found = evaluate(model, data, batch_size=size, pad=1, progress=done.append)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert (found.accuracy, found.tokens, found.rows) == (accuracy, tokens, len(data))
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert sum(done) == len(data)
    assert max(done) <= size
    of_batches = [direct(model, data[i : i + 4])[0] for i in range(0, len(data), 4)]
    assert abs(sum(of_batches) / len(of_batches) - loss) > 1e-4, "a mean of batches would be another number"


def test_the_model_is_left_as_it_was(model: Any) -> None:
    model.train()
    forward = model.__dict__.get("forward")
    evaluate(model, list(rows())[:2])
    assert model.training
    assert model.__dict__.get("forward") is forward
    with lorary.disabled(model):
        base = evaluate(model, list(rows())[:2])
    assert base.loss != evaluate(model, list(rows())[:2]).loss
    model.eval()


def test_rows_that_cannot_be_evaluated_are_refused(model: Any) -> None:
    unlabelled = [{"input_ids": [5, 6], "labels": [5, -100]}]  # the first token is not predicted
    with pytest.raises(DataError, match="no token of the rows has a label\n      hint: give rows with answers"):
        evaluate(model, unlabelled)
    small = GPT2LMHeadModel(GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=1, vocab_size=20))
    long = [{"input_ids": [3] * 9, "labels": [3] * 9}]
    expected = "the longest row has 9 tokens, and the model has learned 8 positions\n      hint: set --max-length to 8"
    with pytest.raises(DataError, match=expected):
        evaluate(small, long)


def test_numbers_that_json_lacks() -> None:
    assert Evaluation(1, 1, 800.0, 0.0).to_dict()["perplexity"] is None
    assert Evaluation(1, 1, float("nan"), 0.0).to_dict()["loss"] is None


def test_scores_are_those_of_each_row_whatever_its_neighbours(model: Any) -> None:
    data = list(rows())
    found = score_rows(model, data, batch_size=4, pad=1)
    for i, row in enumerate(data):
        loss, accuracy, tokens = direct(model, [row])
        assert found.tokens[i] == tokens
        assert found.nats[i] == pytest.approx(loss * tokens, rel=1e-5)
        assert found.right[i] == round(accuracy * tokens)
    assert found.loss == evaluate(model, data, batch_size=4, pad=1).loss


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_scores_of_labels_are_those_of_each_row(problem: str) -> None:
    torch.manual_seed(3)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.num_labels, config.problem_type = 3, problem
    classifier = BertForSequenceClassification(config)
    one = problem.startswith("single")
    labels: list[Any] = [i % 3 if one else [float(i % 2), 0.0, 1.0] for i in range(7)]
    data = [{"input_ids": list(range(1, 4 + i)), "label": label} for i, label in enumerate(labels)]
    found = score_labels(classifier, data, batch_size=3)
    assert classifier.training  # as it was
    assert found.tokens == (1,) * 7
    for i, row in enumerate(data):
        label = torch.tensor([row["label"]])
        with torch.no_grad():
            output = classifier.eval()(input_ids=torch.tensor([row["input_ids"]]), labels=label)
        right = output.logits.argmax() == label if one else ((output.logits > 0) == (label > 0.5)).all()
        assert found.nats[i] == pytest.approx(float(output.loss), rel=1e-5)
        assert found.right[i] == int(right)
