"""The weights that a module's code reads without calling their layers, from the source of its forward.

Code such as `F.linear(x, self.proj.weight)` never calls `self.proj`, so an adapter there has no effect. A run shows it
on the path that it takes; the source shows it on every path: fused kernels, cached decoding, evaluation.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import textwrap
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

# what may be asked of a weight without reading its values
_PROPERTIES = {"dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "itemsize", "layout"}
_PROPERTIES |= {"size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_contiguous", "get_device"}
_PROPERTIES |= {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"}
_INSPECTIONS = {"isinstance", "hasattr", "type", "id", "getattr"}
_COMPARISONS: dict[type[ast.cmpop], Any] = {
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le},
    **{ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not},
}
_UNKNOWN = object()

Guard = tuple[ast.expr, bool]  # a condition, and the value that it has on the way to a read
Line = tuple[str, int]  # file and line


@dataclass(frozen=True)
class Read:
    """An expression that reads the weight of a child module.

    Args:
        path: of the child, from the module that reads.
        line: of the expression.
        guards: the conditions of the branches around it.
    """

    path: str
    line: Line
    guards: tuple[Guard, ...]

    def possible(self, module: nn.Module) -> bool:
        """Whether the settings of the reading module leave this branch open."""
        return not any(_excluded(module, guard) for guard in self.guards)


@dataclass(frozen=True)
class Accesses:
    """The accesses of a class's forward, and of the methods that it calls, to the class's child modules.

    Args:
        reads: of weights.
        calls: the paths of the children that are called by name.
    """

    reads: tuple[Read, ...]
    calls: frozenset[str]


@functools.cache
def accesses(cls: type[nn.Module]) -> Accesses:
    """The accesses of a class to its children; none for a class without readable source."""
    visitor, seen = _Visitor(), set()
    while visitor.methods:
        name, guards = visitor.methods.pop()
        function = inspect.unwrap(getattr(cls, name, accesses))
        key = (name, *map(_text, guards))
        if key in seen or not isinstance(function, FunctionType) or function is getattr(nn.Module, name, None):
            continue
        seen.add(key)
        if len(seen) < _MOST and (body := _parsed(function)) is not None:
            visitor.read(body, function.__code__, guards)
    return Accesses(tuple(visitor.reads), frozenset(visitor.calls))


_MOST = 200  # methods read for one class


def _text(guard: Guard) -> str:
    return f"{ast.dump(guard[0])} {guard[1]}"


@functools.cache
def _parsed(function: FunctionType) -> ast.FunctionDef | None:
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, ValueError, IndexError):
        return None
    return body if isinstance(body, ast.FunctionDef) else None


class _Visitor(ast.NodeVisitor):
    """Collects the weights that methods read, and the children and methods that they call."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.calls: set[str] = set()
        self.methods: list[tuple[str, tuple[Guard, ...]]] = [("forward", ())]
        self._guards: tuple[Guard, ...] = ()
        self._self, self._file, self._first = "self", "", 0

    def read(self, function: ast.FunctionDef, code: Any, guards: tuple[Guard, ...]) -> None:
        """Collect the accesses of a method that is called under these conditions."""
        self._self = function.args.args[0].arg if function.args.args else ""
        self._file, self._first, self._guards = code.co_filename, code.co_firstlineno, guards
        for statement in function.body:
            self.visit(statement)

    def visit_If(self, node: ast.If) -> None:
        self._branches(node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._branches(node.test, [node.body], [node.orelse])

    def _branches(self, test: ast.expr, body: Any, other: Any) -> None:
        self.visit(test)
        outer = self._guards
        for nodes, value in ((body, True), (other, False)):
            self._guards = (*outer, (test, value))
            for node in nodes:
                self.visit(node)
        self._guards = outer

    def visit_Call(self, node: ast.Call) -> None:
        if path := self._path(node.func):
            self.calls.add(path)
        if not (isinstance(node.func, ast.Name) and node.func.id in _INSPECTIONS):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        inner = node.value
        if node.attr in _PROPERTIES and isinstance(inner, ast.Attribute) and inner.attr == "weight":
            return
        if isinstance(inner, ast.Name) and inner.id == self._self:
            self.methods.append((node.attr, self._guards))
        if node.attr == "weight" and isinstance(node.ctx, ast.Load) and (path := self._path(inner)):
            self.reads.append(Read(path, (self._file, self._first + node.lineno - 1), self._guards))
        self.generic_visit(node)

    def _path(self, node: ast.expr) -> str:
        """`a.b` for the expression `self.a.b`; empty for any other."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == self._self else ""


def _excluded(module: nn.Module, guard: Guard) -> bool:
    test, expected = guard
    value = _value(module, test)
    return value is not _UNKNOWN and bool(value) is not expected


def _value(module: nn.Module, node: ast.expr) -> Any:
    """The value of an expression of constants and the module's plain attributes; _UNKNOWN if it has other parts."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Attribute(value=ast.Name(id="self"), attr=name) if name != "training":
            value = vars(module).get(name, _UNKNOWN)
            return value if value is None or isinstance(value, bool | int | float | str) else _UNKNOWN
        case ast.UnaryOp(op=ast.Not()):
            value = _value(module, node.operand)
            return value if value is _UNKNOWN else not value
        case ast.BoolOp():
            values = [_value(module, part) for part in node.values]
            decisive = isinstance(node.op, ast.Or)  # one true part decides an `or`, one false part an `and`
            if any(value is not _UNKNOWN and bool(value) is decisive for value in values):
                return decisive
            return _UNKNOWN if _UNKNOWN in values else not decisive
        case ast.Compare(ops=[comparison], comparators=[right]) if type(comparison) in _COMPARISONS:
            sides = [_value(module, node.left), _value(module, right)]
            return _UNKNOWN if _UNKNOWN in sides else _COMPARISONS[type(comparison)](*sides)
    return _UNKNOWN
