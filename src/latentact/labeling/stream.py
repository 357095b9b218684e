"""LAM tokens of a streamed dataset, computed at the first use of an item and cached for later ones.

A stream cannot be encoded beforehand, and its items come in any order. Each item therefore holds the frames,
and for some LAMs the robot states, that the LAM needs; LeRobot's `delta_timestamps` provide them::

    deltas = camera_deltas(model, gap_s=0.5)
    items = StreamingLeRobotDataset("owner/name", delta_timestamps={"observation.images.top": deltas})
    for item in TokenStream(items, model, camera="observation.images.top", gap_s=0.5, name="owner/name"):
        item["observation.lam_tokens"]
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from latentact.data.cache import cache_folder
from latentact.data.decode.resize import resize
from latentact.data.digest import blake2b
from latentact.data.latents import CODES, KINDS, TOKENS_KEY, VALID
from latentact.data.lerobot.streaming import with_right_frames
from latentact.errors import UserError
from latentact.io.atomic import write_json
from latentact.lams.contract import LatentActionModel

STATE = "observation.state"


def camera_deltas(model: LatentActionModel, gap_s: float, observed: Sequence[float] = (0.0,)) -> list[float]:
    """Return the `delta_timestamps`, in seconds, of a stream's camera.

    A LAM that uses states needs them for `observation.state`, too.

    Args:
        model: the LAM.
        gap_s: seconds between the two frames of a transition; a multiple of the data's frame duration.
        observed: timestamps of the policy's observations, relative to the item's.
    """
    return sorted({round(t, 9) for t in (*observed, *_window(model, gap_s))})


def _window(model: LatentActionModel, gap_s: float) -> list[float]:
    return [round(step * gap_s, 9) for step in range(-model.context, 2)]


class TokenStream(IterableDataset):
    """Items of a dataset, each with its LAM tokens.

    An item gets `observation.lam_tokens`, `observation.lam_codes` where the LAM has codes, and
    `observation.lam_valid`, as `latentact precompute` writes them; frames, and states of a LAM that uses
    them, are reduced to those of `observed`.

    Args:
        items: `StreamingLeRobotDataset`, which yields the frames of `LeRobotDataset`, or any iterable of such
            items: `episode_index`, `frame_index`, the camera's frames at `camera_deltas(...)`
            ([t, c, h, w], uint8 or float 0..1), `<camera>_is_pad`, and for a LAM that uses states
            `observation.state` [t, s] at the same times.
        model: the LAM, in evaluation mode.
        camera: key of the frames.
        gap_s: seconds between the two frames of a transition.
        name: identifies the data in the cache, such as its hub id and revision.
        kind: continuous (before the quantizer) or vq (after it).
        observed: timestamps of the policy's observations, relative to the item's.
        batch_size: items that are encoded together.
        cache_dir: folder of the cache; empty: $LATENTACT_CACHE, or ~/.cache/latentact.
    """

    def __init__(
        self,
        items: Iterable[dict[str, Any]],
        model: LatentActionModel,
        *,
        camera: str,
        gap_s: float,
        name: str,
        kind: str = "continuous",
        observed: Sequence[float] = (0.0,),
        batch_size: int = 32,
        cache_dir: str = "",
    ) -> None:
        super().__init__()
        self.items, self.model, self.camera = items, model, camera
        self.kind, self.batch_size = kind, batch_size
        deltas = camera_deltas(model, gap_s, observed)
        self._window = [deltas.index(t) for t in _window(model, gap_s)]
        self._observed = [deltas.index(round(t, 9)) for t in observed]
        self._frames = len(deltas)
        size = (model.spec.resolution, model.spec.resize)
        facts = ["stream", name, camera, gap_s, model.spec.weights, *size]
        self.folder: Path = cache_folder(cache_dir) / "tokens" / blake2b(json.dumps(facts).encode())
        """Folder of the cached tokens."""
        self.spec = replace(model.spec, frame_gap_s=gap_s)
        """Meaning of the tokens."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the items in order."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "meta.json", {"spec": asdict(self.spec), "camera": self.camera, "rows": 0})
        with sqlite3.connect(self.folder / "tokens.sqlite", timeout=60) as cache:
            cache.execute(
                "CREATE TABLE IF NOT EXISTS tokens (episode INTEGER, frame INTEGER, continuous BLOB, "
                "vectors BLOB, codes BLOB, PRIMARY KEY (episode, frame))"
            )
            pending: list[dict[str, Any]] = []
            for item in with_right_frames(self.items):
                pending.append(item)
                if len(pending) == self.batch_size:
                    yield from self._with_tokens(pending, cache)
                    pending = []
            if pending:
                yield from self._with_tokens(pending, cache)

    def _with_tokens(
        self, items: list[dict[str, Any]], cache: sqlite3.Connection
    ) -> Iterator[dict[str, Any]]:
        keys = [(int(item["episode_index"]), int(item["frame_index"])) for item in items]
        found = dict(zip(keys, (self._look_up(key, cache) for key in keys), strict=True))
        valid = [self._has_next(item) for item in items]
        missing = {key: n for n, key in enumerate(keys) if found[key] is None and valid[n]}
        if missing:
            values = self._encode([items[n] for n in missing.values()])
            rows = [
                (*key, *(None if v is None else v[n].tobytes() for v in values))
                for n, key in enumerate(missing)
            ]
            cache.executemany("INSERT OR IGNORE INTO tokens VALUES (?, ?, ?, ?, ?)", rows)
            cache.commit()
            found |= {key: self._look_up(key, cache) for key in missing}
        for key, item, has_tokens in zip(keys, items, valid, strict=True):
            yield self._finished(item, found[key] if has_tokens else None)

    def _look_up(self, key: tuple[int, int], cache: sqlite3.Connection) -> tuple[bytes, bytes | None] | None:
        column = KINDS[self.kind]
        return cache.execute(
            f"SELECT {column}, codes FROM tokens WHERE episode = ? AND frame = ?", key
        ).fetchone()

    def _has_next(self, item: dict[str, Any]) -> bool:
        frames = item.get(self.camera)
        if frames is None or frames.ndim != 4 or len(frames) != self._frames:
            got = "none" if frames is None else str(list(frames.shape))
            raise UserError(
                f"{self.camera} of an item must have {self._frames} frames, got {got}. Give the dataset the "
                f"delta_timestamps that camera_deltas(...) returns."
            )
        states, size = item.get(STATE), self.model.state_size
        if size and (states is None or states.shape != (self._frames, size)):
            got = "none" if states is None else str(list(states.shape))
            raise UserError(
                f"{STATE} of an item must be [{self._frames}, {size}] for the LAM {self.spec.model}, got "
                f"{got}. Give the dataset the delta_timestamps that camera_deltas(...) returns for it, too."
            )
        pad = item.get(f"{self.camera}_is_pad")
        return pad is None or not bool(pad[self._window[-1]])

    def _encode(self, items: list[dict[str, Any]]) -> list[np.ndarray | None]:
        windows, valid, states = [], [], None
        for item in items:
            pad = item.get(f"{self.camera}_is_pad")
            windows.append(self._pixels(item[self.camera][self._window]))
            valid.append(
                torch.ones(len(self._window), dtype=torch.bool) if pad is None else ~pad[self._window]
            )
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            frames = torch.from_numpy(np.stack(windows)).permute(0, 1, 4, 2, 3).to(device)
            if self.model.state_size:
                states = torch.stack([item[STATE][self._window] for item in items]).float().to(device)
            latent = self.model.encode(frames, torch.stack(valid).to(device), last=True, states=states)
        found = (latent.continuous, latent.vectors, latent.codes)
        return [None if v is None else v[:, -1].numpy(force=True) for v in found]

    def _pixels(self, frames: Tensor) -> np.ndarray:
        """Return frames as `precompute` decodes them, `[t, h, w, c]` at the LAM's resolution."""
        if frames.dtype != torch.uint8:
            frames = (frames * 255).round().clamp(0, 255).to(torch.uint8)
        spec = self.model.spec
        return resize(frames.permute(0, 2, 3, 1).contiguous().numpy(), spec.resolution, spec.resize)

    def _finished(self, item: dict[str, Any], found: tuple[bytes, bytes | None] | None) -> dict[str, Any]:
        spec = self.spec
        tokens, codes = np.zeros(spec.tokens * spec.token_dim, np.float32), np.zeros(spec.tokens, np.int64)
        if found is not None:
            tokens = np.frombuffer(found[0], np.float32).copy()
            codes = codes if found[1] is None else np.frombuffer(found[1], np.int64).copy()
        done = dict(item)
        for key in (self.camera, *((STATE,) if self.model.state_size else ())):
            values = item[key][self._observed]
            done[key] = values if len(self._observed) > 1 else values[0]
            if f"{key}_is_pad" in item:
                done[f"{key}_is_pad"] = item[f"{key}_is_pad"][self._observed]
        done[TOKENS_KEY] = torch.from_numpy(tokens)
        if spec.codebook_size is not None:
            done[CODES] = torch.from_numpy(codes)
        return {**done, VALID: torch.tensor(found is not None)}
