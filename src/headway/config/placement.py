"""What a Ray placement group is asked for: one bundle of resources a rank."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

from headway.errors import ConfigError

Strategy = Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"]
Bundle = dict[str, float]

_KEYS = ("bundles", "bundle_per_worker", "strategy")


def parse_placement(
    given: dict[str, Any], ranks: int, automatic: Bundle, usual: Strategy = "PACK"
) -> tuple[tuple[Bundle, ...], Strategy]:
    """The bundles, one a rank, and how they lie on the nodes. automatic, usual: what holds where none is given.

    given: ``{"bundles": [{...}, ...]}`` or ``{"bundle_per_worker": {...}}``, ``"strategy"``. Raises ConfigError.
    """

    def refuse(accepted: str) -> ConfigError:
        return ConfigError("placement_group_config", given, accepted)

    if unknown := [key for key in given if key not in _KEYS]:
        raise refuse(f"has {unknown[0]}, but accepted are {', '.join(_KEYS)}")
    if "bundles" in given and "bundle_per_worker" in given:
        raise refuse("has both bundles and bundle_per_worker; one is accepted")
    strategy = given.get("strategy", usual)
    if strategy not in get_args(Strategy):
        raise refuse(f"strategy must be one of {', '.join(get_args(Strategy))}")
    bundles = given.get("bundles", [given.get("bundle_per_worker", automatic)] * ranks)
    if not isinstance(bundles, list) or not all(_is_bundle(bundle) for bundle in cast("list[object]", bundles)):
        raise refuse('a bundle is resources and how much of each, such as {"CPU": 2}, at least one above 0')
    bundles = cast("list[Bundle]", bundles)
    if len(bundles) != ranks:
        raise refuse(f"bundles has {len(bundles)}, but the engine has {ranks} rank(s), which take one each")
    return tuple({name: amount for name, amount in bundle.items() if amount} for bundle in bundles), strategy


def _is_bundle(bundle: object) -> bool:
    if not isinstance(bundle, dict):
        return False
    amounts = list(cast("dict[object, object]", bundle).values())
    return any(amounts) and all(isinstance(x, int | float) and not isinstance(x, bool) and x >= 0 for x in amounts)
