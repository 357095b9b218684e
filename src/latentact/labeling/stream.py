"""LAM tokens of a streamed dataset: computed when an item comes along, and kept for when it comes again.

A stream has no rows that could be encoded beforehand, and its items come in any order. Each therefore carries
the frames that the LAM looks at, which lerobot's `delta_timestamps` provide::

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
from latentact.errors import UserError
from latentact.io.atomic import write_json
from latentact.lams.contract import LatentActionModel


def camera_deltas(model: LatentActionModel, gap_s: float, observed: Sequence[float] = (0.0,)) -> list[float]:
    """Return the moments, in seconds from an item's own, of which a stream needs the frames.

    Args:
        model: the LAM.
        gap_s: seconds between the two frames of a transition; a multiple of the data's.
        observed: moments that the policy looks at.
    """
    return sorted({round(t, 9) for t in (*observed, *_window(model, gap_s))})


def _window(model: LatentActionModel, gap_s: float) -> list[float]:
    return [round(place * gap_s, 9) for place in range(-model.context, 2)]


class TokenStream(IterableDataset):
    """The items of a dataset, each with its LAM tokens.

    An item gets `observation.lam_tokens`, `observation.lam_codes` where the LAM has codes, and
    `observation.lam_valid`, as `latentact precompute` would write them; of the camera's frames those of
    `observed` are left.

    Args:
        items: `StreamingLeRobotDataset`, or anything that yields its items: `episode_index`, `frame_index`,
            the camera's frames at `camera_deltas(...)` ([t, c, h, w], uint8 or float 0..1) and
            `<camera>_is_pad`.
        model: the LAM, in evaluation mode.
        camera: key of the frames.
        gap_s: seconds between the two frames of a transition.
        name: says which data this is, such as its hub id and revision; tokens are kept under it.
        kind: continuous (before the quantizer) or vq (after it).
        observed: moments that the policy looks at.
        batch_size: items that are waited for and encoded together.
        cache_dir: where tokens are kept; empty: $LATENTACT_CACHE, or ~/.cache/latentact.
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
        """Where tokens are kept."""
        self.spec = replace(model.spec, frame_gap_s=gap_s)
        """What the tokens mean."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the items in their order."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "meta.json", {"spec": asdict(self.spec), "camera": self.camera, "rows": 0})
        with sqlite3.connect(self.folder / "tokens.sqlite", timeout=60) as kept:
            kept.execute(
                "CREATE TABLE IF NOT EXISTS tokens (episode INTEGER, frame INTEGER, continuous BLOB, "
                "vectors BLOB, codes BLOB, PRIMARY KEY (episode, frame))"
            )
            waiting: list[dict[str, Any]] = []
            for item in self.items:
                waiting.append(item)
                if len(waiting) == self.batch_size:
                    yield from self._with_tokens(waiting, kept)
                    waiting = []
            if waiting:
                yield from self._with_tokens(waiting, kept)

    def _with_tokens(self, items: list[dict[str, Any]], kept: sqlite3.Connection) -> Iterator[dict[str, Any]]:
        keys = [(int(item["episode_index"]), int(item["frame_index"])) for item in items]
        found = dict(zip(keys, (self._look_up(key, kept) for key in keys), strict=True))
        there = [self._has_next(item) for item in items]
        missing = {key: n for n, key in enumerate(keys) if found[key] is None and there[n]}
        if missing:
            values = self._encode([items[n] for n in missing.values()])
            rows = [
                (*key, *(None if v is None else v[n].tobytes() for v in values))
                for n, key in enumerate(missing)
            ]
            kept.executemany("INSERT OR IGNORE INTO tokens VALUES (?, ?, ?, ?, ?)", rows)
            kept.commit()
            found |= {key: self._look_up(key, kept) for key in missing}
        for key, item, valid in zip(keys, items, there, strict=True):
            yield self._finished(item, found[key] if valid else None)

    def _look_up(self, key: tuple[int, int], kept: sqlite3.Connection) -> tuple[bytes, bytes] | None:
        column = KINDS[self.kind]
        return kept.execute(
            f"SELECT {column}, codes FROM tokens WHERE episode = ? AND frame = ?", key
        ).fetchone()

    def _has_next(self, item: dict[str, Any]) -> bool:
        frames = item.get(self.camera)
        if frames is None or frames.ndim != 4 or len(frames) != self._frames:
            got = "none" if frames is None else str(list(frames.shape))
            raise UserError(
                f"an item has {got} as {self.camera!r}; wanted {self._frames} frames: give the dataset the "
                f"delta_timestamps that camera_deltas(...) returns."
            )
        pad = item.get(f"{self.camera}_is_pad")
        return pad is None or not bool(pad[self._window[-1]])

    def _encode(self, items: list[dict[str, Any]]) -> list[np.ndarray | None]:
        windows, real = [], []
        for item in items:
            pad = item.get(f"{self.camera}_is_pad")
            windows.append(self._pixels(item[self.camera][self._window]))
            real.append(
                torch.ones(len(self._window), dtype=torch.bool) if pad is None else ~pad[self._window]
            )
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            frames = torch.from_numpy(np.stack(windows)).permute(0, 1, 4, 2, 3).to(device)
            latent = self.model.encode(frames, torch.stack(real).to(device), last=True)
        found = (latent.continuous, latent.vectors, latent.codes)
        return [None if v is None else v[:, -1].numpy(force=True) for v in found]

    def _pixels(self, frames: Tensor) -> np.ndarray:
        """Return frames as `precompute` would decode them, `[t, h, w, c]` at the LAM's resolution."""
        whole = (
            frames if frames.dtype == torch.uint8 else (frames * 255).round().clamp(0, 255).to(torch.uint8)
        )
        spec = self.model.spec
        return resize(whole.permute(0, 2, 3, 1).contiguous().numpy(), spec.resolution, spec.resize)

    def _finished(self, item: dict[str, Any], found: tuple[bytes, bytes] | None) -> dict[str, Any]:
        spec = self.spec
        tokens, codes = np.zeros(spec.tokens * spec.token_dim, np.float32), np.zeros(spec.tokens, np.int64)
        if found is not None:
            tokens = np.frombuffer(found[0], np.float32).copy()
            codes = codes if found[1] is None else np.frombuffer(found[1], np.int64).copy()
        frames = item[self.camera][self._observed]
        done = {**item, self.camera: frames if len(self._observed) > 1 else frames[0]}
        if f"{self.camera}_is_pad" in item:
            done[f"{self.camera}_is_pad"] = item[f"{self.camera}_is_pad"][self._observed]
        done[TOKENS_KEY] = torch.from_numpy(tokens)
        if spec.codebook_size is not None:
            done[CODES] = torch.from_numpy(codes)
        return {**done, VALID: torch.tensor(found is not None)}
