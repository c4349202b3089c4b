"""The address of a server: bound, checked, and as a URL."""

from __future__ import annotations

import socket

from lorary.errors import Diagnostic, LoraryError


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to this address, which does not listen yet: clients that connect too early are refused at once.

    Raises:
        LoraryError: the address is taken, or not one of this machine's.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        raise cannot_listen(host, port, error) from None
    return listener


def cannot_listen(host: str, port: int, error: Exception) -> LoraryError:
    """The error of an address that is taken, or not one of this machine's."""
    why = getattr(error, "strerror", None) or str(error)
    problem = Diagnostic(f"{host}:{port}", why[0].lower() + why[1:], "choose another with --host and --port")
    return LoraryError("cannot listen:", [problem])


def free_port(host: str, port: int) -> int:
    """A free port for a server that another program starts; any for 0. A server that is there would answer for it.

    Raises:
        LoraryError: as `bind`.
    """
    with bind(host, port) as listener:
        return int(listener.getsockname()[1])


def local_url(host: str, port: int) -> str:
    """The URL at which this machine reaches a server that listens at this address.

    >>> local_url("0.0.0.0", 8000), local_url("::1", 8000)
    ('http://127.0.0.1:8000', 'http://[::1]:8000')
    """
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"http://{host}:{port}"
