"""What a replica that starts again must do, against engines that went on."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from headway.engine.replay import GONE, Replay

ACTS = st.lists(
    st.sampled_from([("sleep", 1), ("sleep", 2), ("wake_up",), ("update_weights", "a"), ("update_weights", "b")])
)


class Engine:
    """The rules of headway.engine.upkeep."""

    def __init__(self) -> None:
        self.weights: str | None = "first"  # None: asleep
        self.level = 0

    def act(self, method: str, *args: Any) -> None:
        if method == "sleep":
            self.level = max(self.level, args[0])
            if args[0] == 2:
                self.weights = None
        elif method == "update_weights":
            self.weights = args[0]
        else:
            if self.level == 2 and self.weights is None:
                self.weights = "first"
            self.level = 0

    @property
    def state(self) -> tuple[Any, ...]:
        return self.weights, self.level


@given(ACTS)
def test_an_engine_that_starts_again_comes_to_where_the_others_are(acts: list[tuple[Any, ...]]) -> None:
    old, new, replay = Engine(), Engine(), Replay()
    for act in acts:
        old.act(*act)
        replay.done(*act)
    for method, args in replay.acts:
        new.act(method, *args)
    assert new.state == old.state
    assert len(replay.acts) <= 2 + len([act for act in acts if act[0] == "sleep"])


def test_weights_whose_file_is_gone_cannot_be_had_again() -> None:
    replay = Replay()
    replay.done("update_weights", GONE)
    assert not replay.fit
    replay.done("sleep", 2)
    replay.done("wake_up")
    assert replay.fit and not replay.acts
