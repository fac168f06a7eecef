"""The examples run from a clone, as they are."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.server.conftest import Served

from headway.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
Said = Callable[..., str]


def said_by(name: str, where: Path) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name], cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def said_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Said:
    """In this process, which has torch already; of the topics, so many."""
    monkeypatch.chdir(tmp_path)
    topics = (EXAMPLES / "data" / "python_topics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data").mkdir()

    def run(name: str, count: int = len(topics)) -> str:
        (tmp_path / "data" / "python_topics.jsonl").write_text("".join(topics[:count]))
        runpy.run_path(str(shutil.copy(EXAMPLES / name, tmp_path)), run_name="__main__")
        return capfd.readouterr().out

    return run


def test_every_example_is_run() -> None:
    source = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in source] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("generate.py", "Paris"), ("chat.py", "2: "), ("stream.py", "[sea]"), ("embed.py", "The continue statement")],
)
def test_it_says_what_it_found(name: str, words: str, said_here: Said) -> None:
    assert words in said_here(name)


def test_a_job_on_this_machine_answers_every_row_and_is_not_done_twice(tmp_path: Path) -> None:
    assert "37 rows in answers.jsonl, 0 failed" in said_by("batch_local.py", tmp_path)
    answers = (tmp_path / "answers.jsonl").read_text()
    assert answers.count("\n") == 37
    assert "37 rows in answers.jsonl, 0 failed" in said_by("batch_local.py", tmp_path)
    assert (tmp_path / "answers.jsonl").read_text() == answers


def test_the_demo_shows_questions_and_their_answers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As make demo does it, with fewer rows."""
    source, target = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    lines = (EXAMPLES / "questions.jsonl").read_text().splitlines()
    source.write_text(f"{lines[0]}\n{lines[38]}\n")
    options = ["-o", str(target), "--model", "smollm2-135m-instruct", "--max-tokens", "16"]
    assert main(["batch", str(source), *options]) == 0
    capfd.readouterr()
    subprocess.run([sys.executable, EXAMPLES.parent / "scripts" / "show_answers.py", target, "2"], check=True)
    said = capfd.readouterr().out
    assert "Q: What is the capital of Portugal?\nA: Portugal" in said
    assert "Q: The three most important things" in said


def test_second_turns_are_cached(said_here: Said) -> None:
    said = said_here("shared_engine.py", 6)
    percent = next(int(line.partition("%")[0]) for line in said.splitlines() if "prefix cache" in line)
    assert percent > 50


def test_rows_get_labels(said_here: Said) -> None:
    said = said_here("classify.py", 6).splitlines()
    labels = [label for part in said[-1].split(", ") for _, _, label in (part.partition(" x "),)]
    assert set(labels) <= {"statement", "operator", "data type"}


def test_a_conversation_with_a_server(said_here: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Served("smollm2-135m-instruct", "--threads", "1")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    said = said_here("serve_chat.py")
    assert "> What is the capital of France?\nThe capital of France is Paris." in said
    assert "> And of Italy?\nThe capital of Italy is Rome." in said  # what "And" is about is in the turn before
    assert server.end() == 0, server.log


@pytest.mark.long
def test_a_job_on_ray(tmp_path: Path) -> None:
    assert "37 rows" in said_by("batch_ray.py", tmp_path)
