"""lorary generate: a model's continuation of a text, with or without an adapter."""

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
        int, typer.Option("--max-new-tokens", min=1, max=1_000_000, help="Longest answer.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=10.0, help="0: always the likeliest.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.01, max=1.0, help="Share of probability drawn from.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the drawing, where temperature is above 0.")] = 0,
) -> None:
    """Continue a text.

    lorary generate out/ "def parse(text):" uses the adapter of a run; lorary generate builtin:base the base alone.
    """
    from lorary.adapters.resolve import model_of, with_adapter
    from lorary.model.loading.from_pretrained import load_tokenizer

    prompt = _text(prompt)
    folder, section = model_of(model, base)
    tokenizer = load_tokenizer(section)
    ids = _ids(tokenizer, prompt, chat)
    loaded = with_adapter(section, folder)
    most = _room(loaded, len(ids), max_new_tokens)
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    made = _continued(loaded, ids, seed, max_new_tokens=most, pad_token_id=tokenizer.pad_token_id, **drawing)
    print(tokenizer.decode(made, skip_special_tokens=True))


def _text(prompt: str | None) -> str:
    """The prompt, from the argument or from stdin. Bytes that are no text reach a program as half characters."""
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
    """How many tokens may follow a prompt: a model has learnt nothing about positions beyond its own."""
    from lorary.errors import DataError, Diagnostic
    from lorary.layers.rope import max_context, text_config

    known = max_context(text_config(model))
    if known is None:
        return wanted
    if tokens >= known:
        what = f"has {tokens:,} tokens, and the model knows {known:,} positions"
        raise DataError("the prompt is too long:", [Diagnostic("prompt", what, "shorten it")])
    return int(min(wanted, known - tokens))


def _continued(model: Any, ids: list[int], seed: int, **words: Any) -> list[int]:
    """The tokens that the model puts after `ids`."""
    import torch

    torch.manual_seed(seed)
    row = torch.tensor([ids])
    with torch.inference_mode():
        made: list[int] = model.generate(row, attention_mask=torch.ones_like(row), **words)[0, len(ids) :].tolist()
    return made


def _ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """The prompt's tokens, as they were in training."""
    from lorary.errors import DataError, Diagnostic
    from lorary.train.data.chat import render, require_template
    from lorary.train.data.encode import plain

    if chat:
        require_template(tokenizer, "--chat")
        text = render(tokenizer, [{"role": "user", "content": prompt}], prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = plain(tokenizer, prompt) or [i for i in (tokenizer.bos_token_id,) if i is not None]
    if not ids:
        raise DataError("cannot generate text:", [Diagnostic("prompt", "is empty, and the tokenizer has no BOS")])
    return ids
