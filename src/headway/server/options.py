"""What a user may set on a server, beside its engine."""

from __future__ import annotations

from dataclasses import dataclass

from headway.config.args import check_fields, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Raises ConfigError on a value out of range."""

    host: str = setting("127.0.0.1", text="address to listen on; 0.0.0.0 is every interface")
    port: int = setting(8000, text="TCP port; 0 takes a free one", low=0, high=65535)
    shutdown_timeout: float = setting(
        30.0, text="seconds that running requests have to finish after SIGTERM or Ctrl-C", low=0
    )
    max_waiting: int = setting(2048, text="requests that may wait for the engine; further ones get status 429", low=0)
    max_body_bytes: int = setting(32 << 20, text="largest request body, in bytes", low=1)

    def __post_init__(self) -> None:
        check_fields(self)
