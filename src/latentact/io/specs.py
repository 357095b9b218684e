"""Read the latent action spec of `spec.json`, manifests, token files and guides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from latentact.io.records import Record, parse_record, read_record
from latentact.types import KERNELS, LatentActionSpec


def _rate(value: float) -> float:
    if value and not 1e-6 <= value <= 1e6:
        raise ValueError("0 or between 1e-6 and 1e6")
    return value


def _text(value: str) -> str:
    if "\0" in value or len(value) > 1000:
        raise ValueError("text of at most 1000 characters without NUL")
    return value


PositiveInt = Annotated[int, Field(ge=1, le=1 << 20)]
Rate = Annotated[float, AfterValidator(_rate)]
Text = Annotated[str, AfterValidator(_text)]


class SpecRecord(Record):
    """`LatentActionSpec` in JSON; unknown fields are errors because they could change its meaning."""

    model_config = ConfigDict(extra="forbid")

    model: Text
    tokens: PositiveInt
    token_dim: PositiveInt
    codebook_size: Annotated[int, Field(ge=1, le=1 << 40)] | None
    frame_gap: PositiveInt
    frame_gap_s: Rate
    fps: Rate
    resolution: PositiveInt
    camera: Text
    value_range: tuple[Literal[0], Literal[255]] = Field(strict=False)
    resize: Literal[KERNELS]  # type: ignore[valid-type]
    robot_actions: bool
    weights: Text

    def spec(self) -> LatentActionSpec:
        """Return the spec."""
        values: dict[str, Any] = {**self.model_dump(), "value_range": (0.0, 255.0)}
        return LatentActionSpec(**values)


def parse_spec(values: Any, where: str) -> LatentActionSpec:
    """Return the spec from the output of `dataclasses.asdict`; accepts JSON.

    Args:
        values: fields of the spec.
        where: file or place, for messages.

    Raises:
        UserError: a field is missing, unknown or of the wrong type.
    """
    return parse_record(SpecRecord, values, where).spec()


def load_spec(path: Path) -> LatentActionSpec:
    """Load a spec written by `LatentActionSpec.save`.

    Raises:
        UserError: the file is missing or is not a spec.
    """
    return read_record(SpecRecord, path).spec()
