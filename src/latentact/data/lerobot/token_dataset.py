"""A LeRobot dataset with LAM tokens from a file beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from latentact.data.latents import VALID, TokenFile
from latentact.data.lerobot.writer import number_statistics


class TokenDataset(Dataset[dict[str, Any]]):
    """A `LeRobotDataset` whose items also have the LAM tokens of a file, as if they were a column.

    Args:
        dataset: all episodes of it.
        tokens: for each of its rows.
        key: of the tokens in an item.
        deltas: rows around the current one whose tokens an item has; None: its own, without an axis of time.

    Raises:
        UserError: the tokens are those of another dataset.
    """

    def __init__(self, dataset: Any, tokens: TokenFile, key: str, deltas: list[int] | None) -> None:
        rows = {
            key: dataset.hf_dataset.data.column(key).to_numpy() for key in ("episode_index", "frame_index")
        }
        tokens.refuse_other_rows(**rows, dataset=dataset.repo_id)
        self._dataset, self.meta = dataset, dataset.meta
        self._deltas = deltas
        self._columns = {key: torch.from_numpy(tokens.tokens), VALID: torch.from_numpy(tokens.valid)}
        row = np.arange(len(tokens.valid))
        _, episode, length = np.unique(rows["episode_index"], return_inverse=True, return_counts=True)
        self._first = row - rows["frame_index"]
        self._last = self._first + length[episode] - 1
        for name, values in (found := {key: tokens.tokens, VALID: tokens.valid}).items():
            width = values.shape[1] if values.ndim == 2 else 1
            self.meta.features[name] = {"dtype": str(values.dtype), "shape": (width,), "names": None}
        self.meta.stats |= number_statistics(found)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return a row with its tokens; rows outside of the episode repeat its first or last."""
        item = self._dataset[row]
        wanted = row + np.array(self._deltas or [0])
        inside = wanted.clip(self._first[row], self._last[row])
        for key, values in self._columns.items():
            item[key] = values[inside] if self._deltas else values[inside[0]]
            if self._deltas:
                item[f"{key}_is_pad"] = torch.from_numpy(wanted != inside)
        return item
