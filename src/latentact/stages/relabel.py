"""Relabel a dataset: a person gives the action that they would have taken in each recorded frame.

The output is a copy of the dataset in the format of DAgger: `action` is the person's where they gave one,
`executed_action` the recorded one; `labeled` marks the rows to learn from (`train-policy only=labeled`).
"""

from __future__ import annotations

import logging
import shutil
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from latentact.config import Between, Count, OneOf
from latentact.data.cache import DataConfig, open_store
from latentact.data.lerobot.relabeled import write_relabeled
from latentact.data.lerobot.source import lerobot_version
from latentact.data.lerobot.writer import require_lerobot
from latentact.data.locate import resolve_dataset
from latentact.data.store import FrameStore
from latentact.envs.human import MOVES, class_keys
from latentact.envs.input_devices import Device, Terminal, Window
from latentact.errors import UserError, require_one_of
from latentact.io.atomic import read_json, write_json
from latentact.io.staging import locked_staging
from latentact.types import ActionSpace

log = logging.getLogger(__name__)

LABELS = "labels.json"
DEVICES = {"keyboard": Window, "terminal": Terminal}
HELP = "enter: keep the action, right: no label, left: one frame back, escape: end and write the dataset"


@dataclass(frozen=True, kw_only=True)
class RelabelConfig:
    """Label the frames of a recorded dataset with your own actions, by keyboard or terminal."""

    data: str
    """LeRobot v3 dataset with actions, such as one of `record --policy`."""
    out: str
    """Folder of the new dataset; its videos are hard links."""
    device: Annotated[str, OneOf(DEVICES)] = "keyboard"
    """"keyboard" opens a window; "terminal" needs no display."""
    camera: str = ""
    """Camera key; empty: the only camera."""
    every: Count = 1
    """Ask for the action of every n-th frame of an episode."""
    step_size: Annotated[float, Between(0.001, 1)] = 0.05
    """Change of a continuous action by a key, as a fraction of its range in the data."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_one_of("--device", self.device, DEVICES)

    def identity(self) -> dict[str, Any]:
        """Return the settings that an interrupted labeling must share."""
        return {name: value for name, value in asdict(self).items() if name in ("data", "camera", "every")}


@dataclass(frozen=True, kw_only=True)
class RelabelResult:
    """Result of a labeling."""

    path: Path
    """The dataset."""
    labels: int
    """Number of labels."""
    changed: int
    """Number of labels that differ from the executed action."""


def run(config: RelabelConfig) -> RelabelResult:
    """Label frames, or resume an interrupted labeling, and write the dataset.

    Raises:
        UserError: the data is not a LeRobot v3 dataset with actions, the device cannot be used, the folder
            exists or is in use by another process, or no frame was labeled.
    """
    out, root = Path(config.out).absolute(), resolve_dataset(config.data)
    if out.exists():
        raise UserError(f"{out} must not exist yet, got a folder or file. Choose another --out.")
    require_lerobot()
    if not root.exists():
        raise UserError(f"{root} does not exist. Give a LeRobot v3 dataset, such as one of latentact record.")
    if not lerobot_version(root).startswith("v3"):
        raise UserError(
            f"DATA must be a LeRobot v3 dataset, got {root}. Convert older versions with LeRobot's "
            "convert_dataset_v21_to_v30, or record one with latentact record."
        )
    store = open_store(DataConfig(path=config.data, camera=config.camera, resolution=0))
    if store.action_space is None:
        raise UserError(f"{root} must have the column 'action', got none. Give a dataset with actions.")
    executed = np.ma.getdata(store.actions(range(store.num_episodes)))
    keys = _keys(store.action_space, store.action_names)
    staging = out.with_name(out.name + ".partial")
    settings = {**config.identity(), "digest": store.digest}
    with (
        closing(DEVICES[config.device]()) as device,  # before anything is written
        locked_staging(staging, out, settings, "labeling"),
    ):
        file = staging / LABELS
        labels = {int(row): label for row, label in (read_json(file) if file.exists() else {}).items()}
        try:
            _ask(config, store, executed, keys, device, labels, file)
        finally:
            device.close()
        if not labels:
            raise UserError(f"no frame was labeled, so {out} is not written. Re-run the command.")
        changed = write_relabeled(root, store, labels, out, config.identity())
        text = "%s: %d labels, %d of them differ from the executed action"
        log.info(text, out, len(labels), changed)
        shutil.rmtree(staging)
    return RelabelResult(path=out, labels=len(labels), changed=changed)


def _ask(
    config: RelabelConfig,
    store: FrameStore,
    executed: np.ndarray,
    keys: dict[str, int],
    device: Device,
    labels: dict[int, Any],
    file: Path,
) -> None:
    """Ask for the labels of all frames that have none yet; each is written to the file at once.

    Args:
        config: settings.
        store: frames and texts.
        executed: class `[n]` or values `[n, a]` of each row.
        keys: class of each key, for discrete actions.
        device: display and keyboard.
        labels: row -> action; gets the new ones.
        file: JSON file of the labels.
    """
    space = store.action_space
    assert space is not None
    ends = store.starts + store.lengths - 1  # the last action of an episode is not executed
    rows = [
        row for first, end in zip(store.starts, ends, strict=True) for row in range(first, end, config.every)
    ]
    span = np.ptp(executed, axis=0)
    step = config.step_size * np.where(span > 0, span, 1)
    log.info("%s", HELP)
    log.info("%s", _describe(store, keys))
    pressed: list[str] = []
    at = next((i for i, row in enumerate(rows) if row not in labels), len(rows))
    while at < len(rows):
        row = int(rows[at])
        action = np.array(labels.get(row, executed[row]), executed.dtype)
        key = ""
        while key not in ("enter", "left", "right", "escape"):
            device.show(store.frames[row], _text(store, row, action))
            pressed += device.poll()
            key = pressed.pop(0) if pressed else ""
            if key in keys:
                action, key = np.asarray(keys[key]), "enter"
            for i, (less, more) in enumerate(MOVES[: 0 if space.discrete else space.size]):
                action[i] += ((key == more) - (key == less)) * step[i]
            if not key:
                device.wait(0.02)
        if key == "escape":
            return
        if key == "left":
            at = max(0, at - 1)
            continue
        if key == "enter":
            labels[row] = action.tolist()
        else:
            labels.pop(row, None)
        write_json(file, labels)
        at += 1


def _keys(space: ActionSpace, names: tuple[str, ...]) -> dict[str, int]:
    """Return the class index of each key; empty for continuous actions."""
    values = space.values or tuple(range(space.size))
    return {key: values.index(value) for key, value in class_keys(space, names).items()}


def _describe(store: FrameStore, keys: dict[str, int]) -> str:
    """Return a line that explains the keys of actions."""
    space, names = store.action_space, store.action_names
    assert space is not None
    if space.discrete:
        return ", ".join(f"{key}: {names[index] if names else index}" for key, index in keys.items())
    shown = names or tuple(map(str, range(space.size)))
    return ", ".join(
        f"{less} / {more}: {name} - / +" for (less, more), name in zip(MOVES, shown, strict=False)
    )


def _text(store: FrameStore, row: int, action: np.ndarray) -> str:
    """Return the line below a frame."""
    episode = int(store.episode[row])
    if action.ndim:
        shown = ", ".join(f"{value:.3g}" for value in action)
    else:
        shown = store.action_names[int(action)] if store.action_names else str(int(action))
    task = store.task_texts[store.task[row]]
    frame = f"frame {row - store.starts[episode] + 1} of {store.lengths[episode]}"
    parts = (task, f"episode {episode + 1} of {store.num_episodes}", frame, shown)
    return " | ".join(filter(None, parts))
