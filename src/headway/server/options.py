"""What a user may set on a server, beside its engine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from headway.config.args import check_fields, setting
from headway.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Raises ConfigError on a value out of range."""

    config: str | None = setting(text="YAML file of options, as mapping of their names to values; flags go before it")
    host: str = setting("127.0.0.1", text="address to listen on; 0.0.0.0 is every interface")
    port: int = setting(8000, text="TCP port; 0 takes a free one", low=0, high=65535)
    uds: str | None = setting(text="listen on this unix socket instead of a TCP port")
    root_path: str = setting("", text="where a proxy in front of the server has put it, such as /llm")
    api_key: str | None = setting(text="clients must send it as a bearer token (default: HEADWAY_API_KEY, if set)")
    allowed_origins: str | None = setting(text="web pages of these origins may call (CORS); comma-separated, or *")
    ssl_certfile: str | None = setting(text="PEM file of the server's certificate: HTTPS")
    ssl_keyfile: str | None = setting(text="PEM file of its key, if it is not in the certificate's")
    ssl_ca_certs: str | None = setting(text="PEM file: clients must have a certificate from one of these authorities")
    shutdown_timeout: float = setting(
        30.0, text="seconds that running requests have to finish after SIGTERM or Ctrl-C", low=0
    )
    max_waiting: int = setting(2048, text="requests that may wait for the engine; further ones get status 429", low=0)
    chat_template: str | None = setting(text="file of the chat template to use instead of the model's")
    trust_request_chat_template: bool = setting(False, text="requests may bring a chat_template, which is a program")
    client_timeout: float = setting(
        30.0,
        text="seconds in which a client must have sent a request, or 16 KiB of it, and taken what waits for it",
        low=1,
    )
    max_body_bytes: int = setting(8 << 20, text="largest request body, in bytes", low=1)
    otlp_traces_endpoint: str | None = setting(
        text="send OpenTelemetry traces to this URL, such as http://localhost:4318/v1/traces (needs headway[otel])"
    )

    api_server_count: int = setting(1, text="processes that read requests and write answers, on one port", low=1)
    on_engine_death: Literal["restart", "exit"] = setting(
        "restart", text="what happens when an engine dies: it starts again, or the server ends with status 1"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("host", "uds", "api_key"):
            if getattr(self, name) == "":
                raise ConfigError(name, "", "must not be empty")
        for name in ("ssl_keyfile", "ssl_ca_certs"):
            if getattr(self, name) is not None and self.ssl_certfile is None:
                raise ConfigError(name, getattr(self, name), "needs ssl_certfile")
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "chat_template"):
            path = getattr(self, name)
            if path is not None and not os.access(path, os.R_OK):
                raise ConfigError(name, path, "cannot be read")
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError("root_path", self.root_path, "must start with /")
        if self.otlp_traces_endpoint is not None:
            if not self.otlp_traces_endpoint.startswith(("http://", "https://")):
                raise ConfigError("otlp_traces_endpoint", self.otlp_traces_endpoint, "must be an http or https URL")
            import_module("headway.server.tracing")  # what is missing is said before the model loads
