"""LoRAHub: y = W x + b + s (sum of w_i B_i) (sum of w_i A_i) x, w found on a few examples without gradients.

Adapters of known tasks become one for an unseen task: a gradient-free search chooses the weight of each on a handful of
examples, with an L1 penalty on the weights. It is not a component of a method but a function of trained adapters,
`lorary.lorahub`, in two forms. `factor` is the paper's sum of the factors: of the rank of one adapter, with cross terms
w_i w_j B_i A_j, and with w_i^2 before an adapter's own term, whose sign it cannot change. `product` is the exact sum of
the updates, w_i B_i A_i.

Huang et al. 2023, arXiv:2307.13269, equations 1 and 2 (section 3).

Differs from the authors' code: the search is CMA-ES alone, not nevergrad's NGOpt, which chooses among several; the loss
is the mean over all labels, while theirs is the sum over batches divided by the number of examples, five times smaller
for one batch of five; a scale s that differs between adapters is part of B.
"""

from __future__ import annotations

from lorary.spec.presets import PlanFunction, register_plan_function

register_plan_function(
    PlanFunction(
        "lorahub",
        about=__doc__ or "",
        citation="Huang et al. 2023, arXiv:2307.13269",
        when="For a new task with a handful of examples, if there are adapters of related tasks.",
        changes="how much of each trained adapter is in a mixture",
        what="is not a method: it mixes adapters that are trained already",
        say="`lorary lorahub A B --examples FILE --out DIR`, or call lorary.lorahub",
    )
)
