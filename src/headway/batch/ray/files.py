"""headway batch --ray: a file or a folder of rows through Ray Data, into a folder of files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from headway.batch.processor import Processor
from headway.batch.readers import format_of
from headway.errors import ConfigError, MissingDependencyError

try:
    import ray.data
    from ray.data.checkpoint import CheckpointConfig
    from ray.data.expressions import col

    from headway.executor.ray.cluster import connection
except ImportError as missing:
    raise MissingDependencyError("datasets need Ray Data: pip install 'headway[ray]'") from missing

_CPUS = 4  # of a Ray of our own, whatever this machine has: an engine's, a checkpoint's, and those of reads and writes

READ, WRITTEN = ("jsonl", "csv", "parquet"), ("jsonl", "parquet")


def run(
    processor: Processor, source: str, target: str, address: str, kinds: tuple[str | None, str | None], key: str | None
) -> tuple[int, int]:
    """Rows that the folder has then, and how many of them failed. Their order is the cluster's.

    address: of the cluster; "local": one of this machine's, for this job. kinds: of input and output, if the names do
    not say. key: the column that tells rows apart; what an earlier run of the job has written is not done again.
    """
    before = _kind("input_format", kinds[0] or format_of(source), READ)
    after = _kind("output_format", kinds[1] or format_of(target), WRITTEN)
    folder = Path(target).resolve()
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and key is None)):
        raise ConfigError("output", target, "on Ray it must be a folder, new or empty")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    opened = connection.open(address, _CPUS)
    context: Any = ray.data.DataContext.get_current()
    checkpoints = context.checkpoint_config
    try:
        if key is not None:
            path = str(folder.with_name(folder.name + ".checkpoint"))
            context.checkpoint_config = CheckpointConfig(
                id_column=key, checkpoint_path=path, delete_checkpoint_on_success=False
            )
        _write(processor(_read(before, source)), after, folder)
        context.checkpoint_config = None
        written: Any = _read(after, str(folder))
        if "error" not in (written.schema() or written).names:
            return written.count(), 0
        return written.count(), written.filter(expr=col("error").is_not_null()).count()
    finally:
        context.checkpoint_config = checkpoints
        if opened:
            connection.close()


def _kind(field: str, kind: str, known: tuple[str, ...]) -> str:
    if kind not in known:
        raise ConfigError(field, kind, f"on Ray it must be one of {', '.join(known)}")
    return kind


def _read(kind: str, path: str) -> Any:
    read = {"jsonl": ray.data.read_json, "csv": ray.data.read_csv, "parquet": ray.data.read_parquet}[kind]
    return read(path, file_extensions=None)


def _write(dataset: Any, kind: str, folder: Path) -> None:
    write = dataset.write_json if kind == "jsonl" else dataset.write_parquet
    write(str(folder))
