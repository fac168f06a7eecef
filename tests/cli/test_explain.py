from __future__ import annotations

import json

from headway.cli import main
from headway.config import EngineArgs


def test_every_setting_is_explained(capsys) -> None:
    assert main(["config", "explain", "--model", "smollm2-135m-instruct", "--max-num-seqs", "8", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert list(settings) == list(EngineArgs.__dataclass_fields__)
    assert settings["max_num_seqs"] == {"value": 8, "reason": "given"}
    assert settings["distributed_executor_backend"]["value"] == "uni"
    assert settings["max_model_len"]["value"] == 8192


def test_the_table_has_a_row_for_each(capsys) -> None:
    assert main(["config", "explain", "--model", "all-minilm-l6-v2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        "setting",
        *EngineArgs.__dataclass_fields__,
    ]
    assert max(map(len, lines)) <= 120


def test_settings_that_contradict_are_one_line(capsys) -> None:
    words = ["--max-num-batched-tokens", "16", "--max-num-seqs", "32"]
    assert main(["config", "explain", "--model", "smollm2-135m-instruct", *words]) == 2
    assert capsys.readouterr().err == "headway: max_num_batched_tokens=16: must be at least max_num_seqs=32\n"


def test_a_misspelt_model_is_one_line(capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["config", "explain", "--model", "smollm2-135m-instrct"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "did you mean smollm2-135m-instruct?" in said


def test_an_executor_of_ones_own_is_looked_for(capsys) -> None:
    command = ["config", "explain", "--model", "smollm2-135m-instruct", "--distributed-executor-backend"]
    assert main([*command, "headway.executor.uni:UniExecutor"]) == 0
    for path, accepted in (
        ("nowhere:Executor", "cannot be imported (No module named 'nowhere')"),
        ("headway.executor.uni:Other", "cannot be imported (module 'headway.executor.uni' has no attribute 'Other')"),
        ("pathlib:Path", "is no executor (see headway.executor.port): it has no start, submit, mask, call, health"),
    ):
        assert main([*command, path]) == 2
        assert f"headway: distributed_executor_backend='{path}': {accepted}" in capsys.readouterr().err
