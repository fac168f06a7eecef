"""Structured output: one matcher per request, and the masks that steps in flight wait for."""

from __future__ import annotations

from headway.engine.grammar import GrammarBackend, Matcher
from headway.errors import RequestError
from headway.messages import Request, StepPlan, StructuredOutput


def constraint(request: Request) -> StructuredOutput | None:
    return request.sampling.structured if request.sampling is not None else None


class Constraints:
    """A masked step is planned before the tokens its masks depend on are known.

    So ``hold`` notes which matchers a plan's masked slots belong to, and ``masks`` asks them later. A request that has
    ended by then gets a mask of ones: the step's sampling waits for every masked slot.
    """

    def __init__(self, backend: GrammarBackend | None, vocab_size: int) -> None:
        self._backend = backend
        self._matchers: dict[str, Matcher] = {}
        self._ones = b"\xff" * (4 * -(-vocab_size // 32))

    def compile(self, request: Request) -> Matcher | None:
        """Of the request's constraint, if it has one; from any thread. RequestError if that cannot be done."""
        structured = constraint(request)
        if structured is None:
            return None
        if self._backend is None:
            raise RequestError("structured", structured, "needs a grammar library: install headway[grammar]")
        return self._backend.compile(structured)

    def add(self, request_id: str, matcher: Matcher) -> None:
        self._matchers[request_id] = matcher

    def accept(self, request_id: str, token_id: int) -> bool:
        return self._matchers[request_id].accept(token_id)

    def forget(self, request_id: str) -> None:
        self._matchers.pop(request_id, None)

    def hold(self, plan: StepPlan, request_ids: list[str]) -> list[tuple[int, str, Matcher]]:
        """The matchers of a plan's masked slots, whose requests these are."""
        return [(slot, name, self._matchers[name]) for slot, name in zip(plan.masked_slots, request_ids)]

    def masks(self, held: list[tuple[int, str, Matcher]]) -> tuple[dict[int, bytes], dict[str, RequestError]]:
        """Slot to mask, and the requests that cannot go on. Call once all tokens of earlier steps are accepted."""
        masks: dict[int, bytes] = {}
        failed: dict[str, RequestError] = {}
        for slot, name, matcher in held:
            masks[slot] = self._ones
            if self._matchers.get(name) is matcher:
                try:
                    masks[slot] = matcher.mask()
                except RequestError as error:
                    failed[name] = error
        return masks, failed
