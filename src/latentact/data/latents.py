"""Latent actions of a dataset on disk: the labels of `latentact label`, the token files of `precompute`.

Labels are `lam_tokens.safetensors` and `manifest.json`, one row per row of the store: `vectors`, `continuous`
[n, k, d] float32, `codes` [n, k] int64 where the LAM has codes, `valid` [n] bool: False where an episode ends
before the frame gap. A token file is complete in itself and has one row per row of the dataset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64
from pydantic import Field

from latentact.config import from_dict, to_dict
from latentact.data.cache import DataConfig, FrameStore, open_store
from latentact.errors import UserError
from latentact.io.atomic import atomic_dir, atomic_write, write_json
from latentact.io.records import Record, naming, parse_record, read_record
from latentact.io.specs import SpecRecord, Text
from latentact.io.tensors import load_about, load_tensors, require_array, save_tensors, to_arrays
from latentact.io.unpickle import read_pickled
from latentact.types import LatentActionSpec

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
TOKENS = "lam_tokens.safetensors"
TOKENS_PT = "lam_tokens.pt"
DTYPES = ("float32", "float16")
TOKENS_KEY, CODES, VALID = "observation.lam_tokens", "observation.lam_codes", "observation.lam_valid"
"""Columns of a dataset."""
KINDS = {"continuous": "continuous", "vq": "vectors"}
"""What `--tokens` names -> field of `LatentActions`."""


class Manifest(Record):
    """`manifest.json` of labels."""

    spec: SpecRecord
    data: dict[str, Any]
    digest: str
    rows: Annotated[int, Field(ge=0)]
    asked: dict[str, Any] = Field(default_factory=dict)


class TokensRecord(Record):
    """What a token file, and the sidecar of a dataset with tokens, say about the tokens."""

    spec: SpecRecord
    digest: str
    tokens: Literal["continuous", "vq"]
    camera: Text = ""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Latent actions of every row of a store."""

    spec: LatentActionSpec
    """What they mean."""
    data: DataConfig
    """The data they belong to."""
    vectors: Float32[np.ndarray, "n k d"]
    """After the quantizer."""
    continuous: Float32[np.ndarray, "n k d"]
    """Before it."""
    codes: Int64[np.ndarray, "n k"] | None
    """Codebook indices."""
    valid: Bool[np.ndarray, "n"]
    """Whether the row has a latent action."""


def write_labels(out: Path, labels: Labels, digest: str, provenance: dict[str, Any]) -> None:
    """Write labels of the frames with this content key, whole or not at all."""
    import torch

    arrays = {"vectors": labels.vectors, "continuous": labels.continuous, "valid": labels.valid}
    if labels.codes is not None:
        arrays["codes"] = labels.codes
    with atomic_dir(out) as folder:
        save_tensors(folder / TOKENS, {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()})
        data = {**to_dict(labels.data), "path": str(Path(labels.data.path).absolute())}
        manifest = {
            "spec": asdict(labels.spec),
            "data": data,
            "digest": digest,
            "rows": len(labels.valid),
        }
        write_json(folder / MANIFEST, manifest | provenance)


