"""An OpenAI-compatible server as an engine: `/v1/models` and `/v1/completions`, by the standard library alone.

Log-probabilities of the prompt are asked for first (`echo`), since one request then gives a number for every token. A
server without them gives the likeliest next tokens after prefixes of the probe. Replies are bounded in size and time;
redirects are not followed, so that a key goes to no other host.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cached_property
from http.client import HTTPException
from itertools import islice
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lorary.analysis.verify.deadline import within
from lorary.analysis.verify.observed import Observed
from lorary.errors import Diagnostic, LoraryError, did_you_mean
from lorary.files import strict_json
from lorary.files.strict_json import show

KEYS = ("LORARY_API_KEY", "OPENAI_API_KEY")  # environment variables, in this order
_MOST_BYTES = 16 * 2**20
_MOST_OF_ERROR = 2**12
_MOST_NAMES = 20  # of models, in a message
_TOP = 5  # likeliest tokens, which every server gives
_TOKEN_ID = re.compile("token_id:([0-9]{1,9})")  # as vLLM writes tokens, if it is told to
_UNSEEN = -100.0  # nats: what servers write for minus infinity


class Server:
    """A server and the names of its two models.

    Args:
        url: of the server, with or without `/v1`.
        tokenizer: of the base.
        base_model: the name of the base there; found in its list of models if empty; `none` if it serves no base.
        adapter_model: the name of the adapter there, likewise.
        timeout: seconds for one request.
        key: that it asks for; by default that of the environment.

    Raises:
        LoraryError: the address is not one of a server, the server does not answer, or its models are not clear.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        base_model: str = "",
        adapter_model: str = "",
        timeout: float = 60.0,
        key: str = "",
    ) -> None:
        self.url, self.tokenizer, self.timeout = server_address(url), tokenizer, timeout
        self.name = self.url
        self.key = key or next((os.environ[name] for name in KEYS if os.environ.get(name)), "")
        self.opener = urllib.request.build_opener(_NoRedirect)
        self.takes_ids, self.echoes = True, True
        names = self._models() if not (base_model and adapter_model) else {}
        self.adapter_model = adapter_model or self._adapter(names, base_model)
        self.base_model = "" if base_model == "none" else base_model or self._base(names)
        self.release = self._release()

    def _release(self) -> str:
        """What `/version` says, as vLLM's does; empty for a server without it."""
        try:
            found = self._request("/version").get("version")
        except LoraryError:
            return ""
        return found[:100] if isinstance(found, str) else ""

    # --- the list of models ---

    def _models(self) -> dict[str, str | None]:
        """The name of each model that it serves -> that of its base, if it tells."""
        data = self._request("/v1/models")
        entries = data.get("data")
        if not isinstance(entries, list) or not all(
            isinstance(e, dict) and isinstance(e.get("id"), str) for e in entries
        ):
            raise self._problem("/v1/models", f"its reply is not a list of models: {show(data)}")
        return {entry["id"]: entry.get("parent") if isinstance(entry.get("parent"), str) else None for entry in entries}

    def _adapter(self, names: dict[str, str | None], base: str) -> str:
        adapters = [name for name, parent in names.items() if parent] or [n for n in names if n != base and base]
        if len(adapters) != 1:
            what = f"{len(adapters)} of its models are adapters by its own list: {_listed(adapters or list(names))}"
            raise self._problem("--adapter-model", what, "name the adapter's model there")
        return adapters[0]

    def _base(self, names: dict[str, str | None]) -> str:
        parent = names.get(self.adapter_model)
        others = [parent] if parent in names and parent else [n for n, p in names.items() if not p]
        others = [name for name in others if name != self.adapter_model]
        if len(others) != 1:
            what = f"the base of {show(self.adapter_model)} is not clear from its list: {_listed(names)}"
            raise self._problem(
                "--base-model", what, "name it, or `none` if the server has no model without the adapter"
            )
        return others[0]

    def has_base(self) -> bool:
        return bool(self.base_model)

    # --- log-probabilities ---

    def observe(self, ids: Sequence[int], *, adapted: bool) -> list[Observed]:
        model = self.adapter_model if adapted else self.base_model
        if self.echoes:
            if (found := self._of_prompt(model, ids)) is not None:
                return [found]
            self.echoes = False  # from now on
        lengths = sorted({max(1, len(ids) // 2), max(1, 3 * len(ids) // 4), len(ids)})
        return [self._of_next(model, ids, length) for length in lengths]

    def _of_prompt(self, model: str, ids: Sequence[int]) -> Observed | None:
        """The log-probabilities of the prompt's own tokens; None if the server gives none."""
        try:
            found = self._completion(model, ids, echo=True)
        except _RefusedError:
            return None
        values = found.get("token_logprobs")
        if not isinstance(values, list) or len(values) not in (len(ids), len(ids) + 1):
            return None
        own = [_number(value) for value in values[1 : len(ids)]]
        kept = [
            (t, token, value) for t, (token, value) in enumerate(zip(ids[1:], own, strict=True)) if value is not None
        ]
        if not kept:
            return None
        at, tokens, numbers = zip(*kept, strict=True)
        return Observed(tuple(ids), at, tokens, numbers)

    def _of_next(self, model: str, ids: Sequence[int], length: int) -> Observed:
        """The log-probabilities of the likeliest tokens after the first `length` tokens of a probe."""
        found = self._completion(model, ids[:length], echo=False)
        pairs = {}
        for text, value in _likeliest(found):
            token, number = self._token(text), _number(value)
            if token is not None and number is not None:
                pairs[token] = number
        if not pairs:
            what = f"its reply has no log-probabilities of tokens that the base's tokenizer knows: {show(found)}"
            raise self._problem("/v1/completions", what, "start it with log-probabilities")
        return Observed(tuple(ids), (length - 1,) * len(pairs), tuple(pairs), tuple(pairs.values()))

    def _completion(self, model: str, ids: Sequence[int], *, echo: bool) -> dict[str, Any]:
        """The `logprobs` of a reply."""
        body = {"model": model, "max_tokens": 1, "temperature": 0, "logprobs": _TOP}
        body |= {"echo": True} if echo else {}
        if self.takes_ids:
            try:
                return self._log_probabilities(body | {"prompt": list(ids)})
            except _RefusedError:
                self.takes_ids = False  # from now on
        return self._log_probabilities(body | {"prompt": self.tokenizer.decode(list(ids))})

    def _log_probabilities(self, body: dict[str, Any]) -> dict[str, Any]:
        data = self._request("/v1/completions", body)
        choices = data.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            raise self._problem("/v1/completions", f"its reply has no choice: {show(data)}")
        found = choice.get("logprobs")
        return found if isinstance(found, dict) else {}

    @cached_property
    def _texts(self) -> dict[str, int]:
        """Each token's text -> the token; texts of several tokens are left out."""
        every = range(len(self.tokenizer))
        decoded = self.tokenizer.batch_decode([[i] for i in every])
        found: dict[str, int] = {}
        for texts in (self.tokenizer.convert_ids_to_tokens(list(every)), decoded):
            own: dict[str, list[int]] = {}
            for i, text in enumerate(texts):
                own.setdefault(text, []).append(i)
            found |= {text: tokens[0] for text, tokens in own.items() if len(tokens) == 1}
            for text, tokens in own.items():
                if len(tokens) > 1:
                    found.pop(text, None)
        return found

    def _token(self, text: Any) -> int | None:
        if not isinstance(text, str):
            return None
        number = _TOKEN_ID.fullmatch(text)
        token = int(number[1]) if number else self._texts.get(text)
        return token if token is not None and token < len(self.tokenizer) else None

    # --- requests ---

    def _request(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object of a reply.

        Raises:
            LoraryError: the server cannot be reached, refuses the request, or its reply is not acceptable.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data=data, headers=headers)
            status, raw = within(self.timeout, lambda: self._exchange(request))
        except TimeoutError:
            raise self._problem(path, f"no reply within {self.timeout:g} s", "raise --timeout") from None
        except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise self._problem(path, f"no reply within {self.timeout:g} s", "raise --timeout") from None
            what = f"it cannot be reached: {getattr(reason, 'strerror', None) or reason or type(error).__name__}"
            raise self._problem(path, what, "start the server, and check the address") from None
        if status != 200:
            raise self._refused(path, status, raw[:_MOST_OF_ERROR])
        if len(raw) > _MOST_BYTES:
            raise self._problem(path, f"its reply is of more than {_MOST_BYTES:,} bytes")
        try:
            value = strict_json.parse(raw, _MOST_BYTES)
        except ValueError as error:
            raise self._problem(path, f"its reply is {error}") from None
        if not isinstance(value, dict):
            raise self._problem(path, f"its reply is not a JSON object: {show(value)}")
        return value

    def _exchange(self, request: urllib.request.Request) -> tuple[int, bytes]:
        """(HTTP status, the first bytes of the reply)."""
        try:
            with self.opener.open(request, timeout=self.timeout) as reply:
                return 200, reply.read(_MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            said = b""
            with error, suppress(OSError, HTTPException):
                said = error.read(_MOST_OF_ERROR)
            return error.code, said

    def _refused(self, path: str, status: int, said: bytes) -> LoraryError:
        """The error of a reply with an HTTP status that is not 200."""
        text = said.decode("utf-8", "replace").strip()
        fix = ""
        if status in (401, 403):
            fix = f"set {KEYS[0]} to its key" if not self.key else "check the key"
        elif status == 404 and path != "/v1/models":
            fix = "check --base-model and --adapter-model: `/v1/models` lists the server's names"
        elif 300 <= status < 400:
            fix = "redirects are not followed: give the address that it redirects to"
        what = f"HTTP {status}" + (f": {show(text, most=300)}" if text else "")
        kind = _RefusedError if status in (400, 422, 501) else LoraryError
        return kind(f"cannot verify against {show(self.url)}", [Diagnostic(path, what, fix)])

    def _problem(self, where: str, what: str, fix: str = "") -> LoraryError:
        return LoraryError(f"cannot verify against {show(self.url)}", [Diagnostic(where, what, fix)])


class _RefusedError(LoraryError):
    """The server understands the request, and does not do it: another form may work."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


def server_address(url: str) -> str:
    """The address without `/v1`, a trailing slash, a query or a password.

    Raises:
        LoraryError: it is not of a web server.
    """
    fix = "such as http://localhost:8000, or one of " + " and ".join(ENGINES)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise LoraryError("cannot verify:", [Diagnostic("--against", f"{show(url)}: {error}", fix)]) from None
    if parts.scheme not in ("http", "https") or not host:
        near = did_you_mean(url, ENGINES) if url.isalpha() else fix
        what = f"{show(url)} is not the address of a server"
        raise LoraryError("cannot verify:", [Diagnostic("--against", what, near)])
    if parts.username or parts.password:
        what = "the address holds a user or a password"
        raise LoraryError("cannot verify:", [Diagnostic("--against", what, f"set {KEYS[0]} instead")])
    path = parts.path.rstrip("/").removesuffix("/v1")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


ENGINES = ("transformers", "peft")  # here, in this process


def _number(value: Any) -> float | None:
    """A log-probability; None if it is none, or minus infinity."""
    usable = isinstance(value, int | float) and type(value) is not bool and _UNSEEN < value <= 1e-3
    return float(value) if usable else None


def _likeliest(found: dict[str, Any]) -> list[tuple[Any, Any]]:
    """(text, log-probability) of the likeliest first tokens, in the form of completions or of chats."""
    top, content = found.get("top_logprobs"), found.get("content")
    if isinstance(top, list) and top and isinstance(top[0], dict):
        return list(top[0].items())
    if isinstance(content, list) and content and isinstance(content[0], dict):
        entries = content[0].get("top_logprobs")
        several = entries if isinstance(entries, list) else []
        return [(e.get("token"), e.get("logprob")) for e in several if isinstance(e, dict)]
    return []


def _listed(names: Collection[str]) -> str:
    """Names of models, for a message."""
    shown = [show(name) for name in islice(names, _MOST_NAMES)]
    more = [f"and {len(names) - _MOST_NAMES:,} more"] if len(names) > _MOST_NAMES else []
    return ", ".join([*shown, *more]) or "none"
