"""A LeRobot dataset with LAM tokens from a separate file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from latentact.data.latents import VALID, TokenFile
from latentact.data.lerobot.writer import number_statistics


class TokenDataset(Dataset[dict[str, Any]]):
    """A `LeRobotDataset` with the LAM tokens of a file as an additional column.

    Args:
        dataset: `LeRobotDataset` with all episodes.
        tokens: tokens of every row.
        key: key of the tokens in an item.
        deltas: row offsets of the tokens in an item; None: only the tokens of the row, without a time axis.

    Raises:
        UserError: the tokens belong to a different dataset.
    """

    def __init__(self, dataset: Any, tokens: TokenFile, key: str, deltas: list[int] | None) -> None:
        rows = {
            key: dataset.hf_dataset.data.column(key).to_numpy() for key in ("episode_index", "frame_index")
        }
        tokens.check_rows(**rows, dataset=dataset.repo_id)
        self._dataset, self.meta = dataset, dataset.meta
        self.episodes = self.absolute_to_relative_idx = None  # as of a dataset with all episodes
        self._deltas = deltas
        self._columns = {key: torch.from_numpy(tokens.tokens), VALID: torch.from_numpy(tokens.valid)}
        _, episode, length = np.unique(rows["episode_index"], return_inverse=True, return_counts=True)
        # For each row of the dataset: first and last row of its episode.
        self._first_row = np.arange(len(tokens.valid)) - rows["frame_index"]
        self._last_row = self._first_row + length[episode] - 1
        columns = {key: tokens.tokens, VALID: tokens.valid}
        for name, values in columns.items():
            width = values.shape[1] if values.ndim == 2 else 1
            self.meta.features[name] = {"dtype": str(values.dtype), "shape": (width,), "names": None}
        self.meta.stats |= number_statistics(columns)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row with its tokens; offsets outside the episode repeat its first or last row."""
        item = self._dataset[index]
        target = index + np.array(self._deltas or [0])
        clipped = target.clip(self._first_row[index], self._last_row[index])
        for key, values in self._columns.items():
            item[key] = values[clipped] if self._deltas else values[clipped[0]]
            if self._deltas:
                item[f"{key}_is_pad"] = torch.from_numpy(target != clipped)
        return item
