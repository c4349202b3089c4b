"""Triton kernels compiled to machine code of a GPU that is not here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

_COMPILE = r"""
import importlib
import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module, types, kernels = json.loads(sys.argv[1])
for name, constants in kernels.items():
    kernel, options = getattr(importlib.import_module(module), name), {}
    if "enable_fp_fusion" in constants:
        options["enable_fp_fusion"] = constants.pop("enable_fp_fusion")
    kinds = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    values = {(at,): constants[name] for at, name in enumerate(kernel.arg_names) if name in constants}
    made = triton.compile(ASTSource(kernel, kinds, values), target=GPUTarget("cuda", 80, 32), options=options)
    counts = [len(re.findall(word, made.asm["ptx"])) for word in ("fma", "ftz", "mma", r"\b(?:atom|red)[.]")]
    print(name, len(made.asm["cubin"]) > 1000, *counts)
"""


def compiled(
    folder: Path, module: str, types: Mapping[str, str], kernels: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[str]]:
    """kernel -> whether there is machine code, and the words fma, ftz, mma and of atomics in its assembly.

    Args:
        folder: an empty one.
        module: that of the kernels.
        types: argument -> type, of all kernels.
        kernels: name -> its constants.
    """
    if sys.platform != "linux":
        pytest.skip("Triton's own compiler for NVIDIA is on Linux alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        (folder / "run").mkdir()
        file = folder / "run" / "compile.py"
        file.write_text(_COMPILE)
        # in a new Python: a fork of this one may have imported Triton already, to interpret
        command = [sys.executable, str(file), json.dumps([module, types, kernels])]
        done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {name: rest for name, *rest in map(str.split, done.stdout.splitlines())}
