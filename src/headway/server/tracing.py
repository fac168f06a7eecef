"""OpenTelemetry traces, where they are asked for: a span for each request, below its caller's.

Attributes are those of the semantic conventions for generative AI. Nothing of what is asked or answered is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from time import perf_counter

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import SpanKind, StatusCode, get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as missing:
    from headway.errors import MissingDependencyError

    raise MissingDependencyError("otlp_traces_endpoint needs OpenTelemetry: pip install 'headway[otel]'") from missing
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headway import __version__
from headway.messages import PooledOutput, RequestOutput, SamplingParams

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    **{f"/v1/{name}": name for name in ("embeddings", "classify", "score", "rerank")},
}
_PARENT = TraceContextTextMapPropagator()


class Traces:
    """Sends spans to an OTLP endpoint (HTTP), in a thread of its own.

    OpenTelemetry's own environment variables say the rest: sampling, headers, the service's name.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        service = Resource.create({"service.name": "headway", "service.version": __version__})
        service = service.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=service, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint, timeout=2)  # s, which a lost collector may delay the server's end
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("headway", __version__)
        self._model = model

    def close(self) -> None:
        """Sends what was not sent yet."""
        self._provider.shutdown()

    def around(self, app: ASGIApp) -> ASGIApp:
        """The same application, with spans."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            operation = OPERATIONS.get(path) if scope.get("method") == "POST" else None
            if operation is None:
                await app(scope, receive, send)
                return
            parent = _PARENT.extract({name.decode(): value.decode("latin-1") for name, value in scope["headers"]})
            attributes = {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "headway",
                "gen_ai.request.model": self._model,
                "gen_ai.response.model": self._model,
                "url.path": path,
            }
            name = f"{operation} {self._model}"
            with self._tracer.start_as_current_span(name, parent, SpanKind.SERVER, attributes) as span:

                async def sending(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        status = HTTPStatus(message["status"])
                        span.set_attribute("http.response.status_code", status)
                        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                            span.set_attribute("error.type", str(status.value))
                            span.set_status(StatusCode.ERROR)
                    await send(message)

                await app(scope, receive, sending)

        return traced

    @contextmanager
    def watch(self, params: SamplingParams, stream: bool) -> Generator[Callable[[RequestOutput], None]]:
        """What it gives is to be called with each output, of all prompts of the current span's request."""
        span, start = get_current_span(), perf_counter()
        span.set_attribute("gen_ai.request.temperature", params.temperature)
        span.set_attribute("gen_ai.request.top_p", params.top_p)
        span.set_attribute("gen_ai.request.stream", stream)
        read, cached, written = (f"gen_ai.usage.{kind}_tokens" for kind in ("input", "cache_read.input", "output"))
        tokens = {read: 0, cached: 0, written: 0}
        prompts: set[str] = set()
        reasons: dict[int, str] = {}

        def see(output: RequestOutput) -> None:
            if stream and not prompts:
                span.set_attribute("gen_ai.response.time_to_first_chunk", perf_counter() - start)
            if output.request_id not in prompts:
                prompts.add(output.request_id)
                tokens[read] += len(output.prompt_token_ids)
                tokens[cached] += output.num_cached_tokens
            for one in output.outputs:
                tokens[written] += len(one.token_ids)
                if one.finish_reason is not None:
                    reasons[one.index] = one.finish_reason

        try:
            yield see
        finally:  # a client that leaves is told of, too
            span.set_attributes(tokens)
            span.set_attribute("gen_ai.response.finish_reasons", [reasons[index] for index in sorted(reasons)])

    def pooled(self, outputs: Sequence[PooledOutput]) -> None:
        get_current_span().set_attribute("gen_ai.usage.input_tokens", sum(len(one.prompt_token_ids) for one in outputs))
