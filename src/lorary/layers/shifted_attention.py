"""Shifted sparse attention (S²) in a Transformers model: registered as an attention implementation, used in training.

In evaluation mode the model's configuration names its own attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, StateError
from lorary.kernels.shifted_attention import GroupLayout, group_size, shifted, shifted_ragged
from lorary.layers.transformers_internals import attention_of, set_attention, uses_attention_interface

MaskFunction = Callable[..., Any]  # (batch, head, query, key) -> whether the query attends to the key
_NAME = "lorary_shifted_{}"
_CHILD = "_lorary_attention"  # the name of the switching submodule
_FULL = "train with shifted=False: full attention"
# arguments of attention layers that grouped attention does not implement
_UNSUPPORTED = {
    "softcap": "caps attention scores",
    "s_aux": "has attention sinks",
    "position_bias": "adds a bias by position",
    "head_mask": "masks whole heads",
    "cache": "reads a paged cache",
}


class TrainingOnlyAttention(nn.Module):
    """A submodule without parameters that selects S² when the model is in training mode.

    It follows the mode however it is set: by `train`, `eval` or the `training` flag, on the model or a part of it.

    Args:
        model: of Transformers.
        config: of its language part, which names the attention implementation.
        groups: the longest sequence of a batch is divided into this many groups.
    """

    model: Any
    config: Any

    def __init__(self, model: nn.Module, config: Any, groups: int) -> None:
        self.__dict__["inside"] = False  # needed when nn.Module sets the mode
        super().__init__()
        self.__dict__["model"] = model  # not as a submodule
        self.config, self.groups, self.own = config, groups, attention_of(config)
        self.name = register_attention(groups)
        self.install()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register_attention(self.groups)  # in a process that unpickles the model

    @property
    def training(self) -> bool:  # nn.Module has a plain attribute
        return bool(self.__dict__["_trains"])

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["_trains"] = mode
        if self.__dict__["inside"]:
            set_attention(self.config, self.name if mode else self.own)

    def install(self) -> None:
        """Install it in the model."""
        self.own = attention_of(self.config)
        self.model.add_module(_CHILD, self)
        self.inside = True
        self.train(self.model.training)

    def remove(self) -> None:
        """Remove it and restore the model's own attention."""
        if self.inside:
            self.inside = False
            set_attention(self.config, self.own)
            delattr(self.model, _CHILD)


class SupportReport(NamedTuple):
    """The reasons why a model cannot use S², and notes for the user."""

    problems: list[str]
    notes: list[str]


def check_support(model: nn.Module, config: Any, length: int) -> SupportReport:
    """Whether a model can be trained with S², in all layers or some.

    Args:
        model: of Transformers, also on the meta device.
        config: of its language part.
        length: of the longest sequence.
    """
    name, problems = type(model).__name__, list[str]()
    if not uses_attention_interface(model):
        problems.append(f"{name} does not use Transformers' attention interface, so its attention cannot be replaced")
    if getattr(config, "attn_logit_softcapping", None):
        problems.append(f"{name} caps attention scores, which grouped attention does not support")
    if any(hasattr(module, "sinks") for module in model.modules()):
        problems.append(f"{name} has attention sinks, which grouped attention does not support")
    own_modules = [module for module in model.modules() if getattr(module, "config", None) is config]
    if any(getattr(module, "is_causal", True) is False for module in own_modules):
        problems.append(f"{name} has bidirectional attention")
    window, windowed, layers = sliding_windows(config, length)
    if windowed and windowed == layers:
        problems.append(f"all layers of {name} use a sliding window of {window:,} tokens, which S² cannot divide")
    note = f"{windowed} of {layers} layers keep their sliding window; the others attend in groups"
    return SupportReport(problems, [note] if windowed and not problems else [])


def sliding_windows(config: Any, length: int) -> tuple[int, int, int]:
    """(sliding window if below this length, number of layers with it, number of layers)."""
    layers = getattr(config, "num_hidden_layers", 0)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if not window or window >= length or not getattr(config, "use_sliding_window", True):
        return 0, 0, layers
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return window, sum(kind != "full_attention" for kind in kinds), len(kinds)
    if str(getattr(config, "model_type", "")).startswith("gemma"):  # a `config.json` without `layer_types`
        every = getattr(config, "sliding_window_pattern", None) or 6
        return window, layers - layers // every, layers
    return window, layers, layers


