"""Latent actions on disk: the labels of `latentact label`, the token files of `precompute`, guides.

Labels are `lam_tokens.safetensors` and `manifest.json`, one row per row of the store: `vectors`, `continuous`
[n, k, d] float32, `codes` [n, k] int64 if the LAM has codes, `valid` [n] bool: False if the episode ends
before the frame gap. A token file is self-contained and has one row per row of the dataset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64
from pydantic import Field

from latentact.config import from_dict, to_dict
from latentact.data.cache import DataConfig, open_store
from latentact.data.locate import absolute_name
from latentact.data.store import FrameStore
from latentact.errors import UserError
from latentact.io.atomic import atomic_dir, atomic_write, write_json
from latentact.io.records import Record, naming, parse_record, read_record
from latentact.io.specs import SpecRecord, Text
from latentact.io.tensors import load_about, load_tensors, require_array, to_arrays
from latentact.io.unpickle import read_pickled
from latentact.types import LatentActionSpec

MANIFEST = "manifest.json"
TOKENS = "lam_tokens.safetensors"
TOKENS_PT = "lam_tokens.pt"
DTYPES = ("float32", "float16")
TOKENS_KEY, CODES, VALID = "observation.lam_tokens", "observation.lam_codes", "observation.lam_valid"
"""Columns of a dataset."""
KINDS = {"continuous": "continuous", "vq": "vectors"}
"""Value of `--tokens` -> field of `LatentActions`."""


@dataclass(frozen=True, kw_only=True)
class LatentSequence:
    """Latent actions in time; entry i is the transition from frame i.

    Labels, guides and encoded datasets are such sequences. Files of labels, guides and tokens are read by
    `read_arrays` and written by `write_arrays`.
    """

    spec: LatentActionSpec
    """Their meaning."""
    vectors: Float32[np.ndarray, "n k d"]
    """After the quantizer, if there is one; zeros where not valid."""
    continuous: Float32[np.ndarray, "n k d"]
    """Before the quantizer."""
    codes: Int64[np.ndarray, "n k"] | None
    """Codebook indices, if there is a codebook."""
    valid: Bool[np.ndarray, " n"]
    """Whether the entry is a transition; False if the episode ends before the frame gap."""

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.vectors)


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any] | None) -> None:
    """Write arrays and JSON metadata atomically, as `.safetensors` or as `.pt` by the file's suffix."""
    import torch
    from safetensors.torch import save_file

    tensors = {
        name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in arrays.items()
    }
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in addresses:  # safetensors refuses tensors that share memory
            tensors[name] = tensor.clone()
        addresses.add(tensor.data_ptr())
    text = None if metadata is None else json.dumps(metadata)
    with atomic_write(file) as partial:
        if file.suffix == ".pt":
            with partial.open("wb") as opened:
                torch.save({**tensors, "metadata": json.loads(text or "null")}, opened)
        else:
            save_file(tensors, partial, metadata=None if text is None else {"latentact": text})
            partial.chmod(0o644)


