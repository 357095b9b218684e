"""LAM tokens of a dataset, computed once for all later runs: `latentact precompute`.

Example: `latentact precompute --dataset-root data/pusht --lam-model-path runs/lam --output-dir data/tokens`.
The tokens become columns of a LeRobot v3 dataset (videos are hard-linked), files, or both; with `--as action`
they become its actions, so that any LeRobot policy can be pretrained on them. They are cached, so that other
outputs reuse them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from latentact.config import BatchSize, Between, OneOf, Seconds, Workers, to_dict, updated
from latentact.data.cache import DataConfig
from latentact.data.convert import Piece, check_convertible, convert, convert_with_actions
from latentact.data.format import Source
from latentact.data.latents import CODES, DTYPES, KINDS, TOKENS_KEY, VALID, write_token_files
from latentact.data.lerobot.columns import Column, add_columns
from latentact.data.lerobot.verify import require_upright, verify_dataset
from latentact.data.lerobot.writer import require_lerobot
from latentact.data.locate import local_dataset
from latentact.data.stream import FrameStream
from latentact.data.time_base import lam_frame_gap, require_gap
from latentact.device import require_device
from latentact.errors import UserError, require_one_of
from latentact.io.atomic import atomic_dir, read_object, write_json
from latentact.labeling.dataset import DatasetLatents, EncodeOptions, encode_dataset
from latentact.labeling.engines.ray import EngineConfig
from latentact.labeling.precision import PRECISIONS
from latentact.labeling.units import ProcessRank
from latentact.lams.contract import load_lam

log = logging.getLogger(__name__)

SIDECAR = "lam_tokens.json"
OUTPUTS = ("column", "file", "both")
ROLES = ("tokens", "action")


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(EngineConfig):
    """Write the LAM tokens of a dataset."""

    lam_model_path: str
    """Folder or hub id of the latent action model."""
    output_dir: str
    """Output folder."""
    dataset_repo_id: str = ""
    """Hub id of a LeRobot dataset; empty: `dataset_root` is the dataset."""
    dataset_root: str = ""
    """Folder of a LeRobot dataset or of videos; empty: LeRobot's download folder."""
    camera_key: str = ""
    """Camera; empty: the only one."""
    batch_size: BatchSize = 256
    """Transitions encoded together."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    tokens: Annotated[str, OneOf(KINDS)] = "continuous"
    """continuous: before the quantizer; vq: after it."""
    frame_gap_s: Seconds = 0.0
    """Seconds between the two frames of a transition; 0: the LAM's own."""
    output: Annotated[str, OneOf(OUTPUTS)] = "column"
    """column: a LeRobot v3 dataset; file: lam_tokens.safetensors and .pt; both: files inside the dataset."""
    role: Annotated[str, OneOf(ROLES)] = "tokens"
    """tokens: the columns observation.lam_*, alongside the robot's actions; action: the column `action`,
    replacing them, for pretraining any LeRobot policy. Rows without a latent action are then left out: each
    contiguous run of the others becomes an episode."""
    state_size: Annotated[int, Between(1, 1024)] = 1
    """With `--as action` and data without observation.state: size of the constant state that rows get,
    because LeRobot's policies require one; use the size of the robot's state, if known."""
    dtype: Annotated[str, OneOf(DTYPES)] = "float32"
    """float32 or float16."""
    precision: Annotated[str, OneOf(PRECISIONS)] = "fp32"
    """fp32, bf16 (faster, other last digits), int8 (fastest, coarsest), or auto: the fastest that the device
    supports natively and that preserves 99 % of the codes."""
    num_workers: Workers = 0
    """Decoding threads; 0: one per core."""
    drop_nonfinite: bool = False
    """Whether rows whose state or action is missing, NaN or infinite get no tokens; else an error."""
    no_strict: bool = False
    """Whether to skip truncated, altered and missing shards instead of raising an error."""
    overwrite: bool = False
    """Whether to recompute and replace existing output."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        super().__post_init__()
        for flag, value, choices in (
            ("--tokens", self.tokens, KINDS),
            ("--output", self.output, OUTPUTS),
            ("--as", self.role, ROLES),
            ("--dtype", self.dtype, DTYPES),
        ):
            require_one_of(flag, value, choices)
        if self.role == "action" and (self.output, self.dtype) != ("column", "float32"):
            raise UserError(
                f"--as action must have --output column and --dtype float32, got {self.output} and "
                f"{self.dtype}. Leave them out."
            )
        if not self.dataset_repo_id and not self.dataset_root:
            raise UserError(
                "--dataset-root must be a folder or --dataset-repo-id a hub id, got neither. Give "
                "--dataset-root FOLDER or --dataset-repo-id OWNER/NAME."
            )


def run(config: PrecomputeConfig) -> Path:
    """Write the tokens and return the folder."""
    out = Path(config.output_dir)
    process = ProcessRank.from_environment(launched=config.engine == "torchrun")
    options = EncodeOptions(
        batch_size=config.batch_size,
        device=process.device(config.device),
        precision=config.precision,
        workers=config.num_workers,
        overwrite=config.overwrite,
        process=process,
    )
    require_gap(config.frame_gap_s)
    device = config.loads_on(options.device, config.precision)
    require_device(device)
    model = load_lam(config.lam_model_path, device)
    if config.tokens == "vq" and model.spec.codebook_size is None:
        raise UserError(
            f"--tokens must be continuous for {config.lam_model_path}, which has no codebook, got vq."
        )
    path = local_dataset(config.dataset_repo_id, config.dataset_root)
    if out.resolve() == path.resolve() or path.resolve() in out.resolve().parents:
        raise UserError(f"--output-dir must be outside of the dataset {path}, got {out}.")
    spec = model.spec
    data = DataConfig(
        path=str(path),
        camera=config.camera_key,
        resolution=spec.resolution,
        resize=spec.resize,
        drop_nonfinite=config.drop_nonfinite,
        no_strict=config.no_strict,
    )
    stream = FrameStream(data)
    gap = lam_frame_gap(model.spec, stream.fps, path, config.frame_gap_s)
    requested = {"weights": spec.weights, "frames": stream.key, "gap": gap, "model": to_dict(model.config)}
    requested |= _requested(config)
    if process.rank == 0 and _finished(out, requested, config, type(model.config)):
        return out
    if config.output != "file":
        require_rows(stream, _remedy(config))
    encoded = encode_dataset(model, stream, gap, options, config.build(process, config.lam_model_path, data))
    if encoded is None:  # the first of several processes writes
        return out
    sidecar = {"asked": requested, **_provenance(config, stream, encoded)}
    clear_drafts(out)
    with atomic_dir(out) as folder:
        _write(folder, config, stream, encoded, sidecar)
    log.info(
        "%d of %d frames of %d episodes have tokens: %s",
        encoded.valid.sum(),
        len(encoded.valid),
        len(encoded.lengths),
        out,
    )
    return out


def _requested(config: PrecomputeConfig) -> dict[str, Any]:
    """Return the settings that affect the output, for comparison with those of an earlier run."""
    return {
        **{name: getattr(config, name) for name in ("tokens", "output", "dtype", "precision")},
        **({"drop_nonfinite": True} if config.drop_nonfinite else {}),
        **({"as": "action", "state_size": config.state_size} if config.role == "action" else {}),
    }


def _finished(out: Path, requested: dict[str, Any], config: PrecomputeConfig, lam: type) -> bool:
    """Return whether an earlier run has written the requested tokens.

    Raises:
        UserError: the folder holds other files.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    sidecar = next((file for file in (out / "meta" / SIDECAR, out / SIDECAR) if file.is_file()), None)
    if sidecar is None:
        raise UserError(
            f"{out} must be new or hold LAM tokens, got other files. Choose another --output-dir."
        )
    if config.overwrite:
        return False
    written = read_object(sidecar).get("asked")
    if not isinstance(written, dict) or {**written, "model": updated(lam, written.get("model"))} != requested:
        raise UserError(
            f"{out} must be new or hold these LAM tokens, got tokens with other settings. Choose another "
            "--output-dir, or add --overwrite."
        )
    log.info("%s is already finished", out)
    return True


