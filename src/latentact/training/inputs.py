"""Digests of what a run learns from, by which a resumed run notices that it has changed.

The names of a stage's settings say what they are: `data`, `dataset_root` and `labels` are datasets and their
labels, `policy`, `vla` and `start` are folders of models, and `lam_tokens_path` is a file of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentact.data.cache import DataConfig, cache_folder
from latentact.data.digest import Memo, blake2b, file_digest
from latentact.data.format import open_source
from latentact.data.latents import TOKENS, labeled_data
from latentact.data.mixture import TrainingDataConfig
from latentact.errors import UserError
from latentact.io.tensors import WEIGHTS

_COLUMNS = ("action", "observation.state")


def input_digests(config: Any) -> dict[str, str]:
    """Return a digest of the content of each input of a stage.

    Args:
        config: settings of the stage.

    Returns:
        Path of the input -> digest. Inputs that are not on this machine, such as those of a run that has been
        moved and hub ids that are not downloaded yet, are left out.
    """
    values = vars(config)
    files = [Path(folder) / WEIGHTS for folder in _given(values, "policy", "vla", "start")]
    files += [_token_file(Path(path)) for path in _given(values, "labels", "lam_tokens_path")]
    found = {str(file): file_digest(file) for file in files if file.is_file()}
    for data in _datasets(values):
        path = Path(data.path).expanduser()
        with suppress(UserError):
            if data.path and path.exists():
                found[f"{path} ({data.camera})" if data.camera else str(path)] = _dataset_digest(path, data)
    return found


def _given(values: Mapping[str, Any], *names: str) -> list[str]:
    """Return the paths among these settings; a setting of this name may also hold the settings of a model."""
    return [values[name] for name in names if isinstance(values.get(name), str) and values[name]]


def _token_file(path: Path) -> Path:
    return path / TOKENS if path.is_dir() else path


def _datasets(values: Mapping[str, Any]) -> Iterator[DataConfig]:
    for path in _given(values, "data", "dataset_root"):
        yield DataConfig(path=path)
    for folder in _given(values, "labels"):
        with suppress(UserError):
            yield labeled_data(folder)
    match values.get("data"):
        case TrainingDataConfig(mixture=parts) if parts:
            yield from (DataConfig(path=part.path, camera=part.camera) for part in parts)
        case DataConfig() as data:
            yield data


def _dataset_digest(path: Path, config: DataConfig) -> str:
    """Return a digest of the frames, actions and states of a dataset, without decoding."""
    memo = Memo(cache_folder(config.cache_dir) / "memo", path)
    source = open_source(path, config.camera, memo)
    with suppress(OSError):  # full or read-only disk: only bookkeeping is lost
        memo.save()
    columns = [source.column(name) for name in _COLUMNS]
    return blake2b(
        *(episode.content.encode() for episode in source.episodes),
        *(b"" if column is None else column.tobytes() for column in columns),
    )
