"""Encode streamed frames of episodes in batches of clips, and write the results as one file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from latentact.data.decode.pipeline import Chunk
from latentact.data.format import Unreadable
from latentact.data.latents import write_arrays
from latentact.device import keep_freed_memory
from latentact.lams.contract import LatentActionModel
from latentact.progress import Progress
from latentact.types import LatentActions

_CPU_BATCH = 32  # larger batches are not faster on a CPU and take more memory


@torch.inference_mode()
def encode_clip(
    model: LatentActionModel,
    frames: UInt8[torch.Tensor, "*b t c h w"],
    precision: str,
    valid: torch.Tensor | None = None,
    last: bool = False,
    states: torch.Tensor | None = None,
) -> LatentActions:
    """Encode clips in a precision; see `LatentActionModel.encode` for the arguments.

    int8 needs a model from `apply_precision`; its other layers compute in bf16.
    """
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=precision != "fp32"):
        return model.encode(frames, valid, last=last, states=states)


@contextmanager
def encoders(device: str) -> Generator[tuple[ThreadPoolExecutor, int]]:
    """Yield a pool of encoding threads, and the maximum number of queued batches.

    On a CPU each core encodes its own batch. If cores shared a batch, the last bits of the results would
    depend on the number of cores.
    """
    threads = torch.get_num_threads()
    keep_freed_memory()
    pool = ThreadPoolExecutor(threads if device == "cpu" else 1, thread_name_prefix="encode")
    torch.set_num_threads(1)
    try:
        with pool:
            yield pool, 2 + (threads if device == "cpu" else 1)
    finally:
        torch.set_num_threads(threads)


class EpisodeEncoder:
    """Encodes the frames of a unit of episodes; keeps only frames that later clips need.

    A clip has `transitions_per_window` transitions, each one gap after the previous.

    Index spaces: a position counts the frames of all episodes of the part, damaged ones included; `_base` is
    the position of the first kept frame, `_end` is one past the last, `_next` is that of the next transition
    to queue. A row of `_clips` is (position of the first transition, start and end of the known frames of its
    episode).
    """

    def __init__(
        self,
        model: LatentActionModel,
        gap: int,
        encoders: ThreadPoolExecutor,
        *,
        batch_size: int,
        device: str,
        precision: str,
        states: Callable[[int, Sequence[int]], np.ndarray] | None = None,
        transitions: Callable[[int, Sequence[float], Sequence[int], int], np.ndarray] | None = None,
    ) -> None:
        self._model, self._gap, self._encoders = model, gap, encoders
        self._device, self._precision, self._states = device, precision, states
        self._transitions = transitions
        self._per_window = model.transitions_per_window
        self._context = model.context if self._per_window == 1 else 0
        most = min(batch_size, _CPU_BATCH if device == "cpu" else sys.maxsize)
        self._batch_size = max(1, most // self._per_window)
        self._offsets = np.arange(-self._context, self._per_window + 1) * gap
        self._held: list[UInt8[np.ndarray, "m h w c"]] = []
        self._held_states: list[Float32[np.ndarray, "m s"]] = []
        self._base = self._end = self._next = 0
        self._clips: np.ndarray = np.zeros((0, 3), np.int64)
        self._episodes: dict[int, tuple[int, list[int], np.ndarray]] = {}
        self._unreadable: dict[str, str] = {}
        self._encoded: list[Future[dict[str, np.ndarray]]] = []

    def episode(self, number: int, chunks: Iterator[Chunk], progress: Progress) -> Iterator[Future[Any]]:
        """Add an episode; yields the futures of its batches."""
        start, frame_indices, times = self._end, [], []
        self._next = start
        try:
            for chunk in chunks:
                self._end += len(chunk.frames)
                self._held.append(chunk.frames)
                states = np.zeros((len(chunk.frames), 0))
                states = self._states(number, chunk.frame_indices) if self._states else states
                self._held_states.append(states.astype(np.float32))
                frame_indices += chunk.frame_indices
                times += chunk.times
                self._queue(start, self._per_window)
                while len(self._clips) >= self._batch_size:
                    yield self._batch(start)
                progress.advance(len(chunk.frames))
            self._queue(start, 1)
            valid = np.ones(len(frame_indices), bool)
            if self._transitions:
                valid = self._transitions(number, times, frame_indices, self._gap)
            self._episodes[number] = start, frame_indices, valid
        except Unreadable as error:
            self._unreadable[str(number)] = str(error)
            self._clips = self._clips[self._clips[:, 0] < start]

    def end(self, writer: ThreadPoolExecutor, path: Path) -> Iterator[Future[Any]]:
        """Encode the remaining clips and write the part; yields the futures."""
        self._next = self._end
        while len(self._clips):
            yield self._batch(self._end)
        yield writer.submit(self._save, path)

    def _queue(self, start: int, transitions: int) -> None:
        """Queue the clips that have this many transitions within the known frames."""
        until = max(self._next, self._end - transitions * self._gap)
        positions = np.arange(self._next, until)
        first = positions[(positions - start) // self._gap % self._per_window == 0]
        known = np.broadcast_to([[start, self._end]], (len(first), 2))
        self._clips = np.concatenate([self._clips, np.column_stack([first, known])])
        self._next = until

    def _batch(self, start: int) -> Future[Any]:
        """Encode the oldest clips, and drop the frames that no later clip needs."""
        clips, self._clips = self._clips[: self._batch_size], self._clips[self._batch_size :]
        frames, states = (
            held[0] if len(held) == 1 else np.concatenate(held) for held in (self._held, self._held_states)
        )
        positions = clips[:, :1] + self._offsets  # [b, t], some outside the known frames
        inside = np.clip(positions, clips[:, 1:2], clips[:, 2:] - 1)
        low, high = int(inside.min()), int(inside.max()) + 1
        future = self._encoders.submit(
            self._encode,
            positions,
            frames[low - self._base : high - self._base],
            states[low - self._base : high - self._base],
            inside - low,
            positions == inside,
        )
        self._encoded.append(future)
        needed = max(start, self._next + self._offsets[0])
        if len(self._clips):
            needed = min(needed, max(self._clips[0, 1], self._clips[0, 0] + self._offsets[0]))
        self._held, self._held_states = [frames[needed - self._base :]], [states[needed - self._base :]]
        self._base = needed
        return future

    def _encode(
        self,
        positions: np.ndarray,
        frames: np.ndarray,
        states: np.ndarray,
        index: np.ndarray,
        valid: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Encode clips; `index` [b, t] are rows of `frames` and `states`, `positions` those of the part."""
        device_frames = torch.from_numpy(frames).to(self._device)
        device = device_frames.device
        latent = encode_clip(
            self._model,
            device_frames[torch.from_numpy(index).to(device)].permute(0, 1, 4, 2, 3),
            self._precision,
            torch.from_numpy(valid).to(device),
            last=self._per_window == 1,
            states=torch.from_numpy(states[index]).to(device) if self._states else None,
        )
        kept = valid[:, 1 + self._context :]
        values = {"vectors": latent.vectors, "continuous": latent.continuous, "codes": latent.codes}
        arrays = {name: v.numpy(force=True)[kept] for name, v in values.items() if v is not None}
        return {"positions": positions[:, self._context : -1][kept], **arrays}

    def _save(self, path: Path) -> None:
        episodes = self._episodes.values()
        kept = [np.arange(start, start + len(indices)) for start, indices, _ in episodes]
        positions = np.concatenate([np.zeros(0, np.int64), *kept])
        valid = np.concatenate([np.zeros(0, bool), *(valid for *_, valid in episodes)])
        arrays: dict[str, Any] = {
            "episodes": np.array([*self._episodes], np.int64),
            "lengths": np.array([len(each) for each in kept], np.int64),
            "frame_indices": np.array([i for _, indices, _ in episodes for i in indices], np.int64),
            "valid": np.zeros(len(positions), bool),
        }
        for future in self._encoded:
            batch = future.result()
            inside = np.isin(batch["positions"], positions[valid])
            rows = np.searchsorted(positions, batch.pop("positions")[inside])  # rows of the part's arrays
            arrays["valid"][rows] = True
            for name, values in batch.items():
                if name not in arrays:
                    arrays[name] = np.zeros((len(positions), *values.shape[1:]), values.dtype)
                arrays[name][rows] = values[inside]
        write_arrays(path, arrays, self._unreadable)
