"""Where the server listens."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from headway.errors import ConfigError
from headway.server.options import ServeOptions


def url_of(options: ServeOptions, listener: socket.socket) -> str:
    if options.uds is not None:
        return f"unix:{options.uds}"
    host, port = listener.getsockname()[:2]
    scheme = "http" if options.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def listening(options: ServeOptions) -> Generator[socket.socket]:
    """Before the model loads: a port that is taken is said at once."""
    with _listen(options) if options.uds is None else _listen_unix(options.uds) as listener:
        try:
            yield listener
        finally:
            if options.uds is not None:
                Path(options.uds).unlink(missing_ok=True)


def _listen(options: ServeOptions) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
    except OSError as error:
        listener.close()
        raise ConfigError("port", options.port, f"cannot listen on {options.host}: {error.strerror}") from error
    return listener


def _listen_unix(path: str) -> socket.socket:
    """A socket that a server left behind is taken over; one that a server listens on is not."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if os.path.exists(path):
            with socket.socket(socket.AF_UNIX) as probe:  # a file that is no socket refuses, too
                if probe.connect_ex(path) != errno.ECONNREFUSED or not stat.S_ISSOCK(os.stat(path).st_mode):
                    raise FileExistsError(errno.EEXIST, "it exists, and is no socket that was left behind")
            os.unlink(path)
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise ConfigError("uds", path, f"cannot listen there: {error.strerror or error}") from error
    return listener
