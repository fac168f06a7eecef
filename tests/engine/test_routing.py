"""Where a request goes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headway.engine.routing import CHUNK, SLACK, Router, choose, prefix_keys
from headway.messages import Request

LOADS = st.dictionaries(st.integers(0, 7), st.integers(0, 1000), min_size=1)
TOKENS = st.lists(st.integers(0, 3), max_size=4 * CHUNK)


def request(tokens: list[int], salt: str = "") -> Request:
    return Request(request_id="r", prompt_token_ids=tokens, cache_salt=salt)


@given(LOADS, st.integers())
def test_without_an_owner_the_least_loaded_is_chosen(loads: dict[int, int], turn: int) -> None:
    assert loads[choose(loads, None, turn)] == min(loads.values())


@given(LOADS, st.integers(0, 9), st.integers())
def test_an_owner_is_chosen_unless_it_has_far_more_than_the_least(loads: dict[int, int], owner: int, turn: int) -> None:
    least, chosen = min(loads.values()), choose(loads, owner, turn)
    if owner in loads and loads[owner] - least <= max(SLACK, least // 4):
        assert chosen == owner
    else:
        assert loads[chosen] == least


@given(st.integers(1, 6), st.integers(0, 50))
def test_equals_take_turns(size: int, load: int) -> None:
    loads = dict.fromkeys(range(size), load)
    assert sorted(choose(loads, None, turn) for turn in range(size)) == list(range(size))


@given(TOKENS, TOKENS)
def test_prompts_have_as_many_keys_in_common_as_whole_chunks(one: list[int], other: list[int]) -> None:
    same = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    shared = [a for a, b in zip(prefix_keys(one), prefix_keys(other)) if a == b]
    assert len(shared) == same // CHUNK
    assert not set(prefix_keys(one, "salt")) & set(prefix_keys(one))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), max_size=200))
def test_replicas_stay_near_each_other_whatever_prefixes_repeat(prompts: list[tuple[int, int]]) -> None:
    router, loads = Router(prefixes=True), {0: 0, 1: 0, 2: 0}
    for prefix, rest in prompts:
        loads[router.route(request([prefix] * CHUNK + [rest] * CHUNK), loads)] += 1
        assert max(loads.values()) - min(loads.values()) <= max(SLACK, min(loads.values()) // 4) + 1


def test_a_prompt_goes_where_its_longest_prefix_was_last() -> None:
    router, idle = Router(prefixes=True), {0: 0, 1: 0}
    system = [1] * CHUNK
    router.route(request(system + [2] * CHUNK), {0: 9, 1: 0})
    assert router.route(request(system + [2] * CHUNK + [3]), idle) == 1
    router.route(request(system + [4] * CHUNK), {0: 0, 1: 9})
    assert router.route(request(system), idle) == 0
    assert router.route(request(system + [2] * CHUNK), idle) == 1
    router.forget(1)
    assert router.route(request(system + [2] * CHUNK), {0: 0, 1: SLACK}) == 0


def test_where_engines_keep_no_prefixes_only_loads_count() -> None:
    router = Router(prefixes=False)
    router.route(request([1] * CHUNK), {0: 0, 1: 5})
    assert router.route(request([1] * CHUNK), {0: 1, 1: 0}) == 1
