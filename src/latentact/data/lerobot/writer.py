"""Write a LeRobot v3 dataset: stage episodes in any order and process, then assemble them.

Staging compresses frames and counts pixel values, runs in parallel and survives interruptions; assembling
copies bytes. Schema and metadata files are those of lerobot. Its recorder is not used because it writes every
frame to a separate file and all statistics after every episode (33 ms for seven small frames). Statistics
have the format of lerobot; the quantiles of an episode are exact instead of estimated from histograms.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Shaped, UInt8

from latentact.data.lerobot.verify import verify_dataset
from latentact.errors import missing_extra
from latentact.io.arrays import load_npz
from latentact.types import ActionSpace

SMALLEST_VIDEO = 96
"""Height and width in pixels below which frames are stored losslessly as PNG."""
GOP, CRF, PRESET = 2, 30, 12
"""Video settings of lerobot: AV1, a key frame every other frame for fast random access."""
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
STATISTICS = ("min", "max", "mean", "std", "q01", "q10", "q50", "q90", "q99")
EPISODES_FILE = {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}


@dataclass(frozen=True, kw_only=True)
class RecordSpec:
    """Contents of the rows of a dataset."""

    fps: int
    """Rows per second."""
    camera: str
    """Key of the frames, `observation.images.<camera>`."""
    height: int
    """Frame height in pixels."""
    width: int
    """Frame width in pixels."""
    action_space: ActionSpace
    """Space of the actions."""
    action_names: tuple[str, ...]
    """Names of the action classes or dimensions."""
    state_names: tuple[str, ...]
    """Names of the state dimensions; empty: no state."""
    robot_type: str
    """Robot or environment of the recording."""
    nuisance_names: tuple[str, ...] = ()
    """Names of the dimensions of the distractor state; empty: no distractors."""
    takeover: bool = False
    """Whether another action than `action` may have been executed: columns `executed_action`, `intervention`
    (LeRobot's name) and `labeled`."""

    @classmethod
    def of_env(cls, env: Any, height: int, width: int, **more: Any) -> RecordSpec:
        """Return the content of recordings of an environment.

        Args:
            env: its `EnvSpec`.
            height: frame height in pixels.
            width: frame width in pixels.
            more: other fields.
        """
        names = ("fps", "camera", "action_space", "action_names", "state_names")
        return cls(
            **{name: getattr(env, name) for name in names},
            robot_type=env.name,
            height=height,
            width=width,
            **more,
        )

    @property
    def lossless(self) -> bool:
        """Whether frames are stored as PNG in the table: small frames, or an odd height or width."""
        return min(self.height, self.width) < SMALLEST_VIDEO or self.height % 2 == 1 or self.width % 2 == 1

    def features(self) -> dict[str, dict[str, Any]]:
        """Return name -> feature, as in `meta/info.json`."""
        frame = {
            "dtype": "image" if self.lossless else "video",
            "shape": (self.height, self.width, 3),
            "names": ["height", "width", "channels"],
        }
        state = {"dtype": "float32", "shape": (len(self.state_names),), "names": list(self.state_names)}
        flag = {"dtype": "bool", "shape": (1,), "names": None}
        names = list(self.nuisance_names)
        nuisance = {"dtype": "float32", "shape": (len(names),), "names": names}
        if self.action_space.discrete:
            action = {"dtype": "int64", "shape": (1,), "names": {"classes": list(self.action_names)}}
        else:
            action = {
                "dtype": "float32",
                "shape": (self.action_space.size,),
                "names": list(self.action_names),
            }
        return {
            self.camera: frame,
            **({"observation.state": state} if self.state_names else {}),
            **({"observation.nuisance": nuisance} if self.nuisance_names else {}),
            "action": action,
            **({"executed_action": action, "intervention": flag, "labeled": flag} if self.takeover else {}),
            "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
            "next.success": flag,
        }


@dataclass(frozen=True, kw_only=True)
class EpisodeBuffer:
    """One episode of n rows; the last row has the final observation and an action that is not executed."""

    frames: UInt8[np.ndarray, "n h w 3"]
    """RGB, 0..255."""
    state: Float32[np.ndarray, "n s"] | None
    """Robot state; None if the robot has none."""
    action: Shaped[np.ndarray, " n *a"]
    """int64 class `[n]` or float32 `[n, a]`."""
    reward: Float32[np.ndarray, " n"]
    """Reward of the action of each row."""
    success: Bool[np.ndarray, " n"]
    """Whether the task is solved after the action of each row."""
    task: str
    """Task description."""
    nuisance: Float32[np.ndarray, "n q"] | None = None
    """State of the distractors; None without distractors."""
    executed_action: Shaped[np.ndarray, " n *a"] | None = None
    """What was executed, where that may differ from `action`; None otherwise, as for the next two."""
    intervention: Bool[np.ndarray, " n"] | None = None
    """Whether the expert's action was executed."""
    labeled: Bool[np.ndarray, " n"] | None = None
    """Whether `action` is a label to learn from."""


def stage_episode(path: Path, spec: RecordSpec, episode: EpisodeBuffer) -> None:
    """Write one episode atomically to `path` (`.npz`, and `.mp4` with the same stem for video)."""
    pixel_counts = [
        np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(episode.frames, -1, 0)
    ]
    columns: dict[str, Any] = {
        "action": episode.action,
        "next.reward": episode.reward,
        "next.success": episode.success,
        "pixel_counts": np.stack(pixel_counts),
        "task": np.array(episode.task),
    }
    if episode.state is not None:
        columns["observation.state"] = episode.state
    if episode.nuisance is not None:
        columns["observation.nuisance"] = episode.nuisance
    for name in ("executed_action", "intervention", "labeled"):
        if (values := getattr(episode, name)) is not None:
            columns[name] = values
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    if spec.lossless:
        images = [_png(frame) for frame in episode.frames]
        columns["png"] = np.frombuffer(b"".join(images), np.uint8)
        columns["png_sizes"] = np.array([len(image) for image in images])
    else:
        _encode_video(draft, episode.frames, spec.fps)
        draft.replace(path.with_suffix(".mp4"))
    with draft.open("wb") as file:
        np.savez(file, **columns)
    draft.replace(path)


def require_lerobot() -> None:
    """Raise a UserError that names the extra if lerobot is not installed; imports nothing."""
    if importlib.util.find_spec("lerobot") is None:
        raise missing_extra("lerobot", "lerobot")


def write_dataset(
    root: Path, spec: RecordSpec, staged: Sequence[Path], *, sidecars: Mapping[str, dict[str, Any]]
) -> int:
    """Assemble staged episodes in the given order, atomically, and return the number of rows.

    The output is deterministic: the same episodes give the same bytes.

    Args:
        root: folder to create.
        spec: contents of the rows.
        staged: files written by `stage_episode`.
        sidecars: file name -> content of JSON files for `meta/` that record the provenance of the data.
    """
    draft = root.with_name(f".{root.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    rows = _write(draft, spec, staged)
    for name, content in sidecars.items():
        (draft / "meta" / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    verify_dataset(draft, "collect it again")
    draft.rename(root)
    return rows


def _write(root: Path, spec: RecordSpec, staged: Sequence[Path]) -> int:
    require_lerobot()
    from datasets import Dataset
    from lerobot.datasets import io_utils
    from lerobot.datasets.compute_stats import aggregate_stats
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.utils.utils import SuppressProgressBars, flatten_dict

    meta: Any = LeRobotDatasetMetadata.create(
        "local/dataset", spec.fps, spec.features(), spec.robot_type, root, use_videos=not spec.lossless
    )
    video_locations = [{}] * len(staged) if spec.lossless else _join_videos(meta, spec, staged)
    rows, statistics, first_row = [], [], 0
    with Table(meta) as table:
        for number, path in enumerate(staged):
            episode = load_npz(path, "delete it and re-run the command")
            task, n = str(episode.pop("task")), len(episode["action"])
            meta.save_episode_tasks([task])
            columns = _columns(meta, number, first_row, meta.get_task_index(task), episode)
            stats = {
                **number_statistics(columns),
                spec.camera: pixel_statistics(episode["pixel_counts"], n),
            }
            if spec.lossless:
                columns[spec.camera] = _embedded(episode)
            rows.append(
                {
                    "episode_index": number,
                    "tasks": [task],
                    "length": n,
                    **table.append(columns),
                    "dataset_from_index": first_row,
                    "dataset_to_index": first_row + n,
                    **video_locations[number],
                    **flatten_dict({"stats": stats}),
                    **EPISODES_FILE,
                }
            )
            statistics.append(stats)
            first_row += n
    info = meta.info
    info.total_episodes = len(staged)
    info.total_frames = first_row
    info.total_tasks = len(meta.tasks)
    info.splits = {"train": f"0:{len(staged)}"}
    io_utils.write_info(info, root)
    io_utils.write_stats(dict(sorted(aggregate_stats(statistics).items())), root)
    with SuppressProgressBars():
        io_utils.write_episodes(Dataset.from_list(rows), root)
    return first_row


class Table:
    """Writer of the parquet files: at most `data_files_size_in_mb` each, one row group per episode."""

    def __init__(self, meta: Any) -> None:
        from lerobot.datasets.feature_utils import get_hf_features_from_features

        self._meta = meta
        self._schema: Any = get_hf_features_from_features(meta.features).arrow_schema
        self._writer: Any = None
        self._file, self._bytes = -1, 0

    def __enter__(self) -> Table:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the last file."""
        if self._writer is not None:
            self._writer.close()

    def append(self, columns: dict[str, Any]) -> dict[str, int]:
        """Write one episode; return its `data/` columns in `meta/episodes`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        arrays = [_arrow(columns[field.name], field.type) for field in self._schema]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        full = self._bytes + table.nbytes > self._meta.data_files_size_in_mb * 2**20
        if self._writer is None or full:
            self.__exit__()
            self._file, self._bytes = self._file + 1, 0
            path = self._meta.root / self._meta.data_path.format(**self._location())
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(path, self._schema, compression="snappy", use_dictionary=True)
        self._writer.write_table(table)
        self._bytes += table.nbytes
        return {f"data/{key}": value for key, value in self._location().items()}

    def _location(self) -> dict[str, int]:
        chunk, file = divmod(self._file, self._meta.chunks_size)
        return {"chunk_index": chunk, "file_index": file}


def _arrow(values: Any, kind: Any) -> Any:
    """Convert a column to Arrow; columns of matrices use an extension type of `datasets`."""
    import pyarrow as pa

    if pa.types.is_primitive(kind):  # lerobot stores one number per row as a scalar
        values = np.asarray([*values]).reshape(len(values), -1)[:, 0]
    if not isinstance(kind, pa.ExtensionType):
        return pa.array(list(values), type=kind)
    storage = pa.array([value.tolist() for value in values], type=kind.storage_type)
    return pa.ExtensionArray.from_storage(kind, storage)


def _columns(
    meta: Any, number: int, first_row: int, task: int, episode: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Return the numeric columns of an episode, including the index columns of lerobot."""
    frame_index = np.arange(len(episode["action"]))
    return {
        **{key: episode[key] for key in meta.features if key in episode},
        "timestamp": (frame_index / meta.fps).astype(np.float32),
        "frame_index": frame_index,
        "episode_index": np.full_like(frame_index, number),
        "index": first_row + frame_index,
        "task_index": np.full_like(frame_index, task),
    }


def number_statistics(columns: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return the statistics of equally long columns in lerobot's format: column -> statistic -> values."""
    n = len(next(iter(columns.values())))
    table = np.column_stack([column.reshape(n, -1) for column in columns.values()]).astype(np.float64)
    if np.isnan(table).any():  # ignore missing values; zeros for a column without values
        table = np.where(np.isnan(table).all(0), 0.0, table)
        values = [np.nanmin(table, 0), np.nanmax(table, 0), np.nanmean(table, 0), np.nanstd(table, 0)]
        values += list(np.nanquantile(table, QUANTILES, axis=0))
    else:
        values = [table.min(0), table.max(0), table.mean(0), table.std(0)]
        values += list(np.quantile(table, QUANTILES, axis=0))
    ends = np.cumsum([column.reshape(n, -1).shape[1] for column in columns.values()])
    split = zip(*(np.split(value, ends[:-1]) for value in values), strict=True)
    return {
        key: {**dict(zip(STATISTICS, part, strict=True)), "count": np.array([n])}
        for key, part in zip(columns, split, strict=True)
    }


def pixel_statistics(counts: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """Return the statistics `[3, 1, 1]` of n frames in the format of lerobot, with pixel values in 0..1.

    Args:
        counts: histogram `[3, 256]` of the pixel values of each channel.
        n: number of frames.
    """
    level = np.arange(256) / 255
    probability = counts / counts.sum(1, keepdims=True)
    mean = probability @ level
    values = [
        level[(counts > 0).argmax(1)],
        level[255 - (counts[:, ::-1] > 0).argmax(1)],
        mean,
        np.sqrt((probability * (level - mean[:, None]) ** 2).sum(1)),
        *(level[(probability.cumsum(1) >= q - 1e-9).argmax(1)] for q in QUANTILES),
    ]
    return {**{k: v[:, None, None] for k, v in zip(STATISTICS, values, strict=True)}, "count": np.array([n])}


def _embedded(episode: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Yield the PNG images of a staged episode as cells of an image column."""
    ends = episode["png_sizes"].cumsum()
    data = episode["png"].tobytes()
    for i, (end, size) in enumerate(zip(ends, episode["png_sizes"], strict=True)):
        yield {"bytes": data[end - size : end], "path": f"frame-{i:06d}.png"}


def _join_videos(meta: Any, spec: RecordSpec, staged: Sequence[Path]) -> list[dict[str, Any]]:
    """Concatenate the videos of the episodes into files of at most `video_files_size_in_mb`.

    Returns:
        The `videos/` columns of each episode in `meta/episodes`.
    """
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.video_utils import concatenate_video_files, get_video_duration_in_s

    groups: list[list[Path]] = [[]]
    size, start, locations = 0, 0.0, []
    for path in (p.with_suffix(".mp4") for p in staged):
        size += path.stat().st_size
        if groups[-1] and size > meta.video_files_size_in_mb * 2**20:
            groups.append([])
            size, start = path.stat().st_size, 0.0
        groups[-1].append(path)
        end = start + get_video_duration_in_s(path)
        chunk, file = divmod(len(groups) - 1, meta.chunks_size)
        locations.append(
            {
                f"videos/{spec.camera}/chunk_index": chunk,
                f"videos/{spec.camera}/file_index": file,
                f"videos/{spec.camera}/from_timestamp": start,
                f"videos/{spec.camera}/to_timestamp": end,
            }
        )
        start = end
    for i, group in enumerate(groups):
        chunk, file = divmod(i, meta.chunks_size)
        path = meta.root / meta.video_path.format(video_key=spec.camera, chunk_index=chunk, file_index=file)
        concatenate_video_files([*group], path)
        path.chmod(0o644)
    meta.update_video_info(spec.camera, RGBEncoderConfig(g=GOP, crf=CRF, preset=PRESET))
    return locations


def _encode_video(path: Path, frames: np.ndarray, fps: int) -> None:
    import av

    os.environ.setdefault("SVT_LOG", "1")  # errors only; the default is a page of log lines per video
    options = {"g": str(GOP), "crf": str(CRF), "preset": str(PRESET), "svtav1-params": "lp=1"}
    with _scheduling_kept(), av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream("libsvtav1", fps, options=options)
        stream.pix_fmt = "yuv420p"
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@contextmanager
def _scheduling_kept() -> Generator[None]:
    """Restore this thread's scheduling policy: for root, the AV1 encoder changes it to a real-time policy."""
    if not hasattr(os, "sched_setscheduler"):  # not Linux
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def _png(frame: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "png", compress_level=3)
    return buffer.getvalue()