def _remedy(config: PrecomputeConfig) -> str:
    """Return the advice for data that cannot become a LeRobot dataset."""
    return (
        "use --output file" if config.role == "tokens" else "use latentact shard, and train-vla on the shards"
    )


def require_rows(stream: FrameStream, remedy: str) -> None:
    """Check that columns can be added to the data."""
    require_lerobot()
    if stream.resampled:
        raise UserError(
            f"videos of {stream.path} must have one frame rate to be rows of a dataset, got a variable "
            f"rate; {remedy}."
        )
    source = stream.source
    if not source.lerobot_version and source.lerobot_parts() is None:
        raise UserError(
            f"{stream.path} must be a LeRobot dataset or a folder of videos to become a dataset with tokens; "
            f"{remedy}."
        )
    if source.missing_episodes and source.lerobot_version.startswith("v3"):
        raise UserError(
            f"{stream.path} must hold the files of all episodes for LeRobot v3, got "
            f"{source.missing_episodes} episodes without files. Copy them too, or {remedy}."
        )
    for problem in source.lerobot_problems():
        raise UserError(f"{stream.path}: {problem}; repair the dataset, or use --output file.")
    require_upright(source.video_files)
    if not source.lerobot_version.startswith("v3"):
        check_convertible(stream, remedy)


