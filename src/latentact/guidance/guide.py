"""A guide: the latent actions of one demonstration, and their files.

It holds one latent action per frame of the demonstration (at `fps`), for the transition to the frame one LAM
gap later, as `latentact label` does for each row. A control loop at a different rate holds each latent action
until the next one starts, or resamples them in time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64

from latentact.data.latents import LatentSequence, check_arrays, read_arrays, write_arrays
from latentact.errors import UserError
from latentact.io.records import Record, parse_record
from latentact.io.specs import Rate, SpecRecord


@dataclass(frozen=True, kw_only=True)
class Guide(LatentSequence):
    """The latent actions of one demonstration; entry i is the transition from its frame i."""

    fps: float
    """Latent actions per second; 0 if the rate of the frames is unknown."""
    valid: Bool[np.ndarray, " n"] = field(init=False)
    """True everywhere."""

    def __post_init__(self) -> None:
        """Mark every entry as a transition."""
        object.__setattr__(self, "valid", np.ones(len(self.vectors), bool))

    @property
    def timestamps(self) -> Float64[np.ndarray, " n"]:
        """Start time of each transition in seconds; NaN if the rate is unknown."""
        return np.arange(len(self)) / self.fps if self.fps else np.full(len(self), np.nan)

    def save(self, folder: str | Path) -> None:
        """Write `latents.safetensors` and `latents.pt`, each with the latents, their times and the spec."""
        arrays = {
            "latent_actions": self.continuous,
            "vectors": self.vectors,
            "timestamps": self.timestamps,
        }
        if self.codes is not None:
            arrays["codes"] = self.codes
        about = {"spec": asdict(self.spec), "fps": self.fps}
        for name in ("latents.safetensors", "latents.pt"):
            write_arrays(Path(folder) / name, arrays, about)

    @classmethod
    def load(cls, path: str | Path) -> Guide:
        """Load a guide from the folder or either file of `save`; no code in it is executed.

        Raises:
            UserError: the guide is missing, truncated or invalid.
        """
        path = Path(path)
        path = path / "latents.safetensors" if path.is_dir() else path
        arrays, metadata = read_arrays(path)
        if metadata is None:
            raise UserError(
                f"{path} holds no guide. Extract one with: latentact imitate --mode extract_only."
            )
        about = parse_record(_GuideRecord, metadata, str(path))
        spec, n = about.spec.spec(), len(np.atleast_1d(arrays.get("timestamps", ())))
        if n == 0:
            raise UserError(f"{path} must hold at least one latent action, got none. Extract it again.")
        codes = check_arrays(path, arrays, spec, n, latents=("vectors", "latent_actions"), columns={})
        return cls(
            spec=spec,
            fps=about.fps,
            vectors=arrays["vectors"],
            continuous=arrays["latent_actions"],
            codes=codes,
        )


class _GuideRecord(Record):
    """Metadata of a guide's file."""

    spec: SpecRecord
    fps: Rate
