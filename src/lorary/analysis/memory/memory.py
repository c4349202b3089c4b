"""The peak memory of a training step, item by item."""

from __future__ import annotations

from dataclasses import dataclass

from lorary.model.plan import human_bytes

ITEMS = ("weights", "adapters", "gradients", "optimizer", "rules", "activations", "logits", "working")


@dataclass(frozen=True)
class Memory:
    """The peak memory of a training step, in bytes.

    Args:
        weights: the base model's parameters and buffers.
        adapters: the adapters' tensors, as float32 masters.
        gradients: of everything that trains, in its own dtype.
        optimizer: the optimizer's state.
        rules: the state of the method's rules.
        activations: saved by the forward pass for the backward pass; None if unknown.
        logits: temporary memory of LM head and loss; None if unknown.
        working: temporary memory of the backward pass, one block at a time; None if unknown.
        notes: assumptions of the figures.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int | None
    logits: int | None
    working: int | None
    notes: tuple[str, ...] = ()
    rules: int = 0

    @property
    def fixed(self) -> int:
        """The constant part from the second step on: all but activations, logits and working."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.rules

    @property
    def moving(self) -> int:
        """The part allocated in every step. Loss and backward pass follow each other, so the larger one counts."""
        return (self.activations or 0) + max(self.logits or 0, self.working or 0)

    @property
    def total(self) -> int:
        """The peak."""
        return self.fixed + self.moving

    def rows(self) -> list[tuple[str, str]]:
        """(item, size) of all items that are not zero, and the total."""
        values = [(name, getattr(self, name)) for name in ITEMS]
        texts = {name: "unknown" if value is None else human_bytes(value) for name, value in values if value != 0}
        unknown = self.activations is None
        texts["total"] = f"more than {human_bytes(self.total)}" if unknown else human_bytes(self.total)
        if self.logits and self.working:
            smaller = "logits" if self.logits < self.working else "working"
            texts[smaller] += "  (not at the peak)"
        return list(texts.items())

    def __str__(self) -> str:
        lines = [f"{name:<12}{text}" for name, text in self.rows()]
        return "\n".join(lines + [f"{'note':<12}{note}" for note in self.notes])