def _provenance(config: PrecomputeConfig, stream: FrameStream, encoded: DatasetLatents) -> dict[str, Any]:
    software: dict[str, str | None] = {}
    for name in ("latentact", "lerobot", "torch", "av"):
        try:
            software[name] = version(name)
        except PackageNotFoundError:
            software[name] = None
    return {
        "model": config.lam_model_path,
        "spec": asdict(encoded.spec),
        "dataset": config.dataset_repo_id or stream.path.resolve().name,
        "camera": stream.source.camera,
        "digest": encoded.key,
        "frame_gap_s": encoded.spec.frame_gap_s,
        "tokens": config.tokens,
        "dtype": config.dtype,
        "precision": encoded.precision,
        "unreadable": {**stream.source.unreadable, **encoded.unreadable},
        "software": software,
    }


def clear_drafts(out: Path) -> None:
    """Remove partial output of killed runs."""
    for draft in out.parent.glob(f".{out.name}.*.partial"):
        shutil.rmtree(draft, ignore_errors=True)


def _write(
    folder: Path,
    config: PrecomputeConfig,
    stream: FrameStream,
    encoded: DatasetLatents,
    sidecar: dict[str, Any],
) -> None:
    """Write the output into an empty folder."""
    if config.role == "action":
        converted = folder / ".converted"
        pieces = _pieces(config, encoded)
        convert_with_actions(stream, converted, pieces, remedy=_remedy(config), state_size=config.state_size)
        for part in converted.iterdir():
            part.rename(folder / part.name)
        converted.rmdir()
        verify_dataset(folder, _remedy(config))
        write_json(folder / "meta" / SIDECAR, sidecar)
        return
    if config.output == "file":
        rows = _table_rows(stream.source, encoded)
        write_json(folder / SIDECAR, sidecar)
    elif stream.source.lerobot_version.startswith("v3"):
        rows = _table_rows(stream.source, encoded)
        add_columns(stream.path, folder, _columns(config, encoded, rows.place))
    else:
        converted = folder / ".converted"
        rows = _episode_rows(encoded, convert(stream, converted, encoded.episodes.tolist()))
        add_columns(converted, folder, _columns(config, encoded, rows.place))
        shutil.rmtree(converted)
    if config.output != "file":
        verify_dataset(folder, _remedy(config))
        write_json(folder / "meta" / SIDECAR, sidecar)
    if config.output != "column":
        n = len(rows.place)
        columns = {k: column.read(0, n) for k, column in _columns(config, encoded, rows.place).items()}
        arrays = {
            "latent_actions": columns[TOKENS_KEY].reshape(n, *encoded.vectors.shape[1:]),
            "valid": columns[VALID].reshape(n).astype(bool),
            "episode_index": rows.episode_index,
            "frame_index": rows.frame_index,
            **({"codes": columns[CODES]} if CODES in columns else {}),
        }
        write_token_files(folder, arrays, sidecar)


