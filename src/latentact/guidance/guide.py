"""A guide: the latent actions of one demonstration, how it was made, its operations and files.

It holds one latent action per frame of the demonstration (at `fps`), for the transition to the frame one LAM
gap later, as `latentact label` does for each row. A control loop at a different rate holds each latent action
until the next one starts, or resamples them in time.

Operations return a new guide. They are linear in the latent actions; guides with codes get the nearest codes
of the LAM's codebook, and `vectors` are always those of the codes. Only `continuous` is not rounded.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64
from pydantic import Field

from latentact.data.latents import LatentSequence, check_arrays, read_arrays, write_arrays
from latentact.data.time_base import gaps_agree, rates_agree
from latentact.errors import UserError
from latentact.guidance.dtw import align
from latentact.io.records import Record, parse_record
from latentact.io.specs import Rate, SpecRecord, Text
from latentact.io.tensors import require_array

GUIDE = "latents.safetensors"
GUIDE_PT = "latents.pt"
SUFFIX = ".safetensors"
LINE = 1000
"""Maximum length of a line of provenance."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Guide(LatentSequence):
    """The latent actions of one demonstration; entry i is the transition from its frame i.

    Its arrays are read-only. Ranges of steps are `range(start, stop)`, as in Python.
    """

    fps: float
    """Latent actions per second; 0 if the rate of the frames is unknown."""
    codebook: Float32[np.ndarray, "k m f"] | None = None
    """What each code of each token adds to the flattened vectors; None without codes, or if unknown."""
    still: Float32[np.ndarray, "2 k d"] | None = None
    """Vectors and continuous latent action of no change (the first frame twice); None: zeros."""
    provenance: tuple[str, ...] = ()
    """How it was made: one line per operation, in order."""
    valid: Bool[np.ndarray, " n"] = field(init=False)
    """True everywhere."""

    def __post_init__(self) -> None:
        """Mark every entry as a transition and protect the arrays."""
        object.__setattr__(self, "valid", np.ones(len(self.vectors), bool))
        for name in ("vectors", "continuous", "codes", "codebook", "still", "valid"):
            if (array := getattr(self, name)) is not None:
                array = array.view()
                array.flags.writeable = False
                object.__setattr__(self, name, array)

    @property
    def timestamps(self) -> Float64[np.ndarray, " n"]:
        """Start time of each transition in seconds; NaN if the rate is unknown."""
        return np.arange(len(self)) / self.fps if self.fps else np.full(len(self), np.nan)

    def about(self) -> dict[str, Any]:
        """Return length, rate, spec, number of different codes (None without codes) and provenance."""
        return {
            "latent_actions": len(self),
            "fps": self.fps,
            "seconds": len(self) / self.fps if self.fps else None,
            "codes": None if self.codes is None else len(np.unique(self.codes)),
            "spec": asdict(self.spec),
            "provenance": [*self.provenance],
        }

    def at(self, position: Float[np.ndarray, " m"]) -> Guide:
        """Return the latent actions at fractional steps, interpolated; of guides with codes the nearest ones.

        `continuous` is always interpolated. The provenance stays the same.
        """
        low = np.floor(position).astype(int)
        part = (position - low)[:, None, None]
        high = np.minimum(low + 1, len(self) - 1)

        def between(values: np.ndarray) -> np.ndarray:
            mixed = values[low] * (1 - part) + values[high] * part
            return np.where(part == 0, values[low], mixed).astype(np.float32)

        if self.codes is None:
            return self._having(between(self.vectors), between(self.continuous), None)
        nearest = np.floor(position + 0.5).astype(int)
        return self._having(self.vectors[nearest], between(self.continuous), self.codes[nearest])

    def slice(self, start: int, stop: int) -> Guide:
        """Return the steps from `start` to before `stop`."""
        self._require(range(start, stop))
        return self._rows(range(start, stop))._noted(f"slice {start}:{stop}")

    def replace(self, steps: range, other: Guide) -> Guide:
        """Return the guide with these steps replaced by another guide of any length."""
        self._require(steps)
        parts = [self._rows(range(steps.start)), other, self._rows(range(steps.stop, len(self)))]
        joined = self._joined([part for part in parts if len(part)])
        return joined._noted(f"replace {steps.start}:{steps.stop} with {_history(other)}")

    def scale(self, factor: float) -> Guide:
        """Return the guide with its differences from no change multiplied by `factor`; 0 gives no change."""
        if not abs(factor) <= 1000:
            raise UserError(
                f"the factor of scale must be between -1000 and 1000, got {factor:g}. Use 1 for no scaling."
            )
        if factor == 1:
            return self._noted("scale 1")
        still = np.zeros((2, *self.vectors.shape[1:]), np.float32) if self.still is None else self.still
        with np.errstate(over="ignore"):  # `save` rejects what does not fit
            vectors, continuous = (
                (rest + factor * (values - rest)).astype(np.float32)
                for rest, values in zip(still, (self.vectors, self.continuous), strict=True)
            )
        return self._snapped(vectors, continuous)._noted(f"scale {factor:g}")

    def set_code(self, steps: range, code: int | Sequence[int]) -> Guide:
        """Return the guide with the code of these steps set; `continuous` becomes the code's vector.

        Args:
            steps: the steps.
            code: one code for each of the k tokens, or one for all of them.

        Raises:
            UserError: the guide has no codes, or there is no such code.
        """
        self._require(steps)
        size, k = self.spec.codebook_size, self.spec.tokens
        if self.codes is None or size is None:
            raise UserError(f"set_code needs a guide with codes, but {self.spec.model} has none. Use scale.")
        row = np.array([code] * k if isinstance(code, int) else [*code])
        if row.shape != (k,) or not 0 <= row.min() <= row.max() < size:
            raise UserError(
                f"the code must be one or {k} integers from 0 to {size - 1}, got {row.tolist()}. Give one "
                "code for all tokens, or one per token."
            )
        vectors, continuous, codes = self.vectors.copy(), self.continuous.copy(), self.codes.copy()
        codes[steps] = row
        vectors[steps] = continuous[steps] = self._decoded(row[None]).reshape(1, k, -1)
        edited = self._having(vectors, continuous, codes)
        return edited._noted(f"set_code {steps.start}:{steps.stop} {','.join(map(str, row))}")

    def concat(self, other: Guide, transition: int = 0) -> Guide:
        """Return this guide followed by another, with `transition` interpolated steps between them."""
        self._check_same(other)
        if not 0 <= transition <= 100_000:
            raise UserError(
                f"transition must be between 0 and 100000 steps, got {transition}. Use 0 for none."
            )
        parts = [self, other]
        if transition:
            last, first = self.at(np.full(transition, len(self) - 1.0)), other.at(np.zeros(transition))
            parts.insert(1, last._mixed(first, np.arange(1, transition + 1) / (transition + 1)))
        return self._joined(parts)._noted(f"concat {_history(other)} after {transition} steps")

    def time_warp(self, speed: float) -> Guide:
        """Return the guide played at `speed` times its speed: n / speed steps, at least one.

        Latent actions are not scaled: half the steps, each with the same change, make half the change.
        """
        if not 0.001 <= speed <= 1000:
            raise UserError(
                f"the speed of time_warp must be between 0.001 and 1000, got {speed:g}. Use 2 for half the "
                "steps, 0.5 for twice as many."
            )
        return self._stretched(_length(len(self) / speed))._noted(f"time_warp {speed:g}")

    def interpolate(self, other: Guide, t: float) -> Guide:
        """Return a guide between this (t = 0) and the other (t = 1), aligned by the fraction of their length.

        Its length is interpolated between theirs, too.
        """
        self._check_same(other)
        if not 0 <= t <= 1:
            raise UserError(
                f"t of interpolate must be between 0 and 1, got {t:g}. Use 0 for this guide, 1 for the other."
            )
        steps = _length((1 - t) * len(self) + t * len(other))
        mixed = self._stretched(steps)._mixed(other._stretched(steps), t)
        return mixed._noted(f"interpolate to {_history(other)} at {t:g}")

    @staticmethod
    def blend(guides: Sequence[Guide], weights: Sequence[float]) -> Guide:
        """Return the weighted mean of guides, aligned by dynamic time warping of their latent actions.

        Guides are added one after the other. Matched steps are averaged, in value and in time, so that the
        length is the weighted mean as well.

        Args:
            guides: at least one.
            weights: one each, at least 0; divided by their sum.

        Raises:
            UserError: the weights do not fit, the guides do not match, or they are too long to align.
        """
        if not guides or len(weights) != len(guides):
            raise UserError(
                f"blend must have one weight per guide, got {len(weights)} for {len(guides)} guides."
            )
        if not all(0 <= weight <= 1e9 for weight in weights) or not sum(weights) > 0:
            shown = ", ".join(f"{weight:g}" for weight in weights)
            raise UserError(
                f"weights must be between 0 and 1e9 with at least one above 0, got {shown}. Use equal "
                "weights for the mean."
            )
        for other in guides[1:]:
            guides[0]._check_same(other)
        used = [(guide, weight) for guide, weight in zip(guides, weights, strict=True) if weight]
        result, total = used[0]
        for guide, weight in used[1:]:
            total += weight
            result = result._aligned_mix(guide, weight / total)
        parents = (
            f"{weight / sum(weights):g} {_history(guide)}"
            for guide, weight in zip(guides, weights, strict=True)
        )
        return dataclasses.replace(result, provenance=())._noted(f"blend {' + '.join(parents)}")

    def smooth(self, window: int) -> Guide:
        """Return the mean over a window of steps around each step; the window is cut off at the ends.

        Args:
            window: odd number of steps; 1: no change.
        """
        if not 1 <= window <= 100_001 or window % 2 == 0:
            raise UserError(
                f"the window of smooth must be odd and between 1 and 100001, got {window}. Choose an odd "
                "number such as 5."
            )
        if window == 1:
            return self._noted("smooth 1")
        steps, half = np.arange(len(self)), window // 2
        first, last = np.maximum(steps - half, 0), np.minimum(steps + half + 1, len(self))

        def mean(values: np.ndarray) -> np.ndarray:
            summed = np.concatenate([np.zeros_like(values[:1], np.float64), values.cumsum(0, np.float64)])
            return ((summed[last] - summed[first]) / (last - first)[:, None, None]).astype(np.float32)

        return self._snapped(mean(self.vectors), mean(self.continuous))._noted(f"smooth {window}")

    def save(self, path: str | Path) -> None:
        """Write a file `*.safetensors`, or `latents.safetensors` and `latents.pt` into a folder.

        Each has the latent actions, their times, the spec and the provenance.

        Raises:
            UserError: a value is not finite.
        """
        if not (np.isfinite(self.vectors).all() and np.isfinite(self.continuous).all()):
            raise UserError(
                "the values of a guide must be finite, got NaN or infinity. Scale it by a smaller factor."
            )
        arrays = {
            "latent_actions": self.continuous,
            "vectors": self.vectors,
            "timestamps": self.timestamps,
        }
        arrays |= {
            name: array
            for name in ("codes", "codebook", "still")
            if (array := getattr(self, name)) is not None
        }
        about = {"spec": asdict(self.spec), "fps": self.fps, "provenance": self.provenance}
        path = Path(path)
        for file in (path,) if path.suffix == SUFFIX else (path / GUIDE, path / GUIDE_PT):
            write_arrays(file, arrays, about)

    @classmethod
    def load(cls, path: str | Path) -> Guide:
        """Load a guide written by `save`, from its folder or file; no code in it is executed.

        Raises:
            UserError: the guide is missing, truncated or invalid.
        """
        path = Path(path)
        path = path / GUIDE if path.is_dir() else path
        arrays, metadata = read_arrays(path)
        if metadata is None:
            raise UserError(f"{path} holds no guide. Extract one with latentact imitate --mode extract_only.")
        about = parse_record(_GuideRecord, metadata, str(path))
        spec, n = about.spec.spec(), len(np.atleast_1d(arrays.get("timestamps", ())))
        if n == 0:
            raise UserError(f"{path} must hold at least one latent action, got none. Extract it again.")
        codes = check_arrays(path, arrays, spec, n, latents=("vectors", "latent_actions"), columns={})
        size = spec.tokens * spec.token_dim
        codebook = arrays.get("codebook") if codes is not None else None
        if codebook is not None:
            shape = (spec.tokens, spec.codebook_size or 0, size)
            require_array(path, "codebook", codebook, shape, ("float32",))
        if (still := arrays.get("still")) is not None:
            require_array(path, "still", still, (2, spec.tokens, spec.token_dim), ("float32",))
        return cls(
            spec=spec,
            fps=about.fps,
            vectors=arrays["vectors"],
            continuous=arrays["latent_actions"],
            codes=codes,
            codebook=codebook,
            still=still,
            provenance=tuple(about.provenance),
        )

    def _having(self, vectors: np.ndarray, continuous: np.ndarray, codes: np.ndarray | None) -> Guide:
        return dataclasses.replace(self, vectors=vectors, continuous=continuous, codes=codes)

    def _noted(self, line: str) -> Guide:
        """Return the same guide with a line appended to its provenance; long lines are shortened."""
        line = line if len(line) <= LINE else f"{line[: LINE - 3]}..."
        return dataclasses.replace(self, provenance=(*self.provenance, line))

    def _rows(self, steps: range) -> Guide:
        rows = np.arange(len(self))[steps.start : steps.stop]
        codes = None if self.codes is None else self.codes[rows]
        return self._having(self.vectors[rows], self.continuous[rows], codes)

    def _stretched(self, steps: int) -> Guide:
        """Return the guide at evenly spaced steps, from its first to its last."""
        return self.at(np.linspace(0, len(self) - 1, steps))

    def _joined(self, parts: Sequence[Guide]) -> Guide:
        for part in parts:
            self._check_same(part)
        codes = [part.codes for part in parts if part.codes is not None]
        return self._having(
            np.concatenate([part.vectors for part in parts]),
            np.concatenate([part.continuous for part in parts]),
            np.concatenate(codes) if codes else None,
        )

    def _mixed(self, other: Guide, t: float | Float64[np.ndarray, " n"]) -> Guide:
        """Return (1 - t) times this guide plus t times another of the same length."""
        if isinstance(t, float | int) and t in (0, 1):
            source = other if t else self
            return self._having(source.vectors, source.continuous, source.codes)
        part = np.reshape(t, (-1, 1, 1))
        vectors, continuous = (
            ((1 - part) * a + part * b).astype(np.float32)
            for a, b in ((self.vectors, other.vectors), (self.continuous, other.continuous))
        )
        return self._snapped(vectors, continuous)

    def _aligned_mix(self, other: Guide, t: float) -> Guide:
        """Return (1 - t) times this guide plus t times another, aligned by dynamic time warping."""
        mine, theirs = align(*(g.continuous.reshape(len(g), -1).astype(float) for g in (self, other)))
        time = (1 - t) * mine + t * theirs
        steps = np.linspace(0, time[-1], _length((1 - t) * len(self) + t * len(other)))
        mixed = self.at(np.interp(steps, time, mine))
        return mixed._mixed(other.at(np.interp(steps, time, theirs)), t)

    def _snapped(self, vectors: np.ndarray, continuous: np.ndarray) -> Guide:
        """Return these latent actions; those of a guide with codes become the nearest codes."""
        if self.codes is None:
            return self._having(vectors, continuous, None)
        left = vectors.reshape(len(vectors), -1).astype(np.float64)
        codes = np.zeros((len(vectors), self.spec.tokens), np.int64)
        for token, entries in enumerate(self._entries()):  # residual codebooks refine what is left
            distance = (entries**2).sum(1) - 2 * left @ entries.T
            codes[:, token] = distance.argmin(1)
            left -= entries[codes[:, token]]
        return self._having(self._decoded(codes).reshape(vectors.shape), continuous, codes)

    def _decoded(self, codes: Int64[np.ndarray, "n k"]) -> Float32[np.ndarray, "n f"]:
        """Return the vectors of codes."""
        entries = [table[codes[:, token]] for token, table in enumerate(self._entries())]
        return np.sum(entries, axis=0).astype(np.float32)

    def _entries(self) -> Iterator[Float64[np.ndarray, "m f"]]:
        if self.codebook is None:
            raise UserError(
                f"this edit needs the codebook of {self.spec.model}, but the guide has none. Extract it "
                "again; if the LAM has none, use slice, replace, time_warp, or concat without a transition."
            )
        return (table.astype(np.float64) for table in self.codebook)

    def _require(self, steps: range) -> None:
        if steps.step != 1 or not 0 <= steps.start < steps.stop <= len(self):
            raise UserError(
                f"steps must be a range within the {len(self)} steps of the guide, got {steps.start} to "
                f"{steps.stop}. Steps count from 0, and the last one is excluded."
            )

    def _check_same(self, other: Guide) -> None:
        """Raise a UserError unless another guide comes from the same LAM, frame gap, rate and camera."""
        fields = ("weights", *(each.name for each in dataclasses.fields(self.spec)))
        pairs = [(name, getattr(self.spec, name), getattr(other.spec, name)) for name in fields]
        agree = {"rate": rates_agree, "fps": rates_agree, "frame_gap_s": gaps_agree}
        for name, a, b in (*pairs, ("rate", self.fps, other.fps)):
            if not agree.get(name, operator.eq)(a, b):
                raise UserError(
                    f"guides must be of one LAM, frame gap, rate and camera, got {name} {a!r} and {b!r}. "
                    "Extract both with the same LAM and --target-fps."
                )


def _history(guide: Guide) -> str:
    return f"({'; '.join(guide.provenance)})"


def _length(steps: float) -> int:
    return max(1, math.floor(steps + 0.5))


class _GuideRecord(Record):
    """Metadata of a guide's file."""

    spec: SpecRecord
    fps: Rate
    provenance: list[Text] = Field(default_factory=list)
