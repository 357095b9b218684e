"""Digests of what a run learns from, by which a resumed run notices that it has changed.

Inputs are recognized by the names of settings: `labels`, `data`, `policy`, ... Hub ids are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from latentact.data.cache import DataConfig, cache_folder
from latentact.data.digest import Memo, blake2b, file_digest
from latentact.data.format import CameraRequired, open_source
from latentact.data.latents import CODES, TOKENS, TOKENS_KEY, VALID, labeled_data
from latentact.data.mixture import TrainingDataConfig
from latentact.errors import UserError
from latentact.io.tensors import WEIGHTS

_MODELS = ("lam", "policy", "start", "vla", "vlm")
_TOKENS = ("labels", "lam_tokens_path")
_DATASETS = ("data", "dataset_root")
_COLUMNS = ("action", "observation.state", TOKENS_KEY, CODES, VALID)


def input_digests(config: Any) -> dict[str, str]:
    """Return a digest of the content of each input of a stage.

    Args:
        config: settings of the stage.

    Returns:
        Path of the input -> digest. Inputs that are not on this machine, such as those of a run that has been
        moved, are left out.
    """
    found: dict[str, str] = {}
    columns = [*_COLUMNS, vars(config).get("only", "")]  # the column that flags rows to learn from
    for each in _inputs(config):
        # What is missing or unreadable is left to the stage, which may not need it any more.
        with suppress(UserError, OSError, RuntimeError):
            if isinstance(each, Path):
                with _memo(each) as memo:
                    found[str(each)] = memo.get(each, "file", file_digest)
            else:
                path = Path(each.path).expanduser()
                name = f"{path} ({each.camera})" if each.camera else str(path)
                with _memo(path, each.cache_dir) as memo:
                    found[name] = _dataset_digest(path, each.camera, columns, memo)
    return found


def _inputs(config: Any) -> Iterator[Path | DataConfig]:
    """Yield the files and datasets among the settings of a stage."""
    for name, value in vars(config).items():
        if isinstance(value, TrainingDataConfig) and value.mixture:
            yield from (DataConfig(path=part.path, camera=part.camera) for part in value.mixture)
        elif isinstance(value, DataConfig):
            if value.path:
                yield value
        elif dataclasses.is_dataclass(value):
            yield from _inputs(value)
        elif not isinstance(value, str) or not value:
            continue
        elif name in _MODELS:
            yield Path(value) / WEIGHTS
        elif name in _DATASETS:
            yield DataConfig(path=value)
        elif name in _TOKENS:
            yield Path(value) / TOKENS if Path(value).is_dir() else Path(value)
            if (Path(value) / TOKENS).exists():
                with suppress(UserError):  # a token file belongs to any dataset
                    yield labeled_data(value)


def _dataset_digest(path: Path, camera: str, columns: Sequence[str], memo: Memo) -> str:
    """Return a digest of frames, tasks and some columns of a dataset, without decoding."""
    try:
        source = open_source(path, camera, memo)
    except CameraRequired as error:
        return blake2b(*(_dataset_digest(path, each, columns, memo).encode() for each in error.cameras))
    parts = [text.encode() for episode in source.episodes for text in (episode.content, episode.task)]
    found = [source.column(name) for name in columns if name]
    parts += [b"" if values is None else values.astype(np.float64).tobytes() for values in found]
    return blake2b(*parts)


@contextmanager
def _memo(path: Path, cache_dir: str = "") -> Generator[Memo]:
    memo = Memo(cache_folder(cache_dir) / "memo", path)
    yield memo
    with suppress(OSError):  # full or read-only disk: only bookkeeping is lost
        memo.save()
