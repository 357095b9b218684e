"""Evaluate a latent action model: `latentact inspect LAM --data DIR`.

Uses the episodes held out by its run, or all episodes for other models.
Writes `inspect.json` and `inspect.html`.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from latentact.config import LARGEST, Between, Count, Seconds, from_dict
from latentact.data.mixture import TrainingDataConfig, open_training_store
from latentact.data.splits import split_episodes
from latentact.data.store import FrameStore
from latentact.data.time_base import lam_frame_gap, require_gap
from latentact.device import require_device
from latentact.errors import EXTRAS, UserError, missing_extra, require_between
from latentact.evaluation.lam.inspect import inspect_lam
from latentact.io.atomic import write_json
from latentact.io.records import Record, parse_record, read_record, read_yaml
from latentact.io.specs import Text
from latentact.lams.contract import load_lam
from latentact.reporting.pages.inspect import write_page
from latentact.types import LatentActionSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Evaluate a latent action model and give a go or no-go verdict."""

    lam: str
    """Folder, file or hub id of the latent action model."""
    data: str = ""
    """Dataset, folder of videos, one video, or hub id of a dataset; empty: the data of the LAM's training,
    which may be a mixture."""
    out: str = ""
    """Folder for inspect.json and inspect.html; empty: the LAM's folder, or `inspect` where it has none."""
    camera: str = ""
    """Camera key; empty: the only one."""
    frame_gap_s: Seconds = 0.0
    """Seconds between the two frames of a transition; 0: the LAM's own."""
    held_out: Annotated[float | None, Between(0, 1)] = None
    """Fraction of the episodes to evaluate on; 1: all. None: those held out in training, else all."""
    seed: Annotated[int | None, Between(0, LARGEST)] = None
    """Seed of the split and of all random draws. None: that of the LAM's training, else 0."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    max_transitions: Count = 2048
    """Maximum number of transitions, sampled at random."""
    drop_nonfinite: bool = False
    """Whether to drop rows whose state or action is missing, NaN or infinite."""
    no_strict: bool = False
    """Whether to skip truncated, altered and missing shards instead of raising an error."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        if self.held_out is not None and not 0 < self.held_out <= 1:
            raise UserError(
                f"--held-out must be more than 0 and at most 1 (all episodes), got {self.held_out}."
            )
        require_between("--max-transitions", self.max_transitions, 1, 10**9)
        require_between("--seed", self.seed, 0, 2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class InspectResult:
    """Files of the report card and its verdict."""

    verdict: str
    """Verdict in one sentence: go or no-go."""
    cautions: tuple[str, ...]
    """Caveats that do not rule out its use."""
    recommendation: str
    """Recommended next step."""
    html: Path
    """The page."""
    json: Path
    """File with the results as JSON."""


def run(config: InspectConfig) -> InspectResult:
    """Inspect a LAM, write the report card and return the verdict.

    Raises:
        UserError: the model or the data cannot be read, or the LAM's frame gap does not fit the data.
    """
    require_gap(config.frame_gap_s)
    require_device(config.device)
    if importlib.util.find_spec("plotly") is None:
        raise missing_extra("plotly", EXTRAS["plotly"])
    folder = Path(config.out or (config.lam if Path(config.lam).is_dir() else "inspect"))
    if folder.is_file():
        raise UserError(f"--out must be a folder, got the file {folder}.")
    model = load_lam(config.lam, config.device)
    store = open_training_store(_data(config, model.spec))
    gap = lam_frame_gap(model.spec, store.fps, store.path, config.frame_gap_s)
    episodes, seed, notes = _held_out(config, store)
    log.info("%d of %d episodes, frame gap %d", len(episodes), store.num_episodes, gap)
    found = inspect_lam(
        model,
        store,
        episodes=episodes,
        frame_gap=gap,
        seed=seed,
        max_transitions=config.max_transitions,
        device=config.device,
    )
    numbers: dict[str, Any] = {
        "lam": str(config.lam),
        "model": model.spec.model,
        "spec": vars(model.spec),
        "data": config.data or str(store.path),
        "frame_gap": gap,
        "frame_gap_s": gap / store.fps,
        **found.numbers,
    }
    numbers["missing"] = [*notes, *numbers["missing"]]
    folder.mkdir(parents=True, exist_ok=True)
    write_page(folder / "inspect.html", numbers, found.arrays)
    write_json(folder / "inspect.json", numbers)
    verdict = numbers["verdict"]
    return InspectResult(
        verdict=verdict["headline"],
        cautions=tuple(each["message"] for each in verdict["findings"] if each["level"] == "caution"),
        recommendation=verdict["recommendation"],
        html=folder / "inspect.html",
        json=folder / "inspect.json",
    )


def _data(config: InspectConfig, spec: LatentActionSpec) -> TrainingDataConfig:
    """Return the data to evaluate on: that of the flag, or else of the model's training."""
    data = TrainingDataConfig(path=config.data)
    if not config.data:
        file = Path(config.lam) / "config.yaml"
        values = read_yaml(file) if file.is_file() else None
        if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
            raise UserError(
                f"--data is required for {config.lam}, which does not name the data of its training. Give a "
                f"dataset."
            )
        data = from_dict(TrainingDataConfig, values["data"])
    return replace(
        data,
        camera=config.camera or data.camera,
        resolution=spec.resolution,
        resize=spec.resize,
        drop_nonfinite=config.drop_nonfinite or data.drop_nonfinite,
        no_strict=config.no_strict or data.no_strict,
    )


class _Part(Record):
    path: Text


class _Data(Record):
    path: Text = ""
    mixture: tuple[_Part, ...] = Field(default=(), strict=False)


class _Training(Record):
    """Training settings in `config.yaml` of a LAM."""

    data: _Data = _Data()
    held_out: Annotated[float, Field(ge=0, lt=1)] | None = None
    split_seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0


class _Result(Record):
    """Content key of the training frames in `lam.json`."""

    frames: str = ""


def _training(config: InspectConfig, store: FrameStore) -> _Training | None:
    """Return the settings of the model's training, if it used these frames or this path."""
    settings, result = (Path(config.lam) / name for name in ("config.yaml", "lam.json"))
    if not settings.is_file():
        return None
    values = parse_record(_Training, read_yaml(settings), str(settings))
    place = _place(config.data)
    if (
        config.data
        and config.held_out is None
        and place in [_place(part.path) for part in values.data.mixture]
    ):
        raise UserError(
            f"{config.data} is a part of the mixture that {config.lam} was trained on. Leave out --data to "
            f"evaluate on what was held out of the mixture, or give --held-out 1 for all of this part."
        )
    frames = read_record(_Result, result).frames if result.is_file() else None
    same = not config.data or store.digest == frames or place == _place(values.data.path)
    return values if same else None


def _place(path: str) -> Path:
    return Path(path).expanduser().resolve()


def _held_out(config: InspectConfig, store: FrameStore) -> tuple[np.ndarray, int, list[str]]:
    """Return the episodes to evaluate on, the seed, and notes on the choice."""
    share, seed, notes = config.held_out, config.seed, []
    if settings := _training(config, store):
        share = settings.held_out if share is None else share
        seed = settings.split_seed if seed is None else seed
    elif share is None:
        notes.append(
            "It is unknown whether the model was trained on this data, so all episodes are used; results on "
            "training episodes are too optimistic."
        )
    if share is None or share == 1:
        return np.arange(store.num_episodes), seed or 0, notes
    return split_episodes(store, held_out=share, seed=seed or 0)[1], seed or 0, notes
