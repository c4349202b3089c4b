"""Tokenizers of four kinds, made in code, that all know `<s>`, `</s>` and `<|end|>` as special tokens."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.train.small import tokenizer

SPECIAL = ("<s>", "</s>", "<|end|>")
_WORDS = ("hello", "world", "the", "answer", "is", "two", "three", "user", "assistant")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789<>|/_.,?\n"


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    return tokenizer(extra=("<|end|>",))


def prefixed() -> PreTrainedTokenizerFast:
    """BPE with SentencePiece's `▁`, as Llama 2 and Mistral have it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIAL), initial_alphabet=list(_LETTERS), show_progress=False
    )
    made.train_from_iterator([" ".join(_WORDS)] * 3, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _fast(made)


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram, as T5 and XLM-R have it: control tokens are pieces of the vocabulary."""
    pieces = [(token, 0.0) for token in (*SPECIAL, "<unk>")] + [("▁", -3.0)]
    pieces += [(f"▁{word}", -4.0) for word in _WORDS] + [(letter, -6.0) for letter in _LETTERS]
    made = Tokenizer(models.Unigram(pieces, unk_id=3))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _fast(made, unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's WordPiece, lower case, whose decoding sets spaces of its own."""
    words = [*SPECIAL, "[UNK]", *_WORDS, *_LETTERS.strip(), *(f"##{letter}" for letter in _LETTERS.strip())]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return _fast(made, unk_token="[UNK]")


def _fast(made: Tokenizer, **named: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<|end|>"],
        **named,
    )


ALL = {"byte-level": byte_level, "prefixed": prefixed, "unigram": unigram, "wordpiece": wordpiece}
