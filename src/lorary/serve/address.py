"""The address of a server that another program starts."""

from __future__ import annotations

import socket

from lorary.errors import ConfigError, Diagnostic


def free_port(host: str, port: int) -> int:
    """The port to listen at, any free one for 0. Another server there would answer in place of ours.

    Raises:
        ConfigError: it is taken, or the address is not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except (OSError, UnicodeError) as error:
        what = f"{host}:{port}: {getattr(error, 'strerror', None) or error}"
        raise ConfigError("cannot serve:", [Diagnostic("--port", what, "choose another --host or --port")]) from None
