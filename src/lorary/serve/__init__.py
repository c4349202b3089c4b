"""Serving: thousands of adapters from one base. Knows nothing of `train` and `cli`.

The path of a request, in reading order:

    request.py                   what is asked, and what comes back
    interface.py                 the engine as everything around it sees it: methods, errors, figures
    open.py                      the engine for a base: the base is loaded, and the way to compute it is chosen
    budget.py                    the default budget: what a full batch and its adapters need
    http/                        requests of OpenAI's, vLLM's, LoRAX's and SGLang's clients; keys, metrics, the page
    engine/batching.py           the engine: one thread that admits, computes and delivers
    pool/registry.py, loader.py  the name of an adapter becomes its content, read from disk and checked
    forms/form.py, flat.py       the content becomes its serving form, whatever its method, in one buffer
    pool/pool.py                 the buffer is copied beside the base, in the budget that keys and values share
    scheduler/decide.py          who joins the batch
    engine/continuous.py         the forward pass, by Transformers' continuous batching
    batch/layers.py, mixed.py    each layer adds to each row the terms of its adapters
    engine/sampler.py, text.py   the next token of each row, and its text

Imports go one way: request and interface, forms, pool, batch, scheduler, budget, engine, open; `http/` needs little but
the interface. `vllm/` starts vLLM in place of this engine, and `ray/` runs replicas of it.
"""
