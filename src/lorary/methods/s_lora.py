"""S-LoRA: y = g (W x + b) + s B_i A_i x + c for row i of a batch: each row has an adapter of its own.

The base's product W x is computed for all rows at once, and what each row's adapter adds to it is not merged but
computed beside it, at the adapter's own rank. Adapters and the attention's keys and values take pages from one pool of
memory (unified paging), so that thousands of adapters on disk can be served with a few of them beside the base. It is
not a component of a method but a way to serve trained adapters: `lorary serve`.

Sheng et al. 2023, arXiv:2311.03285, sections 4 (batching) and 5 (unified paging).

Differs from the authors' code: every method of this package is served, not LoRA at q, k, v and o alone, so that there
are a gain g (DoRA, GLoRA) and a shift c as well; an adapter's tensors lie in one run of pages, because layers of
different widths have no common page; least recently used adapters are evicted, where theirs evict all that no running
request uses; an adapter that waits too long is admitted although others keep the batch full.
"""

from __future__ import annotations

from lorary.spec.presets import PlanFunction, register_plan_function

register_plan_function(
    PlanFunction(
        "s-lora",
        about=__doc__ or "",
        citation="Sheng et al. 2023, arXiv:2311.03285",
        when="To serve several adapters of one base from one process, few or thousands.",
        changes="how trained adapters are served",
        what="is not a method: it serves adapters that are trained already",
        say="`lorary serve FOLDER ... --base MODEL`",
    )
)
