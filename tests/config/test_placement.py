from __future__ import annotations

from typing import Any

import pytest

from headway.cli import main
from headway.config.placement import parse_placement
from headway.errors import ConfigError


def test_a_rank_takes_a_bundle() -> None:
    assert parse_placement({}, 2, {"CPU": 4}) == (({"CPU": 4}, {"CPU": 4}), "PACK")
    given = {"bundle_per_worker": {"GPU": 1, "CPU": 0}, "strategy": "SPREAD"}
    assert parse_placement(given, 2, {"CPU": 4}) == (({"GPU": 1}, {"GPU": 1}), "SPREAD")
    assert parse_placement({"bundles": [{"CPU": 1}, {"slow": 2}]}, 2, {}) == (({"CPU": 1}, {"slow": 2}), "PACK")


@pytest.mark.parametrize(
    ("given", "accepted"),
    [
        ({"bundle": []}, "has bundle, but accepted are bundles, bundle_per_worker, strategy"),
        ({"bundles": [], "bundle_per_worker": {}}, "has both bundles and bundle_per_worker; one is accepted"),
        ({"strategy": "TIGHT"}, "strategy must be one of PACK, STRICT_PACK, SPREAD, STRICT_SPREAD"),
        ({"bundles": [{"CPU": 1}]}, "bundles has 1, but the engine has 2 rank"),
        ({"bundles": {"CPU": 1}}, "a bundle is resources and how much of each"),
        ({"bundle_per_worker": {"CPU": 0}}, "at least one above 0"),
        ({"bundle_per_worker": {"CPU": -1, "GPU": 1}}, "a bundle is resources"),
        ({"bundle_per_worker": {"CPU": "1"}}, "a bundle is resources"),
    ],
)
def test_what_cannot_be_honoured_is_named(given: dict[str, Any], accepted: str) -> None:
    with pytest.raises(ConfigError, match=f"placement_group_config=.*{accepted}"):
        parse_placement(given, 2, {"CPU": 1})


@pytest.mark.parametrize("word", ["[]", "{CPU: 1}"])
def test_on_the_command_line_it_is_a_json_object(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "explain", "--model", "m", "--placement-group-config", word]) == 2
    assert "must be a JSON object" in capsys.readouterr().err
