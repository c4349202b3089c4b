"""advise: the settings of a run from its model, its data and the machine, each with its reason and source."""

from __future__ import annotations

from lorary.errors import ConfigError
from lorary.train.advice.advice import Advice
from lorary.train.advice.draft import Draft
from lorary.train.advice.facts import read
from lorary.train.advice.fit import fit
from lorary.train.advice.gradient import gradient_ranks
from lorary.train.advice.machine import Machine
from lorary.train.advice.precision import precision_rules
from lorary.train.advice.rules import DATA, data_rules, method_rules, training_rules
from lorary.train.config.config import Config
from lorary.train.config.conflicts import contradictions


def advise(config: Config, machine: Machine | None = None, *, ranks: str = "uniform") -> Advice:
    """The advised settings of a run. Reads the data and the model's configuration; weights only for gradient ranks.

    Args:
        config: of the run: at least a model and data. The keys that it sets are kept, and the others follow them.
        machine: that will train; None for this one.
        ranks: `uniform`: one rank for all layers; `gradient`: a rank for each layer from one batch's gradients, with
            as many trained numbers in all.

    Raises:
        LoraryError: the configuration, the model or the data cannot be used, with every reason.

    >>> print(advise(from_dict({"model": "builtin:base", "data": "builtin:docstrings"})))
    """
    subject = read(config)
    draft, facts = Draft(config, subject.config), subject.facts
    machine = machine or Machine.here()
    draft.recommend("task", facts.task, f"it trains on rows such as these {facts.rows:,}", DATA)
    data_rules(draft, facts)
    method_rules(draft, facts)
    training_rules(draft, facts)
    precision_rules(draft, subject, machine)
    fit(draft, subject, machine)
    if ranks == "gradient":
        gradient_ranks(draft, subject)
    final = Config.model_validate(draft.config.model_dump(exclude_unset=True)).with_notes(*config.notes)
    if problems := contradictions(final.resolve()):
        raise ConfigError("the advised configuration contradicts what you have set:", problems)
    notes = tuple(note for note in subject.notes if note not in draft.warnings)  # each is said once
    return Advice(final, tuple(draft.recommendations), tuple(draft.warnings), notes, facts)
