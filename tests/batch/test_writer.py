from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from headway.batch.writer import OrderedWriter
from headway.errors import ConfigError


def rows(path: Path) -> list[int]:
    return [json.loads(line)["row"] for line in path.read_text().splitlines()]


def test_rows_come_out_in_order_however_they_finish(tmp_path: Path) -> None:
    order = list(range(50))
    random.Random(0).shuffle(order)
    with OrderedWriter(tmp_path / "out.jsonl") as writer:
        for index in order:
            writer.put(index, {"row": index})
    assert rows(tmp_path / "out.jsonl") == list(range(50))
    assert list(tmp_path.iterdir()) == [tmp_path / "out.jsonl"]


def test_the_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text('{"row": -1}\n')
    with OrderedWriter(out) as writer:
        writer.put(0, {"row": 0})
        assert rows(out) == [-1]
    assert rows(out) == [0]


def test_an_interrupt_keeps_every_finished_row(tmp_path: Path) -> None:
    writer = OrderedWriter(tmp_path / "out.jsonl")
    with pytest.raises(KeyboardInterrupt), writer:
        writer.put(0, {"row": 0})
        writer.put(2, {"row": 2})
        raise KeyboardInterrupt
    assert not (tmp_path / "out.jsonl").exists()
    assert rows(writer.partial) == [0, 2]
    assert writer.written == 2


def test_what_an_interrupted_job_kept_stays_until_another_has_a_row(tmp_path: Path) -> None:
    kept = tmp_path / "out.jsonl.partial"
    kept.write_text('{"row": 0}\n')
    with pytest.raises(KeyboardInterrupt), OrderedWriter(tmp_path / "out.jsonl"):
        raise KeyboardInterrupt
    assert rows(kept) == [0]
    with OrderedWriter(tmp_path / "out.jsonl") as writer:
        writer.put(0, {"row": 5})
        assert rows(kept) == [5]  # at once: a process that is killed keeps it too
    assert rows(tmp_path / "out.jsonl") == [5]
    kept.write_text('{"row": 0}\n')
    with OrderedWriter(tmp_path / "out.jsonl"):
        pass
    assert rows(tmp_path / "out.jsonl") == []


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "out.jsonl")
    with OrderedWriter(tmp_path / "link.jsonl") as writer:
        writer.put(0, {"row": 0})
    assert (tmp_path / "link.jsonl").is_symlink()
    assert rows(tmp_path / "out.jsonl") == [0]


def test_a_device_is_written_and_not_replaced(tmp_path: Path) -> None:
    with OrderedWriter(Path("/dev/null")) as writer:
        writer.put(0, {"row": 0})
    assert Path("/dev/null").is_char_device()
    with pytest.raises(ConfigError, match="No space left"), OrderedWriter(Path("/dev/full")) as writer:
        writer.put(0, {"row": 0})


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        OrderedWriter(tmp_path / "missing" / "out.jsonl")
    with pytest.raises(ConfigError, match="is a directory"):
        OrderedWriter(tmp_path)
