"""This process's connection to Ray: the one it has, a cluster's, or that of a small Ray of its own."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
from collections.abc import Generator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from typing import Any

import ray

import headway
from headway.errors import ConfigError, EngineError

_OBJECT_STORE_BYTES = 80 << 20  # about the least that Ray accepts: no step passes through it
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 otherwise: every other process of the machine would outrank the model
}


class Connection:
    """A process has one connection to Ray. Where headway made it, its engines share it and the last one closes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._close = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self, address: str | None, cpus: float) -> bool:
        """Uses the connection this process has, else joins ``address``, RAY_ADDRESS or what runs here, else starts Ray.

        cpus: what a Ray of our own has at least. True: close() must be called. Raises ConfigError, also where this
        process is connected to another cluster than ``address``.
        """
        _check_working_directory()
        with self._lock:
            if ray.is_initialized() and address not in (None, "auto", "local"):
                _check_connected(address)
            if self._users == 0:
                if ray.is_initialized():
                    return False
                self._start(address or os.environ.get("RAY_ADDRESS") or None, cpus)
            self._users += 1
            return True

    def close(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                assert self._thread is not None
                self._close.set()
                self._thread.join()

    def _start(self, address: str | None, cpus: float) -> None:
        opened: Future[None] = Future()
        self._close.clear()
        # Ray's processes die with the *thread* that started them, and the caller's may end before the engine.
        self._thread = threading.Thread(target=self._run, args=(address, cpus, opened), name="headway-ray", daemon=True)
        self._thread.start()
        opened.result()

    def _run(self, address: str | None, cpus: float, opened: Future[None]) -> None:
        try:
            _init(address, cpus)
        except BaseException as error:
            opened.set_exception(error)
            return
        opened.set_result(None)
        self._close.wait()
        ray.shutdown()


connection = Connection()


def _init(address: str | None, cpus: float) -> None:
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address not in (None, "auto", "local"):
        _check_reachable(address)
    if address != "local":
        try:
            ray.init(address=address or "auto", **settings)
            return
        except ConnectionError as error:
            if address is not None:
                raise ConfigError("ray_address", address, "no Ray cluster was found there") from error
    with _environment(_ENVIRONMENT):
        ray.init(
            address="local",
            num_cpus=max(math.ceil(cpus), os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **settings,
        )


def _check_working_directory() -> None:
    """Ray's workers look for modules there first."""
    found = PathFinder.find_spec("headway", [os.getcwd()])
    if found and found.origin and not os.path.samefile(found.origin, headway.__file__):
        raise EngineError(f"Ray's workers would import {found.origin} in the place of headway: rename that file")


def _check_connected(address: str) -> None:
    """A process cannot be connected to two clusters."""
    connected = ray.get_runtime_context().gcs_address
    if _endpoint(address) != _endpoint(connected):
        raise ConfigError("ray_address", address, f"this process is connected to Ray at {connected}")


def _endpoint(address: str) -> tuple[str, int]:
    """The numeric address and port; this node's has several names, of which Ray uses one."""
    host, port = _split(address)
    with suppress(OSError):
        host = socket.gethostbyname(host)
    return ray.util.get_node_ip_address() if host.startswith("127.") else host, port


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:  # ray:// is for programs outside; the engine runs on a node
        raise ConfigError("ray_address", address, "must be host:port, auto or local")
    return host, int(port)


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    try:
        socket.create_connection(_split(address), timeout=5).close()
    except OSError as error:
        raise ConfigError("ray_address", address, f"nothing answers there ({error})") from error


@contextmanager
def _environment(values: Mapping[str, str]) -> Generator[None]:
    """Sets what is not set."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)