def read_labels(folder: str | Path) -> tuple[Labels, FrameStore]:
    """Return labels that `write_labels` wrote, and the store they belong to.

    Raises:
        UserError: the folder holds no labels, they are truncated, or the data has changed since.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} holds no latent labels; "
            f"make them with: latentact label --lam LAM --data DATA --out DIR."
        )
    file = folder / TOKENS
    manifest = read_record(Manifest, folder / MANIFEST)
    with naming(folder / MANIFEST):
        data = from_dict(DataConfig, manifest.data, "data")
    spec, arrays = manifest.spec.spec(), to_arrays(load_tensors(file), file)
    n, shape = manifest.rows, (manifest.rows, spec.tokens, spec.token_dim)
    for name in ("vectors", "continuous"):
        require_array(file, name, arrays.get(name), shape, ("float32",))
    require_array(file, "valid", arrays.get("valid"), (n,), ("bool",))
    labels = Labels(
        spec=spec,
        data=data,
        vectors=arrays["vectors"],
        continuous=arrays["continuous"],
        codes=require_codes(file, arrays, spec, n),
        valid=arrays["valid"],
    )
    store = open_store(labels.data)
    if store.digest != manifest.digest or len(store.frames) != n:
        raise UserError(f"{labels.data.path} is not the data that {folder} labels any more; label it again.")
    return labels, store


def require_codes(
    path: Path, arrays: Mapping[str, np.ndarray], spec: LatentActionSpec, rows: int
) -> Int64[np.ndarray, "n k"] | None:
    """Return the codes that a file holds; None where latent actions have none.

    Raises:
        UserError: they are missing, of another shape, or no entries of the codebook.
    """
    if spec.codebook_size is None:
        return None
    codes = arrays.get("codes")
    require_array(path, "codes", codes, (rows, spec.tokens), ("int64",))
    assert codes is not None
    if codes.size and not 0 <= codes.min() <= codes.max() < spec.codebook_size:
        raise UserError(
            f"{path} must hold codes from 0 to {spec.codebook_size - 1}, got {codes.min()} to {codes.max()}; "
            f"make the file again."
        )
    return codes


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """LAM tokens of every row of a dataset, in the order of its rows."""

    path: Path
    """Where they were read."""
    tokens: Float32[np.ndarray, "n f"]
    """k * d numbers per row; zeros where `valid` is False."""
    codes: Int64[np.ndarray, "n k"] | None
    """Codebook indices, where the LAM has codes."""
    valid: Bool[np.ndarray, " n"]
    """Whether the row has a latent action."""
    episode_index: Int64[np.ndarray, " n"]
    """LeRobot's column of this name."""
    frame_index: Int64[np.ndarray, " n"]
    """LeRobot's column of this name."""
    spec: LatentActionSpec
    """What the tokens mean."""
    digest: str
    """Content key of the frames that they were computed from."""
    tokens_kind: str
    """continuous: before the quantizer; vq: after it."""
    metadata: Mapping[str, Any]
    """All that the file says about itself."""

    def refuse_other_rows(self, episode_index: np.ndarray, frame_index: np.ndarray, dataset: str) -> None:
        """Raise a UserError unless these are the rows of a dataset, by LeRobot's columns of these names."""
        if len(episode_index) != len(self.valid):
            raise UserError(
                f"{self.path} has tokens for {len(self.valid)} rows and {dataset} has {len(episode_index)}; "
                f"run latentact precompute on that dataset."
            )
        same = (self.episode_index == episode_index) & (self.frame_index == frame_index)
        if not same.all():
            row = int(np.argmin(same))
            raise UserError(
                f"{self.path} has tokens of another dataset than {dataset}: row {row} is frame "
                f"{self.frame_index[row]} of episode {self.episode_index[row]} there and frame "
                f"{frame_index[row]} of episode {episode_index[row]} here; run latentact precompute on it."
            )


def write_token_files(folder: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write `lam_tokens.safetensors` and `lam_tokens.pt` into a folder, each whole or not at all.

    Args:
        folder: where they go; it exists.
        arrays: `latent_actions` float32 or float16 [n, k, d], `valid` bool [n], `episode_index` and
            `frame_index` int64 [n], and `codes` int64 [n, k] where the LAM has codes.
        metadata: json; at least `spec`, `digest` and `tokens`.
    """
    import torch
    from safetensors.torch import save_file

    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    text = json.dumps(metadata)
    with atomic_write(folder / TOKENS) as partial:
        save_file(tensors, partial, metadata={"latentact": text})
        partial.chmod(0o644)
    with atomic_write(folder / TOKENS_PT) as partial, partial.open("wb") as file:
        torch.save({**tensors, "metadata": json.loads(text)}, file)


def read_token_file(path: str | Path, *, spec: LatentActionSpec | None = None) -> TokenFile:
    """Return the tokens that `latentact precompute --output file` wrote.

    Args:
        path: `lam_tokens.safetensors`, `lam_tokens.pt`, or the folder they are in.
        spec: what the tokens must mean; None: anything.

    Raises:
        UserError: the file is missing, truncated, something else, of a wrong type or shape, or of another
            LAM.
    """
    path = Path(path)
    file = path / TOKENS if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{file} is missing; make it with: latentact precompute --output file --output-dir {file.parent}."
        )
    tensors, metadata = load_described(file)
    if metadata is None:
        raise UserError(
            f"{file} does not say what its tokens mean; make a token file with latentact precompute."
        )
    about = parse_record(TokensRecord, metadata, str(file))
    found, arrays = about.spec.spec(), to_arrays(tensors, file)
    n, k, d = len(tensors.get("valid", ())), found.tokens, found.token_dim
    require_array(file, "valid", arrays.get("valid"), (n,), ("bool",))
    require_array(file, "latent_actions", arrays.get("latent_actions"), (n, k, d), DTYPES)
    for name in ("episode_index", "frame_index"):
        require_array(file, name, arrays.get(name), (n,), ("int64",))
    if spec is not None:
        spec.check_compatible(found, "the LAM that is wanted", str(file))
    return TokenFile(
        path=file,
        tokens=arrays["latent_actions"].astype(np.float32).reshape(n, -1),
        codes=require_codes(file, arrays, found, n),
        valid=arrays["valid"],
        episode_index=arrays["episode_index"],
        frame_index=arrays["frame_index"],
        spec=found,
        digest=about.digest,
        tokens_kind=about.tokens,
        metadata=metadata,
    )


def load_described(file: Path) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a `.safetensors` or `.pt` file and what it says about them; None: nothing.

    Raises:
        UserError: the file is missing, truncated or something else; nothing in it is executed.
    """
    import torch

    if file.suffix != ".pt":
        return load_tensors(file), load_about(file)
    if not file.is_file():
        raise UserError(f"{file} is missing; give the file that an earlier command wrote.")
    values = read_pickled(file)
    tensors = {str(name): value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return tensors, values.get("metadata")
