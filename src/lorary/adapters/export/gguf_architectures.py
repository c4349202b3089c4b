"""The architectures whose adapters lorary writes as GGUF: `tests/clients/llama_cpp.py` has run each in llama.cpp.

llama.cpp's converter renames every tensor, which the `gguf` package's own map repeats, and changes some: it reorders
the rows of q and k where its kernel rotates neighbouring rows instead of the halves of a head. An adapter of a changed
tensor has to be changed alike; for an architecture whose converter is not known, it would be silently wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lorary.adapters.export.plain_factors import MERGE
from lorary.errors import Diagnostic, FileError
from lorary.files.strict_json import show
from lorary.spec.site import Site

if TYPE_CHECKING:
    from gguf import TensorNameMap


class Architecture(NamedTuple):
    """A model architecture in llama.cpp.

    Args:
        name: its name there, `general.architecture`.
        reordered: the projections whose rows its converter reorders.
        head: whether it has an LM head and an embedding of its own, if Transformers' configuration does not tie them.
    """

    name: str
    reordered: tuple[str, ...] = ()
    head: bool = True


_QK = ("q_proj", "k_proj")
_LLAMA = Architecture("llama", _QK)

# `model_type` in Transformers -> the architecture.
ARCHITECTURES = {
    "apertus": Architecture("apertus"),
    "arcee": Architecture("arcee", _QK),
    "cohere": Architecture("command-r", head=False),
    "ernie4_5": Architecture("ernie4_5"),
    "exaone4": Architecture("exaone4"),
    "gemma": Architecture("gemma", head=False),
    "gemma2": Architecture("gemma2", head=False),
    "gemma3_text": Architecture("gemma3", head=False),
    "glm4": Architecture("glm4"),
    "gpt2": Architecture("gpt2", head=False),
    "gpt_bigcode": Architecture("starcoder", head=False),
    "granite": Architecture("granite", _QK),
    "hunyuan_v1_dense": Architecture("hunyuan-dense"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "nemotron": Architecture("nemotron"),
    "olmo": Architecture("olmo", _QK),
    "olmo2": Architecture("olmo2"),
    "olmo3": Architecture("olmo2"),
    "phi": Architecture("phi2"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "seed_oss": Architecture("seed_oss"),
    "smollm3": Architecture("smollm3", _QK),
    "stablelm": Architecture("stablelm"),
    "starcoder2": Architecture("starcoder2", head=False),
}


def reorder_rows(B: Tensor, site: Site, architecture: Architecture, config: Any) -> Tensor:
    """B [out, R] with its rows in the order of llama.cpp's weight.

    Within each head, Transformers rotates row i with row i + half, llama.cpp row 2 i with row 2 i + 1.
    """
    leaf = site.name.rpartition(".")[2]
    if leaf not in architecture.reordered:
        return B
    key_value = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = key_value if leaf == "k_proj" else config.num_attention_heads
    return B.reshape(heads, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)


def order_of_rows(site: Site, architecture: Architecture, config: Any) -> Tensor | None:
    """For each row of a site's B, its place in llama.cpp's file; None where the order is the same."""
    rows = torch.arange(site.out_features)[:, None]
    reordered = reorder_rows(rows, site, architecture, config)
    return None if reordered is rows else reordered.flatten().argsort()


def architecture_of(root: Any, headline: str) -> Architecture:
    """The architecture of a model in llama.cpp.

    Raises:
        FileError: lorary does not know how its converter changes the weights.
    """
    kind = getattr(getattr(root, "config", None), "model_type", type(root).__name__)
    if kind not in ARCHITECTURES:
        what = f"llama.cpp's form of {show(kind)} is not known; lorary knows it of {', '.join(ARCHITECTURES)}"
        fix = f"{MERGE}, and convert the merged model with llama.cpp's convert_hf_to_gguf.py"
        raise FileError(headline, [Diagnostic("base", what, fix)])
    return ARCHITECTURES[kind]


def tensor_names(root: Any, architecture: Architecture, headline: str) -> TensorNameMap:
    """llama.cpp's name of each module.

    Raises:
        FileError: the installed release of `gguf` is older than the architecture.
    """
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture.name not in numbers:
        what = f"the installed package `gguf` does not know llama.cpp's {architecture.name}"
        raise FileError(headline, [Diagnostic("", what, "pip install --upgrade gguf")])
    return gguf.get_tensor_name_map(numbers[architecture.name], root.config.num_hidden_layers)
