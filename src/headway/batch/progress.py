"""How a job comes along, for people: rows, tokens a second, errors and the time left, on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

from headway.batch.ledger import Answer, Tally


class Progress:
    """Nothing is shown, or counted, where there is no terminal. done: what earlier runs of the job did."""

    def __init__(self, total: Callable[[], int | None], done: Tally, show: bool) -> None:
        show = show and sys.stderr.isatty()
        self._bar = tqdm(
            total=total() if show else None, initial=done.rows, unit="row", dynamic_ncols=True, disable=not show
        )
        self._failed, self._tokens = done.failed, 0
        self._began = time.perf_counter()

    def update(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self._tokens += 0 if answer.copied else answer.output_tokens or answer.prompt_tokens
            self._failed += answer.error is not None
        if not self._bar.disable:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update(len(answers))

    def _rates(self) -> str:
        rate = self._tokens / (time.perf_counter() - self._began)
        return f"{rate:.0f} tokens/s" + (f", {self._failed} failed" if self._failed else "")

    def close(self) -> None:
        self._bar.close()
