"""A guide: the latent actions of one demonstration, on disk and in time.

It holds one latent action per frame of the demonstration (at `fps`), each for the transition to the frame
that is the LAM's gap later, as `latentact label` gives a row. A control loop of another rate holds each
latent until its time is over, or resamples them in time.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from latentact.data.latents import load_described, require_codes
from latentact.errors import UserError
from latentact.io.atomic import atomic_write
from latentact.io.records import Record, parse_record
from latentact.io.specs import Rate, SpecRecord
from latentact.io.tensors import require_array, to_arrays
from latentact.types import LatentActionSpec


@dataclass(frozen=True, kw_only=True)
class Guide:
    """The latent actions of one demonstration; entry i is the transition from its frame i."""

    spec: LatentActionSpec
    """What they mean."""
    fps: float
    """Latent actions per second; 0 where the rate of the frames is unknown."""
    vectors: Float32[np.ndarray, "n k d"]
    """After the quantizer."""
    continuous: Float32[np.ndarray, "n k d"]
    """Before it."""
    codes: Int64[np.ndarray, "n k"] | None
    """Codebook indices."""

    def __len__(self) -> int:
        """Number of latent actions."""
        return len(self.vectors)

    @property
    def timestamps(self) -> Float64[np.ndarray, " n"]:
        """Seconds into the demonstration at which each transition begins; NaN where unknown."""
        return np.arange(len(self)) / self.fps if self.fps else np.full(len(self), np.nan)

    def save(self, folder: str | Path) -> None:
        """Write `latents.safetensors` and `latents.pt`, each with the latents, their times and the spec."""
        from safetensors.torch import save

        tensors = {
            "latent_actions": torch.from_numpy(self.continuous.copy()),  # may be the same array
            "vectors": torch.from_numpy(self.vectors),
            "timestamps": torch.from_numpy(self.timestamps),
        }
        if self.codes is not None:
            tensors["codes"] = torch.from_numpy(self.codes)
        about = {"spec": asdict(self.spec), "fps": self.fps}
        with atomic_write(Path(folder) / "latents.safetensors") as partial:
            partial.write_bytes(save(tensors, {"latentact": json.dumps(about)}))
        with atomic_write(Path(folder) / "latents.pt") as partial:
            torch.save({**tensors, "metadata": about}, partial)

    @classmethod
    def load(cls, path: str | Path) -> Guide:
        """Read what `save` wrote: the folder, or either file; nothing in it is executed.

        Raises:
            UserError: it is missing, truncated or something else.
        """
        path = Path(path)
        path = path / "latents.safetensors" if path.is_dir() else path
        tensors, metadata = load_described(path)
        if metadata is None:
            raise UserError(
                f"{path} holds no guide; extract one with: latentact imitate --mode extract_only."
            )
        about = parse_record(_GuideRecord, metadata, str(path))
        spec, arrays = about.spec.spec(), to_arrays(tensors, path)
        n = len(tensors.get("timestamps", ()))
        if n == 0:
            raise UserError(f"{path} must hold at least one latent action, got none; extract it again.")
        for name in ("vectors", "latent_actions"):
            require_array(path, name, arrays.get(name), (n, spec.tokens, spec.token_dim), ("float32",))
        return cls(
            spec=spec,
            fps=about.fps,
            vectors=arrays["vectors"],
            continuous=arrays["latent_actions"],
            codes=require_codes(path, arrays, spec, n),
        )


class _GuideRecord(Record):
    """What a guide's file says about it."""

    spec: SpecRecord
    fps: Rate
