"""Serving: thousands of adapters from one base. Knows nothing of `train` and `cli`.

The way of a request, in reading order:

    request.py                   what is asked, and what comes back
    open.py                      the engine for a base: loads it, and chooses how it is computed
    http/                        requests of OpenAI's, vLLM's, LoRAX's and SGLang's clients; keys, metrics, the page
    engine/batching.py           the engine: one thread that admits, computes and delivers
    pool/registry.py, loader.py  the name of an adapter becomes its content, read from disk and checked
    forms/form.py                the content becomes its serving form, whatever its method
    pool/pool.py                 the form is copied beside the base, within the budget that keys and values share
    scheduler/decide.py          who joins the batch
    engine/continuous.py         the forward pass, by Transformers' continuous batching
    batch/layers.py, mixed.py    each layer adds to each row what its adapters add
    engine/sampler.py, text.py   the next token of each row, and its text

`vllm/` and `ray/` start other engines in place of this one.
"""
