"""The Grafana dashboard asks for metrics that there are."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

from tests.server.conftest import Served

FILE = Path(__file__).parents[2] / "docs" / "grafana.json"


def test_every_metric_of_the_dashboard_is_in_a_scrape_with_its_labels(served: Served) -> None:
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        scraped = dict(re.findall(r"^(headway:\w+)\{(.*)\}", answer.read().decode(), re.MULTILINE))
    targets = [target for panel in json.loads(FILE.read_text())["panels"] for target in panel["targets"]]
    assert len(targets) > 12
    for target in targets:
        names = re.findall(r"headway:\w+", target["expr"])
        assert names
        assert [name for name in names if name not in scraped] == []
        labels = {"model_name", *re.findall(r"by \((\w+)\)", target["expr"])}
        assert all(f'{label}="' in scraped[name] for label in labels for name in names), target


def test_every_metric_is_on_the_dashboard(served: Served) -> None:
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        families = re.findall(r"^# TYPE (headway:\w+) (?!unknown)", answer.read().decode(), re.MULTILINE)
    text = FILE.read_text()
    assert [name for name in families if name not in text] == []