def register_attention(groups: int) -> str:
    """The name of S² with this many groups in Transformers' attention interface, registered there."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = _NAME.format(groups)
    AttentionInterface.register(name, partial(_attend, groups=groups))
    AttentionMaskInterface.register(name, partial(_mask, groups=groups))
    return name


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    *,
    groups: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: [batch, heads, L, width] -> [batch, L, heads, width].

    Layers with a sliding window or bidirectional attention use PyTorch's.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    length, windowed = query.shape[2], getattr(attention_mask, "windowed", False)
    if windowed or not causal or key.shape[2] != length:
        from lorary.layers.transformers_internals import sdpa_attention_forward

        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return output
    if problems := _unsupported_arguments(module, attention_mask, length, kwargs):
        raise StateError("cannot compute shifted sparse attention:", problems)
    if attention_mask is None:
        y = shifted(query, key, value, group_size(length, groups), scale=scaling, dropout=dropout)
    else:
        layout = getattr(attention_mask, "groups", None) or GroupLayout.of(attention_mask, groups)
        y = shifted_ragged(query, key, value, layout, scale=scaling, dropout=dropout)
    return y, None


def _unsupported_arguments(module: Any, mask: Tensor | None, length: int, kwargs: dict[str, Any]) -> list[Diagnostic]:
    name, window = type(module).__name__, kwargs.get("sliding_window")
    problems = [Diagnostic(name, what, _FULL) for key, what in _UNSUPPORTED.items() if kwargs.get(key) is not None]
    if window is not None and window < length:
        problems.append(Diagnostic(name, f"has a sliding window of {window} tokens that its mask does not have", _FULL))
    if mask is not None and mask.dim() != 2:
        what = f"has {mask.dim()} dimensions; grouped attention takes padding, [batch, tokens]"
        problems.append(Diagnostic("attention_mask", what, "pass the padding mask"))
    return problems


def _mask(*, groups: int, **call: Any) -> Tensor | None:
    """Transformers' mask function: None if each row is one sequence, else sequence numbers [batch, L].

    Raises:
        StateError: the model's mask is neither causal nor causal within packed sequences.
    """
    from lorary.layers.transformers_internals import sdpa_mask

    length, window = call["kv_length"], call.get("local_size")
    windowed = window is not None and window < length
    if windowed or call["q_length"] != length or "mask_function" not in call:
        full: Tensor | None = sdpa_mask(**call)
        if full is not None:
            vars(full)["windowed"] = windowed  # read by `_attend`
        return full
    mask_function = None if call.get("allow_is_causal_skip", True) else call["mask_function"]
    device = torch.device(call.get("device", "cpu"))
    return _sequences(mask_function, call.get("attention_mask"), (call["batch_size"], length), device, groups)


def _sequences(
    mask_function: MaskFunction | None,
    padding: Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
    groups: int,
) -> Tensor | None:
    """None, or [batch, L] sequence numbers with their layout. It depends on values, so a compiled graph breaks here."""
    if padding is not None and not padding.is_meta and bool(padding.all()):
        padding = None
    if padding is None and mask_function is None:
        return None
    numbers = sequence_numbers(mask_function, padding, *shape, device)
    if padding is None and not numbers.is_meta and bool((numbers == numbers[:, :1]).all()):
        return None  # one sequence in each row
    vars(numbers)["groups"] = GroupLayout.of(numbers, groups)  # computed once for all layers
    return numbers


def sequence_numbers(
    mask_function: MaskFunction | None, padding: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor:
    """[batch, L] sequence numbers, from 1 and growing along the rows; 0 is padding.

    Args:
        mask_function: of the model's mask; None for causal rows.
        padding: [batch, L], true for tokens; None without padding.
        batch, length: of the batch.
        device: of the result.

    Raises:
        StateError: a token attends to the next one.
    """
    first = torch.zeros(batch, length, dtype=torch.long, device=device)
    first[:, 0] = 1
    if mask_function is not None and length > 1:
        rows, at = torch.arange(batch, device=device)[:, None], torch.arange(length, device=device)
        zero = torch.zeros((), dtype=torch.long, device=device)
        ahead = mask_function(rows, zero, at[:-1], at[1:]).expand(batch, -1)
        if not ahead.is_meta and bool(ahead.any()):
            what = "lets some tokens attend to later ones"
            raise StateError("shifted sparse attention is causal:", [Diagnostic("attention_mask", what, _FULL)])
        first[:, 1:] = ~mask_function(rows, zero, at[1:], at[:-1]).expand(batch, -1)
    numbers = first.flatten().cumsum(0).view(batch, length)
    return numbers if padding is None else numbers * padding[:, -length:]
