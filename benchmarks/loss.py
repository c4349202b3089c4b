"""The loss step on a CPU: time of head + loss, forward and backward, for a share of labelled tokens.

    python benchmarks/loss.py [--tokens 2048] [--hidden 512] [--vocabulary 32000] [--repeats 5]

Compares, interleaved in one process: Transformers' own loss over all logits, TRL's head that never builds
them, and lorary's, which sends labelled tokens alone to the head. The model has no layers, so that nothing
but the loss is timed. Reports the least of the repeats and the size of everything kept for the backward pass.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from lorary.model.labelled_head import LabelledHead

Step = Callable[[Tensor, Tensor], Tensor]


def build(hidden: int, vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1, vocab_size=vocabulary
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    model.enable_input_require_grads()  # as in training, the gradient flows on into the (absent) layers
    return model


def steps(model: nn.Module) -> dict[str, Step]:
    trl, bare, full = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    add_fused_lm_head(trl, outputs=("log_probs", "entropy", "is_top1"))
    LabelledHead(bare, statistics=()).install()
    LabelledHead(full).install()
    return {
        "transformers, all logits": lambda ids, y: model(input_ids=ids, labels=y).loss,
        "trl, fused head": lambda ids, y: trl(input_ids=ids, labels=y, fused_lm_head=True).loss,
        "lorary, entropy and accuracy too": lambda ids, y: full(input_ids=ids, labels=y, fused_lm_head=True).loss,
        "lorary, loss alone": lambda ids, y: bare(input_ids=ids, labels=y, fused_lm_head=True).loss,
    }


def kept_bytes(step: Step, ids: Tensor, labels: Tensor) -> int:
    """Bytes of the distinct storages that the forward pass keeps for the backward pass."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(ids, labels)
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    named = steps(build(options.hidden, options.vocabulary))
    ids = torch.randint(0, options.vocabulary, (4, options.tokens // 4))
    print(f"{options.tokens} tokens, hidden {options.hidden}, vocabulary {options.vocabulary:,}")
    for share in (0.25, 1.0):
        labels = ids.clone()
        labels[:, : int(ids.shape[1] * (1 - share))] = -100
        best = dict.fromkeys(named, float("inf"))
        for step in named.values():
            step(ids, labels)  # the first call looks at the model
        for _ in range(options.repeats):
            for name, step in named.items():
                start = time.perf_counter()
                step(ids, labels).backward()
                best[name] = min(best[name], time.perf_counter() - start)
        reference = best["transformers, all logits"]
        for name, seconds in best.items():
            kept = kept_bytes(named[name], ids, labels) / 2**20
            ratio = reference / seconds
            print(f"  {share:4.0%} labelled  {name:34} {seconds * 1e3:7.0f} ms  {ratio:4.1f} x  keeps {kept:6.0f} MiB")


if __name__ == "__main__":
    main()
