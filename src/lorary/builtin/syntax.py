"""Records parsed from Python source with `ast`: function summaries, and definitions labelled by kind of module.

The source is parsed, never imported or run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

Function = ast.FunctionDef | ast.AsyncFunctionDef

_LONGEST_SIGNATURE = 200  # characters; longer ones are tables of defaults
_SUMMARY = range(12, 121)  # characters of a useful first line
_LONGEST_TEXT = 800  # characters of a definition: about 250 tokens

_KINDS = {
    "concurrency": "asyncio concurrent multiprocessing threading queue sched subprocess _pyio selectors contextvars",
    "files": "bz2 dbm filecmp fileinput genericpath glob gzip lzma ntpath os pathlib posixpath shelve shutil tarfile"
    " tempfile zipfile fnmatch stat mailbox pickle pickletools nturl2path",
    "gui": "idlelib tkinter turtle turtledemo",
    "language": "ast bdb codeop compileall dis importlib inspect lib2to3 opcode pkgutil py_compile pyclbr runpy"
    " symtable token tokenize typing types zipapp zipimport",
    "networking": "cgi ftplib http imaplib nntplib poplib smtpd smtplib socket socketserver ssl telnetlib urllib"
    " webbrowser wsgiref xmlrpc ipaddress nntplib netrc asyncore asynchat",
    "numbers and time": "_pydatetime _pydecimal calendar colorsys datetime decimal fractions numbers random"
    " statistics zoneinfo _strptime bisect heapq",
    "packaging": "distutils ensurepip sysconfig venv _osx_support modulefinder",
    "testing": "cProfile doctest pdb profile pstats timeit trace unittest tracemalloc faulthandler cgitb traceback",
    "text formats": "configparser csv difflib email html json plistlib string textwrap tomllib xml re base64"
    " quopri uu binhex sndhdr optparse argparse gettext",
}
_KIND_OF = {module: kind for kind, modules in _KINDS.items() for module in modules.split()}
KINDS = tuple(_KINDS)  # the labels of builtin:modules, sorted


@dataclass(frozen=True)
class Summary:
    """A function's signature, `def name(arguments):`, and the first line of its docstring."""

    signature: str
    summary: str


@cache
def summaries(files: tuple[tuple[str, str], ...]) -> tuple[tuple[str, Summary], ...]:
    """The (path, Summary) of every documented public function in the (path, text) `files`.

    A pair in several files (an interface and its implementations) counts for the first file only, so that it is on one
    side of the split.
    """
    first: dict[Summary, str] = {}
    for path, text in files:
        for function in _functions(_parsed(text)):
            if (pair := _summary(function)) is not None:
                first.setdefault(pair, path)
    return tuple((path, pair) for pair, path in first.items())


@cache
def labelled(files: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str, str], ...]:
    """The (path, text, label) of every top-level function and class in a module of a known kind.

    The text is the beginning of the definition, the label one of `KINDS`.
    """
    first: dict[str, tuple[str, str]] = {}
    for path, text in files:
        kind = _KIND_OF.get(path.split("/")[0].removesuffix(".py"))
        if kind is None:
            continue
        lines = text.splitlines(keepends=True)
        for node in _parsed(text).body:
            if isinstance(node, Function | ast.ClassDef):
                definition = "".join(lines[node.lineno - 1 : node.end_lineno])
                if definition.count("\n") >= 3:  # shorter ones are stubs
                    first.setdefault(definition[:_LONGEST_TEXT], (path, kind))
    return tuple((path, text, kind) for text, (path, kind) in first.items())


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError:  # a template or a file for another version of the language
        return ast.Module(body=[], type_ignores=[])


def _functions(tree: ast.Module) -> Iterator[Function]:
    """The public functions of a module and public methods of its classes, in source order."""
    bodies: Iterable[ast.AST] = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    found = [n for body in bodies for n in getattr(body, "body", ()) if isinstance(n, Function)]
    return iter(sorted((n for n in found if not n.name.startswith("_")), key=lambda n: n.lineno))


def _summary(function: Function) -> Summary | None:
    doc = (ast.get_docstring(function) or "").strip()
    line = doc.partition("\n")[0].strip()
    keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    signature = f"{keyword} {function.name}({ast.unparse(function.args)}):"
    # A summary that begins with a letter does not change the tokenisation of the prompt before it.
    if len(line) not in _SUMMARY or not line[0].isalpha() or len(signature) > _LONGEST_SIGNATURE:
        return None
    return Summary(signature, line)
