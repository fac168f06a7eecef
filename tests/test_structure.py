"""What holds for the code base as a whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import headway

ROOT = Path(__file__).parents[1]
ENGINE = [
    "config",
    "messages",
    "ops",
    "tokenizers",
    "models",
    "cache",
    "scheduler",
    "worker",
    "executor",
    "engine",
    "llm",
]
LINE_BUDGET = 20_000


def test_a_room_imports_only_from_the_rooms_below_it() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_engine_stays_within_its_line_budget() -> None:
    rooms = [ROOT / "src" / "headway" / room for room in ENGINE]
    files = [*(file for room in rooms for file in room.rglob("*.py")), *(ROOT / "csrc").glob("*.*")]
    assert len(files) > 100
    lines = {f: f.read_text().count("\n") for f in files}
    largest = sorted(lines.items(), key=lambda item: -item[1])[:5]
    assert sum(lines.values()) <= LINE_BUDGET, [(str(f.relative_to(ROOT)), n) for f, n in largest]


def test_the_public_names_are_pinned() -> None:
    assert sorted(headway.__all__) == [
        "AsyncLLM",
        "LLM",
        "PoolingParams",
        "RequestOutput",
        "SamplingParams",
        "StructuredOutput",
        "__version__",
    ]
    assert all(getattr(headway, name) for name in headway.__all__)


def test_importing_the_package_imports_nothing_heavy() -> None:
    probe = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        "import headway\n"
        "assert time.perf_counter() - start < 0.5  # 0.02 s alone; the machine may be busy\n"
        "heavy = {'torch', 'numpy', 'transformers', 'tokenizers', 'ray', 'msgspec'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_settings_and_messages_import_no_torch() -> None:
    probe = (
        "import sys, headway.config, headway.messages, headway.errors, headway.cache, headway.scheduler\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_the_offline_engine_imports_no_asyncio() -> None:
    probe = "import sys\nfrom headway import LLM\nassert 'asyncio' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True)
