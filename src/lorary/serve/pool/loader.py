"""The loader: adapters are read from disk, checked, formed and flattened in worker threads."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from lorary.adapters.hub import OWN_FILES
from lorary.adapters.native import NAME as RECORD
from lorary.adapters.peft.reader import MOST_JSON
from lorary.adapters.save_load import load_adapter
from lorary.errors import Diagnostic, FileError, LoraryError
from lorary.files.safe_open import open_inside, read_bytes
from lorary.files.strict_json import show
from lorary.model.base import Base
from lorary.model.vocabulary import check_tokens
from lorary.serve.forms.flat import Flat, flatten
from lorary.serve.forms.form import serving_form
from lorary.serve.interface import BusyError
from lorary.serve.pool.adapter_root import Stamp, is_adapter, stamp, wait_for_a_tick


@dataclass(frozen=True)
class Limits:
    """The limits on an adapter.

    Args:
        bytes: of its files at most.
        rank: of each site at most; None for any.
        waiting: adapters that wait to be read at most.
    """

    bytes: int = 4 * 2**30
    rank: int | None = None
    waiting: int = 256


@dataclass(frozen=True)
class Loaded:
    """An adapter as it was read.

    Args:
        flat: its flat form.
        stamp: of the files it was read from.
    """

    flat: Flat
    stamp: Stamp


class Loader:
    """Reads adapters for a base.

    Args:
        base: the served base; its tables and its fingerprint are computed once.
        limits: on an adapter.
        threads: how many are read at a time.
        pin_memory: whether their buffers are page-locked, for fast copies to a GPU.
        tokenizer: of the base; adapters whose added tokens are others there are refused. None: it is not checked.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        limits: Limits | None = None,
        threads: int = 2,
        pin_memory: bool = False,
        tokenizer: Any = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.base, self.limits, self.pin_memory = Base(base).walk(), limits or Limits(), pin_memory
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="adapter")
        self._hashing = ThreadPoolExecutor(threads, thread_name_prefix="hash")
        self._waiting = threading.Semaphore(self.limits.waiting)
        self._counting = threading.Lock()
        self.count, self.seconds = 0, 0.0  # of the adapters that were read

    def request(self, folder: Path, name: str, *, within: Path | None = None) -> Future[Loaded]:
        """Begin to read an adapter; the future has its errors too. See `load`.

        Raises:
            BusyError: too many wait already.
        """
        if not self._waiting.acquire(blocking=False):
            what = f"{self.limits.waiting} adapters wait to be read"
            raise BusyError("no room for the adapter now:", [Diagnostic(name, what, "ask again later")])
        try:
            future = self._threads.submit(self.load, folder, name, within=within)
        except RuntimeError:  # closed
            self._waiting.release()
            raise BusyError("no room for the adapter now:", [Diagnostic(name, "the server stops")]) from None
        future.add_done_callback(lambda _: self._waiting.release())
        return future

    def load(self, folder: Path, name: str, *, within: Path | None = None) -> Loaded:
        """Read an adapter.

        Args:
            folder: its folder, resolved.
            name: its name, for errors.
            within: a folder that none of its files may be outside of; None: its owner is trusted.

        Raises:
            FileError: it cannot be served, with every reason.
            MethodError: its method cannot be served on this base.
        """
        begun = time.perf_counter()
        try:
            for _ in range(2):
                before = stamp(folder)
                wait_for_a_tick(before)
                flat = self._read(folder, name, within)
                if stamp(folder) == before:
                    with self._counting:
                        self.count, self.seconds = self.count + 1, self.seconds + time.perf_counter() - begun
                    return Loaded(flat, before)
        except LoraryError as error:  # the reader's headline has the path on this machine
            raise type(error)(failure(name), error.problems) from error.__cause__
        except Exception as error:  # such as too little memory: it concerns this adapter's requests alone
            raise FileError(failure(name), [Diagnostic("", f"{type(error).__name__}: {error}")]) from error
        raise FileError(failure(name), [Diagnostic("", "its files changed while they were read", "ask again")])

    def close(self) -> None:
        """Wait for what is being read; what waits is cancelled."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._hashing.shutdown(wait=True)

    def _read(self, folder: Path, name: str, within: Path | None) -> Flat:
        if problems := self._file_problems(folder, within):
            raise FileError("", problems)
        digest = self._hashing.submit(folder_digest, folder)  # hashing takes longer than reading
        try:
            adapter = load_adapter(folder, model=self.base)
            if self.tokenizer is not None:
                check_tokens(self.tokenizer, adapter.sites)
            form = serving_form(adapter, self.base, uid=digest.result())
        finally:
            digest.cancel()  # of an adapter that is refused, unless it has begun
        if self.limits.rank is not None and (form.rank or 0) > self.limits.rank:
            what = f"it is served with rank {form.rank}, and this server accepts {self.limits.rank}"
            raise FileError("", [Diagnostic("rank", what, "give it a lower rank: lorary compress")])
        return flatten(form, pin_memory=self.pin_memory)

    def _file_problems(self, folder: Path, within: Path | None) -> list[Diagnostic]:
        """Files outside of the root, and too many bytes, before any is read."""
        problems, total = [], 0
        for file in OWN_FILES:
            path = folder / file
            if within is not None and path.is_symlink() and not path.resolve().is_relative_to(within):
                problems.append(Diagnostic(file, "is a link that leaves the server's folder of adapters"))
            elif path.exists():
                total += os.stat(path).st_size
        if not problems and not is_adapter(folder):
            problems.append(Diagnostic("", "there is no adapter in its folder"))
        if total > self.limits.bytes:
            what = f"its files have {total:,} bytes, and this server accepts {self.limits.bytes:,}"
            problems.append(Diagnostic("", what))
        return problems


def folder_digest(folder: Path) -> str:
    """The SHA-256 of an adapter's files: equal bytes give equal digests, whatever the folder is called.

    lorary's record holds the digests of the other files, which are compared when they are read.
    """
    if os.path.lexists(folder / RECORD):
        return hashlib.sha256(read_bytes(folder, RECORD, MOST_JSON)).hexdigest()
    total = hashlib.sha256()
    for name in OWN_FILES:
        if os.path.lexists(folder / name):
            with open_inside(folder, name, 2**40)[0] as file:
                total.update(name.encode() + hashlib.file_digest(cast(Any, file), "sha256").digest())
    return total.hexdigest()


def failure(name: str) -> str:
    """The headline of the errors of an adapter."""
    return f"cannot serve the adapter {show(name)}:"
