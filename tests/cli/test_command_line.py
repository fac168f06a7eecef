from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headway.cli import main
from headway.cli.commands import COMMANDS

GOLDEN = Path(__file__).with_name("command_line.txt")


def described() -> str:
    """Every command and option, one a line."""
    lines: list[str] = []
    for command in COMMANDS:
        lines.append(f"headway {command.words}")
        for action in command.parser()._actions:
            names = " ".join(action.option_strings) or action.dest.upper()
            lines.append(f"  {names} {action.metavar or ''}".rstrip())
    return "\n".join(lines) + "\n"


def test_the_command_line_is_frozen() -> None:
    """A deliberate change: write described() to the file."""
    assert described() == GOLDEN.read_text()


def test_help_is_quick_and_imports_no_torch() -> None:
    probe = (
        "import sys; from headway.cli import main; main(['--help'])\n"
        "for name in ('torch', 'numpy', 'tokenizers', 'transformers', 'ray'): assert name not in sys.modules, name"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", probe], check=True, stdout=subprocess.DEVNULL)
    assert time.perf_counter() - start < 2  # 0.1 s alone; the machine may be busy


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.words)
def test_every_command_has_help(command, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command.words.split(), "--help"])
    assert left.value.code == 0
    assert command.text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bath"], "unknown command bath; did you mean batch? (see headway --help)"),
        (["bench", "latencies"], "unknown command bench latencies; did you mean bench latency? (see headway --help)"),
        (
            ["config", "explain", "--model", "m", "--max-num-seq", "4"],
            "unknown argument --max-num-seq; did you mean --max-num-seqs? (see headway config explain --help)",
        ),
        (
            ["config", "explain"],
            "the following arguments are required: --model (see headway config explain --help)",
        ),
        (
            ["config", "explain", "--model", "m", "--dtype", "fp8"],
            "dtype='fp8': must be one of bfloat16, float16, float32",
        ),
        (
            ["config", "explain", "--model", "m", "--threads", "two"],
            "argument --threads: invalid int value: 'two' (see headway config explain --help)",
        ),
        (
            ["config", "explain", "--model", "m", "--async-scheduling", "maybe"],
            "argument --async-scheduling/--no-async-scheduling: takes no value, but 'maybe' follows"
            " (see headway config explain --help)",
        ),
        (
            ["config", "explain", "--model", "m", "--placement-group-config", "[]"],
            "argument --placement-group-config: '[]': must be a JSON object (see headway config explain --help)",
        ),
        (["config", "explain", "--model", "m", "--threads", "9999"], "threads=9999: must be at most 1024"),
        (["batch", "in.jsonl", "-o", "x", "--model", "m", "--max-tokens", "0"], "max_tokens=0: must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words: list[str], message: str, capsys) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"headway: {message}\n"


def test_a_warning_is_one_line() -> None:
    probe = "import sys, warnings; from headway.cli import main; import headway.cli.version as v\n"
    probe += "v.run = lambda: warnings.warn('mind the gap') or 0\nsys.exit(main(['version']))"
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    assert done.stderr == "headway: mind the gap\n"


def test_a_group_of_commands_lists_them(capsys) -> None:
    assert main(["bench"]) == 0
    assert "headway bench latency" in capsys.readouterr().out


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2


def test_a_reader_that_leaves_early_is_no_failure_of_ours() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "headway", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("words", ["chat", "bench throughput", "bench latency", "batch {input} -o {output}"])
def test_what_generates_refuses_an_encoder(words: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "in").write_text('{"prompt": "a"}')
    filled = words.format(input=tmp_path / "in", output=tmp_path / "out").split()
    assert main([*filled, "--model", "all-minilm-l6-v2"]) == 2
    assert capsys.readouterr().err == "headway: runner='generate': BertModel does not generate; pooling is accepted\n"
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
