"""The method's rules in Transformers' `Trainer` and in those made from it (TRL's, sentence-transformers')."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from lorary.errors import Diagnostic, TrainingError, not_a
from lorary.files.tensor_file import write_tensors
from lorary.layers.adapted import adapted_layers
from lorary.model.optim.rules import Rules, rules
from lorary.model.state import require_attached

STATE = "lorary_rules.safetensors"  # in a checkpoint, beside the trainer's own files


class TrainerCallback(transformers.TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Runs the rules of the attached method (AdaLoRA, Delta-LoRA, O-LoRA, GLoRA) in somebody else's trainer.

    Their state is saved in every checkpoint and restored when the run is resumed; their figures are logged. For a
    method without rules it does nothing. TRL rounds the adapter of a 4-bit or 8-bit base to bfloat16, in which small
    steps are lost: the callback gives it its own precision back.

    Args:
        model: with a method attached; for a SentenceTransformer the part of it that is.

    Raises:
        TrainingError: `model` is not a module.
        StateError: nothing is attached to it.

    Example:
        >>> trainer = SFTTrainer(model, args=args, train_dataset=rows, callbacks=[lorary.TrainerCallback(model)])
    """

    def __init__(self, model: nn.Module) -> None:
        if problems := not_a(nn.Module, "a torch.nn.Module", model=model):
            raise TrainingError("cannot make a callback:", problems)
        require_attached(model, "train")
        self.model = model
        self.rules: Rules | None = None
        # before the trainer is made, which may round them
        self._precise = [(p, p.data) for layer in adapted_layers(model).values() for p in layer.params.values()]

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Start the rules, or continue them from the checkpoint that the trainer has read.

        Raises:
            TrainingError: the callback is another model's; or the rules cannot run, or not go on.
        """
        if isinstance(model, nn.Module) and all(module is not self.model for module in model.modules()):
            what = "the trainer trains another model, perhaps a copy, than the callback was made with"
            problem = Diagnostic("model", what, "make it with the trainer's: lorary.TrainerCallback(trainer.model)")
            raise TrainingError("this callback would do nothing:", [problem])
        self._restore_precision()
        method_rules = [rule for layer in adapted_layers(self.model).values() for rule in layer.method.rules]
        if not method_rules:
            return
        if args.fp16:
            refuse_scaled_gradients()
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = optimizer.optimizer  # inside accelerate's wrapper
        saved = self._saved_state() if state.global_step else None
        self._remove_hooks()
        self.rules = rules(self.model, state.max_steps, optimizer, saved, automatic=True)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the rules' state into the new checkpoint."""
        if self.rules is not None and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            temporary = folder / f"{STATE}.new"
            temporary.unlink(missing_ok=True)
            write_tensors(temporary, self.rules.state_dict())
            os.replace(temporary, folder / STATE)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the rules' figures to a line of the log."""
        if self.rules is not None and logs is not None and "loss" in logs:
            figures = {k: v for k, v in self.rules.report().items() if isinstance(v, int | float)}
            logs.update(figures)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the hooks off."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        if self.rules is not None and self.rules.hooks is not None:
            self.rules.hooks.remove()

    def _restore_precision(self) -> None:
        for p, precise in self._precise:
            if p.dtype != precise.dtype:
                unchanged = torch.equal(p.data, precise.to(p.data))
                p.data = precise.to(p.device) if unchanged else p.data.to(precise.dtype)
        self._precise = []

    def _saved_state(self) -> dict[str, Tensor]:
        """The rules' state in the checkpoint that the adapter was read from.

        Raises:
            TrainingError: there is none.
        """
        folder = require_attached(self.model, "train").restored_from
        path = None if folder is None else folder / STATE
        if path is None or not path.is_file():
            what = f"there is no {STATE} in it" if folder else "the trainer has not read the adapter of a checkpoint"
            fix = "resume from a checkpoint that was written with lorary.TrainerCallback(model), or start again"
            raise TrainingError("cannot resume the method's rules:", [Diagnostic(str(folder or "model"), what, fix)])
        state: dict[str, Tensor] = load_file(path)
        return state


def refuse_scaled_gradients() -> None:
    """Refuse to run a method's rules in float16, in which gradients are scaled.

    Raises:
        TrainingError: always.
    """
    what = "the rules would see scaled gradients"
    raise TrainingError("this method cannot train in float16:", [Diagnostic("fp16", what, "use bf16")])
