"""lorary generate: the continuation of a text, with or without an adapter."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer


def generate(
    model: Annotated[str, typer.Argument(help="Adapter or run folder, Hub id, model folder, or builtin:base.")],
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; read from stdin if left out.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model; else the one the adapter names.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a user, through the chat template.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, max=1_000_000, help="Length of the answer at most.")
    ] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=10.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.01, max=1.0, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed of sampling.")] = 0,
) -> None:
    """Continue a text.

    lorary generate out/ "def parse(text):" uses the adapter of a run; lorary generate builtin:base the base alone.
    """
    import torch

    from lorary.adapters.resolve import find_model, load_with_adapter
    from lorary.model.cached import cached
    from lorary.model.loading.from_pretrained import load_tokenizer

    prompt = _text(prompt)
    folder, section = find_model(model, base)
    tokenizer = load_tokenizer(section)
    ids = _ids(tokenizer, prompt, chat)
    loaded = load_with_adapter(section, folder)
    most = _room(loaded, len(ids), max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    torch.manual_seed(seed)
    row, padding = torch.tensor([ids]), tokenizer.pad_token_id
    with torch.inference_mode(), cached(loaded):
        output = loaded.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=most, pad_token_id=padding, **sampling
        )
    print(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def _text(prompt: str | None) -> str:
    """The prompt, from the argument or from stdin. Invalid UTF-8 arrives as lone surrogates."""
    from lorary.errors import ConfigError, DataError, Diagnostic

    try:
        if prompt is None:
            if sys.stdin.isatty():
                raise ConfigError("no prompt: give one as an argument or on stdin")
            prompt = sys.stdin.read()
        prompt.encode()
    except UnicodeError as error:
        problem = Diagnostic("prompt", "holds bytes that are not UTF-8", "save it as UTF-8")
        raise DataError("cannot read the prompt:", [problem]) from error
    return prompt


def _room(model: Any, tokens: int, wanted: int) -> int:
    """The number of tokens that may follow a prompt within the model's context."""
    from lorary.errors import DataError, Diagnostic
    from lorary.layers.rope import max_context, text_config

    limit = max_context(text_config(model))
    if limit is None:
        return wanted
    if tokens >= limit:
        what = f"has {tokens:,} tokens, but the model's context is {limit:,}"
        raise DataError("the prompt is too long:", [Diagnostic("prompt", what, "shorten it")])
    return int(min(wanted, limit - tokens))


def _ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """The tokens of a prompt, encoded as in training."""
    from lorary.errors import DataError, Diagnostic
    from lorary.train.data.chat import render, require_template
    from lorary.train.data.encode import encode_text

    if chat:
        require_template(tokenizer, "--chat")
        text = render(tokenizer, [{"role": "user", "content": prompt}], prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = encode_text(tokenizer, prompt) or [i for i in (tokenizer.bos_token_id,) if i is not None]
    if not ids:
        raise DataError("cannot generate text:", [Diagnostic("prompt", "is empty, and the tokenizer has no BOS")])
    return ids