def read_arrays(file: Path) -> tuple[dict[str, np.ndarray], Any]:
    """Return the arrays of a `.safetensors` or `.pt` file, and its metadata, which may be None.

    Raises:
        UserError: the file is missing, truncated or in another format; nothing in it is executed.
    """
    import torch

    if file.suffix != ".pt":
        return to_arrays(load_tensors(file), file), load_about(file)
    if not file.is_file():
        raise UserError(f"{file} does not exist. Give the file that an earlier command wrote.")
    values = read_pickled(file)
    tensors = {str(name): value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return to_arrays(tensors, file), values.get("metadata")


def check_arrays(
    file: Path,
    arrays: Mapping[str, np.ndarray],
    spec: LatentActionSpec,
    rows: int,
    *,
    latents: Sequence[str] = ("vectors", "continuous"),
    dtypes: Sequence[str] = ("float32",),
    columns: Mapping[str, str] = MappingProxyType({"valid": "bool"}),
) -> Int64[np.ndarray, "n k"] | None:
    """Check the arrays of a latent sequence and return its codes; None for latent actions without codes.

    Args:
        file: file of the arrays, for messages.
        arrays: arrays from `read_arrays`.
        spec: spec of the latent actions.
        rows: n, the expected number of entries.
        latents: names of the arrays `[n, k, d]`.
        dtypes: their allowed dtypes.
        columns: names and dtypes of the arrays `[n]`.

    Raises:
        UserError: an array is missing or has the wrong type or shape, or codes are not in the codebook.
    """
    for name in latents:
        require_array(file, name, arrays.get(name), (rows, spec.tokens, spec.token_dim), (*dtypes,))
    for name, dtype in columns.items():
        require_array(file, name, arrays.get(name), (rows,), (dtype,))
    if spec.codebook_size is None:
        return None
    codes = arrays.get("codes")
    require_array(file, "codes", codes, (rows, spec.tokens), ("int64",))
    assert codes is not None
    if codes.size and not 0 <= codes.min() <= codes.max() < spec.codebook_size:
        raise UserError(
            f"{file} must hold codes from 0 to {spec.codebook_size - 1}, got {codes.min()} to {codes.max()}. "
            f"Make the file again."
        )
    return codes


class Manifest(Record):
    """`manifest.json` of labels."""

    spec: SpecRecord
    data: dict[str, Any]
    digest: str
    rows: Annotated[int, Field(ge=0)]
    asked: dict[str, Any] = Field(default_factory=dict)


class TokensRecord(Record):
    """Metadata of a token file, and of the sidecar of a dataset with tokens."""

    spec: SpecRecord
    digest: str
    tokens: Literal["continuous", "vq"]
    camera: Text = ""


@dataclass(frozen=True, kw_only=True)
class Labels(LatentSequence):
    """Latent actions of every row of a store."""

    data: DataConfig
    """The labeled data."""


def write_labels(out: Path, labels: Labels, digest: str, provenance: dict[str, Any]) -> None:
    """Write labels of the frames with this content key atomically."""
    arrays = {"vectors": labels.vectors, "continuous": labels.continuous, "valid": labels.valid}
    if labels.codes is not None:
        arrays["codes"] = labels.codes
    with atomic_dir(out) as folder:
        write_arrays(folder / TOKENS, arrays, None)
        data = {**to_dict(labels.data), "path": absolute_name(labels.data.path)}
        manifest = {
            "spec": asdict(labels.spec),
            "data": data,
            "digest": digest,
            "rows": len(labels.valid),
        }
        write_json(folder / MANIFEST, manifest | provenance)


def read_labels(folder: str | Path) -> tuple[Labels, FrameStore]:
    """Read labels written by `write_labels`, and the store that they belong to.

    Raises:
        UserError: the folder has no labels, they are truncated, or the data has changed since.
    """
    folder = Path(folder)
    manifest, data = _read_manifest(folder)
    file = folder / TOKENS
    spec, (arrays, _) = manifest.spec.spec(), read_arrays(file)
    codes = check_arrays(file, arrays, spec, manifest.rows)
    labels = Labels(
        spec=spec,
        data=data,
        vectors=arrays["vectors"],
        continuous=arrays["continuous"],
        codes=codes,
        valid=arrays["valid"],
    )
    store = open_store(labels.data)
    if store.digest != manifest.digest or len(store.frames) != manifest.rows:
        raise UserError(
            f"{labels.data.path} has changed since {folder} was written. Delete the folder, and label it "
            "again."
        )
    return labels, store


def labeled_data(folder: str | Path) -> DataConfig:
    """Return the dataset that labels written by `write_labels` belong to.

    Raises:
        UserError: the folder has no labels.
    """
    return _read_manifest(Path(folder))[1]


def _read_manifest(folder: Path) -> tuple[Manifest, DataConfig]:
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{folder} holds no latent labels. "
            f"Make them with: latentact label --lam LAM --data DATA --out DIR."
        )
    manifest = read_record(Manifest, file)
    with naming(file):
        return manifest, from_dict(DataConfig, manifest.data, "data")


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """LAM tokens of every row of a dataset, in the order of its rows."""

    path: Path
    """The file."""
    tokens: Float32[np.ndarray, "n f"]
    """k * d values per row; zeros where `valid` is False."""
    codes: Int64[np.ndarray, "n k"] | None
    """Codebook indices, if the LAM has codes."""
    valid: Bool[np.ndarray, " n"]
    """Whether the row has a latent action."""
    episode_index: Int64[np.ndarray, " n"]
    """LeRobot's column of this name."""
    frame_index: Int64[np.ndarray, " n"]
    """LeRobot's column of this name."""
    spec: LatentActionSpec
    """Spec of the tokens."""
    digest: str
    """Content key of the encoded frames."""
    tokens_kind: str
    """continuous: before the quantizer; vq: after it."""
    metadata: Mapping[str, Any]
    """Metadata of the file."""

    def check_rows(self, episode_index: np.ndarray, frame_index: np.ndarray, dataset: str) -> None:
        """Raise a UserError unless these columns of a LeRobot dataset are those of the file."""
        if len(episode_index) != len(self.valid):
            raise UserError(
                f"{self.path} must have tokens for the {len(episode_index)} rows of {dataset}, got "
                f"{len(self.valid)}. Run latentact precompute on that dataset."
            )
        same = (self.episode_index == episode_index) & (self.frame_index == frame_index)
        if not same.all():
            row = int(np.argmin(same))
            raise UserError(
                f"{self.path} has tokens of a different dataset than {dataset}: row {row} must be frame "
                f"{frame_index[row]} of episode {episode_index[row]}, got frame {self.frame_index[row]} of "
                f"episode {self.episode_index[row]}. Run latentact precompute on it."
            )


