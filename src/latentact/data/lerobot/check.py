"""What `latentact check-data` reports about LeRobot datasets alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
from jaxtyping import Float64

from latentact.data.format import FormatFindings
from latentact.data.lerobot.openable import problems, total_problems
from latentact.data.lerobot.recording import LeRobotFiles
from latentact.data.time_base import LEROBOT_TOLERANCE_S, clock_problem
from latentact.errors import UserError
from latentact.io.records import parse_json, read_text


def check_lerobot(source: LeRobotFiles) -> FormatFindings:
    """Return what is missing, what LeRobot cannot open or train on, and the kinds of timestamps."""
    warnings, v3 = [], source.lerobot_version.startswith("v3")
    if source.missing_episodes and v3:
        warnings.append("LeRobot cannot open part of a v3 dataset: precompute --output column rejects it")
    if v3 and (lacking := _without_statistics(source)):
        warnings.append(
            f"meta/stats.json has no statistics of {', '.join(lacking)}, which LeRobot needs to train a "
            f"policy"
        )
    warnings += [] if v3 else total_problems(source)
    warnings += [f"{text}; precompute --output column rejects it" for text in problems(source)]
    clocks = _check_clocks(source)
    return FormatFindings(warnings=warnings + clocks.warnings, clocks=clocks.clocks)


def _without_statistics(source: LeRobotFiles) -> list[str]:
    """Return the cameras, state and action without statistics in `meta/stats.json`."""
    file = source.path / "meta/stats.json"
    try:
        known = parse_json(read_text(file), str(file)) if file.is_file() else {}
    except UserError:
        return []  # `problems` reports it
    needed = [key for key, feature in source.info.features.items() if feature.visual and not feature.depth]
    needed += [name for name in ("observation.state", "action") if name in source.tables.features]
    return [name for name in needed if isinstance(known, dict) and name not in known]


def _check_clocks(source: LeRobotFiles) -> FormatFindings:
    found: Counter[str] = Counter()
    worst, holes = 0.0, 0
    for recording in source.recordings:
        kind, size = _clock(source.tables.timestamps(recording.episode), source.fps)
        found[kind] += 1
        worst = max(worst, size if kind == "jitter" else 0.0)
        holes += int(size) if kind == "gaps" else 0
    found["impossible"] += source.wrong_clocks
    warnings = []
    if found["gaps"]:
        warnings.append(
            f"episodes with gaps in their timestamps: {found['gaps']} ({holes} gaps); no transition crosses "
            f"one"
        )
    if found["jitter"]:
        warnings.append(
            f"episodes with timestamps that are not row / fps: {found['jitter']} (up to {1000 * worst:.3g} "
            f"ms off); LeRobot reads them with a larger tolerance_s only"
        )
    return FormatFindings(
        warnings=warnings, clocks={kind: number for kind, number in found.items() if number}
    )


def _clock(timestamps: Float64[np.ndarray, " n"], fps: float) -> tuple[str, float]:
    """Return the kind of a `timestamp` column, and its number of gaps or its largest error in seconds."""
    if clock_problem(timestamps):
        return "impossible", 0.0
    off = np.abs(timestamps - timestamps[0] - np.arange(len(timestamps)) / fps)
    rounding = 4 * np.finfo(np.float32).eps * np.abs(timestamps)
    if (off <= LEROBOT_TOLERANCE_S + rounding).all():
        return ("regular" if abs(timestamps[0]) <= LEROBOT_TOLERANCE_S else "offset"), 0.0
    steps = np.diff(timestamps) * fps
    holes = int((steps.round() > 1).sum())
    if holes and (np.abs(steps - steps.round()) < 0.1).all():
        return "gaps", float(holes)
    return "jitter", float(off.max())
