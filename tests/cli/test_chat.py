"""headway chat, as a process with a person on the other end of the pipe."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

COMMAND = [
    *(sys.executable, "-m", "headway", "chat", "--model", "smollm2-135m-instruct", "--temperature", "0"),
    *("--kv-cache-memory-bytes", "200000000", "--max-model-len", "1024", "--max-tokens", "80"),
]


@pytest.fixture
def chat() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        yield process
        process.kill()


def test_a_conversation_remembers_and_ends_with_its_input(chat: subprocess.Popen[str]) -> None:
    out, err = chat.communicate("Let us talk about whales.\n\nWhich animal do we talk about?\n", timeout=90)
    assert chat.returncode == 0
    assert err == ""
    assert "hale" in out.strip().splitlines()[-1]


def test_ctrl_c_ends_the_answer_and_not_the_conversation(chat: subprocess.Popen[str]) -> None:
    assert chat.stdin
    assert chat.stdout
    chat.stdin.write("Write a very long story about the sea.\n")
    chat.stdin.flush()
    assert chat.stdout.read(1)
    chat.send_signal(signal.SIGINT)
    out, err = chat.communicate("What is the capital of France?\n", timeout=90)
    assert chat.returncode == 0
    assert err == ""
    assert " ..." in out
    assert "Paris" in out.rpartition(" ...")[2]


def test_what_is_too_long_is_refused_and_forgotten(chat: subprocess.Popen[str]) -> None:
    out, err = chat.communicate("word " * 2000 + "\nWhat is 2+2?\n", timeout=90)
    assert chat.returncode == 0
    assert "1024" in err
    assert "4" in out


class Terminal:
    """The command on a terminal of its own, and the person at its keyboard."""

    def __init__(self) -> None:
        self.keyboard, follower = os.openpty()
        self.process = subprocess.Popen(COMMAND, stdin=follower, stdout=follower, stderr=follower)
        os.close(follower)

    def until(self, text: str) -> str:
        seen = ""
        while text not in seen:
            seen += os.read(self.keyboard, 4096).decode()
        return seen

    def interrupt_until(self, text: str) -> str:
        """Ctrl-C, again where it is not heeded: readline misses one that comes just before it waits for keys."""
        seen = ""
        while text not in seen:
            os.kill(self.process.pid, signal.SIGINT)
            while text not in seen and select.select([self.keyboard], [], [], 2.0)[0]:
                seen += os.read(self.keyboard, 4096).decode()
        return seen

    def type(self, text: str) -> None:
        time.sleep(0.2)  # readline looks at Ctrl-C once it waits for keys
        os.write(self.keyboard, text.encode())


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.keyboard)


def test_ctrl_c_at_the_prompt_drops_the_line_and_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.until("> ")
    for _ in range(2):  # before the first answer, and after one
        terminal.type("Nonsen")
        terminal.until("Nonsen")
        assert "Ctrl-D leaves." in terminal.interrupt_until("> ")
        terminal.type("What is the capital of France?\n")
        assert "Paris" in terminal.until("\r\n> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
