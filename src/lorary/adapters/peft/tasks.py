"""`task_type` and `auto_mapping`: the class that PEFT wraps a base in, and the class that it loads the base with.

PEFT's class for a task passes a fixed set of arguments to the base, trains the head, and loads its values from the
file. A task type is written only for a base that takes all of these arguments, is built by Transformers' Auto class for
the task, and whose head the file holds. Without one PEFT passes every argument on, and `AutoPeftModel` takes the base's
class from `auto_mapping`.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any, NamedTuple

from torch import nn

from lorary.adapters.adapter import Adapter
from lorary.layers.adapted import unwrapped_modules
from lorary.layers.wrappers import original_class

_INPUTS = ("input_ids", "attention_mask", "inputs_embeds")
_DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")
_LIBRARIES = ("transformers", "diffusers")  # those that PEFT imports a base's class from


class _Task(NamedTuple):
    """A task of PEFT.

    Args:
        table: Transformers' table of the classes that the Auto class for the task builds.
        inputs: the arguments that PEFT passes for the input; `**kwargs` would take them and do nothing with them.
        heads: the modules that PEFT trains, by the ends of their paths.
    """

    table: str
    inputs: tuple[str, ...] = _INPUTS
    heads: tuple[str, ...] = ()


_CLASSIFIERS = ("classifier", "score")
_TASKS = {
    "CAUSAL_LM": _Task("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "SEQ_2_SEQ_LM": _Task("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", _INPUTS + _DECODER),
    "SEQ_CLS": _Task("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", heads=_CLASSIFIERS),
    "TOKEN_CLS": _Task("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", heads=_CLASSIFIERS),
    "QUESTION_ANS": _Task("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", heads=("qa_outputs",)),
    "FEATURE_EXTRACTION": _Task("MODEL_MAPPING_NAMES"),
}
_CAUSAL = ("ForCausalLM", "LMHeadModel")  # also for classes outside of Transformers


def task_fields(adapter: Adapter, model: nn.Module | None, saved: Collection[str] | None) -> dict[str, Any]:
    """The fields of a configuration that tell PEFT the base's task and class.

    Args:
        adapter: the adapter; only its sites and base matter.
        model: the base, if at hand; otherwise its class is looked up in Transformers by its name.
        saved: the modules in the file that were trained in full.
    """
    base = _class_of(adapter.base.architecture, model)
    task = next((name for name, task in _TASKS.items() if base and _fits(base, name, task)), None)
    if task and not _has_heads(_TASKS[task].heads, adapter, model, set(saved or ())):
        task = None
    mapping = None
    if task is None and base is not None and base.__module__.partition(".")[0] in _LIBRARIES:
        mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return {"task_type": task, "auto_mapping": mapping}


def _class_of(architecture: str, model: nn.Module | None) -> type[nn.Module] | None:
    if model is not None:
        return original_class(unwrapped_modules(model)[""])
    if not architecture.endswith(("Model", "LM")) and "For" not in architecture:
        return None  # not a name of Transformers, which is slow to import
    import transformers

    found = getattr(transformers, architecture, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def why_task_misfits(model: nn.Module, task_type: object) -> str:
    """Why PEFT's class for a task cannot run a base, which takes other arguments than it passes; empty if it can."""
    task = _TASKS.get(str(task_type or ""))
    if task is None:
        return ""
    parameters = inspect.signature(original_class(unwrapped_modules(model)[""]).forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    lacking = [name for name in (*task.inputs, *_OUTPUTS) if name not in parameters]
    if takes_any or not lacking:
        lacking = [name for name in task.inputs[:1] if name not in parameters]
    if not lacking:
        return ""
    return f"PEFT's class for {task_type} passes {lacking[0]}, which the base does not take"


def _fits(base: type[nn.Module], name: str, task: _Task) -> bool:
    """Whether the base is of this task, and takes the arguments that PEFT passes for it."""
    parameters = inspect.signature(base.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if not {*task.inputs, *(() if takes_any else _OUTPUTS)} <= parameters.keys():
        return False
    if name == "CAUSAL_LM" and base.__name__.endswith(_CAUSAL):
        return True
    if base.__module__.partition(".")[0] != "transformers":
        return False
    from lorary.layers.transformers_internals import modeling_auto

    classes = getattr(modeling_auto, task.table).values()  # names, or tuples of them
    return any(base.__name__ in ((entry,) if isinstance(entry, str) else entry) for entry in classes)


def _has_heads(heads: tuple[str, ...], adapter: Adapter, model: nn.Module | None, saved: set[str]) -> bool:
    """Whether the file holds the heads that PEFT loads from it, and adapts no layer inside them."""
    if not heads:
        return True
    found = {path for path in unwrapped_modules(model) if path.endswith(heads)} if model is not None else set()
    inside = tuple(f"{path}." for path in found)
    return bool(found) and found <= saved and not any(f"{a.site.name}.".startswith(inside) for a in adapter.sites)