def write_token_files(folder: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write `lam_tokens.safetensors` and `lam_tokens.pt` into a folder, each atomically.

    Args:
        folder: an existing folder.
        arrays: `latent_actions` float32 or float16 [n, k, d], `valid` bool [n], `episode_index` and
            `frame_index` int64 [n], and `codes` int64 [n, k] if the LAM has codes.
        metadata: JSON values; at least `spec`, `digest` and `tokens`.
    """
    for name in (TOKENS, TOKENS_PT):
        write_arrays(folder / name, arrays, metadata)


def read_token_file(path: str | Path, *, spec: LatentActionSpec | None = None) -> TokenFile:
    """Return the tokens of `latentact precompute --output file`.

    Args:
        path: `lam_tokens.safetensors`, `lam_tokens.pt`, or their folder.
        spec: expected spec of the tokens; None: any.

    Raises:
        UserError: the file is missing, truncated, in another format or from another LAM, or an array has the
            wrong type or shape.
    """
    path = Path(path)
    file = path / TOKENS if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{file} does not exist. Make it with: latentact precompute --output file --output-dir "
            f"{file.parent}."
        )
    arrays, metadata = read_arrays(file)
    if metadata is None:
        raise UserError(
            f"{file} must describe its tokens, got no metadata. Make it with latentact precompute."
        )
    about = parse_record(TokensRecord, metadata, str(file))
    found, n = about.spec.spec(), len(np.atleast_1d(arrays.get("valid", ())))
    codes = check_arrays(
        file,
        arrays,
        found,
        n,
        latents=("latent_actions",),
        dtypes=DTYPES,
        columns={"valid": "bool", "episode_index": "int64", "frame_index": "int64"},
    )
    if spec is not None:
        spec.check_compatible(found, "the expected LAM", str(file))
    return TokenFile(
        path=file,
        tokens=arrays["latent_actions"].astype(np.float32).reshape(n, -1),
        codes=codes,
        valid=arrays["valid"],
        episode_index=arrays["episode_index"],
        frame_index=arrays["frame_index"],
        spec=found,
        digest=about.digest,
        tokens_kind=about.tokens,
        metadata=metadata,
    )