def _pieces(config: PrecomputeConfig, encoded: DatasetLatents) -> list[Piece]:
    """Return the contiguous runs of rows with a latent action; LeRobot masks chunks beyond an episode."""
    tokens = getattr(encoded, KINDS[config.tokens])
    ends, pieces = encoded.lengths.cumsum(), []
    for number, begin, end in zip(encoded.episodes, ends - encoded.lengths, ends, strict=True):
        rows = begin + np.flatnonzero(encoded.valid[begin:end])
        frames = encoded.frame_indices[rows]
        for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(frames) != 1) + 1):
            if len(run):
                action = tokens[rows[run]].reshape(len(run), -1)
                pieces.append(
                    Piece(number=int(number), first=int(frames[run[0]]), columns={"action": action})
                )
    if not pieces:
        raise UserError(
            f"{config.dataset_root} must have a row with a latent action, got none; {_remedy(config)}."
        )
    return pieces


class _Rows(NamedTuple):
    """The rows of a dataset."""

    place: Int64[np.ndarray, " n"]
    """Index of the encoded frame of each row; -1: none."""
    episode_index: Int64[np.ndarray, " n"]
    frame_index: Int64[np.ndarray, " n"]


def _table_rows(source: Source, encoded: DatasetLatents) -> _Rows:
    """Return the rows of the data's tables; without tables, all frames."""
    if (rows := source.table_rows()) is None:
        return _episode_rows(encoded, encoded.episodes.tolist())
    place = np.full(len(rows[0]), -1)
    first = np.array(source.first_rows)[encoded.episodes]
    place[np.repeat(first, encoded.lengths) + encoded.frame_indices] = np.arange(len(encoded.frame_indices))
    return _Rows(place, *rows)


def _episode_rows(encoded: DatasetLatents, selected: Sequence[int]) -> _Rows:
    """Return the rows of these episodes of the data, renumbered from 0."""
    chosen = np.isin(encoded.episodes, selected)
    lengths = encoded.lengths[chosen]
    episode = np.repeat(np.arange(len(lengths)), lengths)
    frame = np.arange(len(episode)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return _Rows(np.flatnonzero(np.repeat(chosen, encoded.lengths)), episode, frame)


def _columns(config: PrecomputeConfig, encoded: DatasetLatents, place: np.ndarray) -> dict[str, Column]:
    """Return the columns of the rows."""

    def column(values: np.ndarray, dtype: str) -> Column:
        flat = values.reshape(len(values), -1)

        def read(begin: int, end: int) -> np.ndarray:
            index = place[begin:end]
            rows = np.zeros((end - begin, flat.shape[1]), dtype)
            rows[index >= 0] = flat[index[index >= 0]]
            return rows

        return Column(dtype=dtype, size=flat.shape[1], read=read)

    columns = {TOKENS_KEY: column(getattr(encoded, KINDS[config.tokens]), config.dtype)}
    if encoded.codes is not None:
        columns[CODES] = column(encoded.codes, "int64")
    # float32, not bool: LeRobot's normalizer subtracts means from every state-like column.
    return {**columns, VALID: column(encoded.valid, "float32")}
