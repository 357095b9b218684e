"""Write labeled steps for other programs: robomimic's HDF5, Diffusion Policy's zarr, LAPA's jsonl.

Each writer processes one episode at a time in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Shaped, UInt8
from PIL import Image

from latentact.errors import missing_extra

ROBOMIMIC, ZARR, JSONL = "demo.hdf5", "replay_buffer.zarr", "data.jsonl"
"""Names of the output files."""
BINS = 256
"""LAPA's number of bins per action dimension, of equal frequency."""


@dataclass(frozen=True, kw_only=True)
class LabeledEpisode:
    """Frames of one episode, and the action and annotations of each; the last frame has none."""

    name: str
    """Name of the episode in the data."""
    task: str
    """Task text; empty: none."""
    action: Shaped[np.ndarray, "n a"]
    """Robot actions, float32 ``[n, a]``, or classes int64 ``[n, 1]``."""
    frames: UInt8[np.ndarray, "n+1 h w c"]
    """0..255."""
    state: Float32[np.ndarray, "n+1 s"] | None
    """Robot state."""
    trusted: Bool[np.ndarray, " n"]
    """Whether the action may be learned from."""
    extra: Mapping[str, Shaped[np.ndarray, "n ..."]]
    """Further columns: uncertainty, low, high, set, codes."""


def write_robomimic(out: Path, episodes: Iterable[LabeledEpisode], about: Mapping[str, Any]) -> None:
    """Write `demo.hdf5` as robomimic 0.3 reads it: `data/demo_i/{obs, next_obs, actions, rewards, dones}`.

    `mask/trusted` lists the episodes all of whose actions are trusted; robomimic selects such a subset with
    `train.hdf5_filter_key`.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise missing_extra("h5py", "export") from error
    with h5py.File(out / ROBOMIMIC, "w") as file:
        data, total, trusted = file.create_group("data"), 0, []
        for number, episode in enumerate(episodes):
            group, n = data.create_group(f"demo_{number}"), len(episode.action)
            group.attrs["num_samples"] = n
            group.attrs["name"], group.attrs["task"] = episode.name, episode.task
            group["actions"] = episode.action.astype(np.float32)
            group["rewards"] = np.zeros(n, np.float32)
            group["dones"] = (np.arange(n) == n - 1).astype(np.int64)
            for name, rows in (("obs", slice(0, n)), ("next_obs", slice(1, n + 1))):
                observations = group.create_group(name)
                observations.create_dataset(
                    "image", data=episode.frames[rows], compression="gzip", compression_opts=1
                )
                if episode.state is not None:
                    observations["state"] = episode.state[rows]
            group["trusted"] = episode.trusted
            for name, values in episode.extra.items():
                group[name] = values
            if episode.trusted.all():
                trusted.append(f"demo_{number}")
            total += n
        data.attrs["total"] = total
        data.attrs["env_args"] = json.dumps({"env_name": str(about["dataset"]), "type": 2, "env_kwargs": {}})
        data.attrs["latentact"] = json.dumps(about)
        file["mask/trusted"] = np.array(trusted, "S")


def write_zarr(out: Path, episodes: Iterable[LabeledEpisode], about: Mapping[str, Any]) -> None:
    """Write `replay_buffer.zarr`, Diffusion Policy's: `data/{img, state, action}` and `meta/episode_ends`.

    The zarr format is 2, as required by Diffusion Policy's version of zarr.
    """
    try:
        import zarr
    except ModuleNotFoundError as error:
        raise missing_extra("zarr", "export") from error
    root: Any = zarr.open_group(str(out / ZARR), mode="w", zarr_format=2)
    root.attrs["latentact"] = json.loads(json.dumps(about))
    data, ends = root.create_group("data"), []
    for episode in episodes:
        n = len(episode.action)
        columns = {
            "img": episode.frames[:n],
            "action": episode.action.astype(np.float32),
            "trusted": episode.trusted,
            **({} if episode.state is None else {"state": episode.state[:n]}),
            **episode.extra,
        }
        for name, values in columns.items():
            if name not in data:
                steps = max(1, int(2e6 / max(1, values[0].nbytes)))
                data.create_array(
                    name,
                    shape=(0, *values.shape[1:]),
                    chunks=(min(steps, 4096), *values.shape[1:]),
                    dtype=values.dtype,
                )
            data[name].append(values)
        ends.append(n + (ends[-1] if ends else 0))
    meta = root.create_group("meta")
    meta.create_array("episode_ends", data=np.array(ends, np.int64), chunks=(len(ends),))


def write_lapa_jsonl(out: Path, episodes: Iterable[LabeledEpisode], about: Mapping[str, Any]) -> None:
    """Write `data.jsonl` with the fields of LAPA's fine-tuning, one step per line, and its images.

    `action` is the class, or the bin of each value among 256 bins of equal frequency, whose edges are in
    `bins.json`. LAPA's `vision`, the codes of its own image tokenizer, is left out.
    """
    rows = list(_lapa_rows(out, episodes))
    continuous = isinstance(rows[0]["raw_actions"][0], float)
    if continuous:
        actions = np.array([row["raw_actions"] for row in rows])
        edges = [np.unique(np.quantile(column, np.linspace(0, 1, BINS + 1))) for column in actions.T]
        for row, action in zip(rows, actions, strict=True):
            row["action"] = [
                int(np.clip(np.searchsorted(bins, x, side="right") - 1, 0, max(0, len(bins) - 2)))
                for bins, x in zip(edges, action, strict=True)
            ]
        (out / "bins.json").write_text(json.dumps([bins.tolist() for bins in edges]) + "\n")
    with (out / JSONL).open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _lapa_rows(out: Path, episodes: Iterable[LabeledEpisode]) -> Iterator[dict[str, Any]]:
    for number, episode in enumerate(episodes):
        folder = Path("images") / f"episode_{number:06d}"
        (out / folder).mkdir(parents=True)
        for step, action in enumerate(episode.action.tolist()):
            image = folder / f"{step:06d}.png"
            Image.fromarray(episode.frames[step]).save(out / image, compress_level=3)
            extra = {name: values[step].tolist() for name, values in episode.extra.items()}
            codes = extra.pop("codes", None)
            yield {
                "id": f"{number}/{step}",
                "image": image.as_posix(),
                "instruction": (
                    "<s> You are a helpful assistant. USER: What action should the robot take to "
                    f"`{episode.task}` ASSISTANT:"
                ),
                **({} if codes is None else {"delta": [str(code) for code in codes]}),
                "raw_actions": action,
                "action": action,
                "fields": "[instruction],[vision],action",
                "trusted": bool(episode.trusted[step]),
                **extra,
            }
