"""A tokenizer of 300 byte-level tokens, made in code: real, fast, and without a download."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# As a template without {% generation %} marks writes a conversation.
PLAIN_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer(
    *,
    bos: bool = True,
    extra: Sequence[str] = (),
    template: str | None = None,
    prefix_space: bool = False,
) -> PreTrainedTokenizerFast:
    """`bos`: whether it puts `<s>` before every text. `prefix_space`: words begin with `▁`, as SentencePiece has it."""
    bpe = Tokenizer(models.BPE())
    if prefix_space:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
    text = "hello world, the answer is two three; user assistant system"
    alphabet = list(text) if prefix_space else pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", *extra]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text] * 3, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = template
    return made


def shown(tokenizer: PreTrainedTokenizerFast, row: dict[str, list[int]]) -> str:
    """A row as text, [[ ]] around what is learnt."""
    text = "".join(
        f"[[{tokenizer.decode([i])}]]" if label != -100 else tokenizer.decode([i])
        for i, label in zip(row["input_ids"], row["labels"], strict=True)
    )
    return text.replace("]][[", "")
