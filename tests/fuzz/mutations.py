"""Mutations of files and values, drawn from a `random.Random` so that a seed and a number identify a case."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

DEEP = "@deep@"
"""Placeholder for JSON nested too deeply for parsers."""
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 7, 0.5, -0.5, 2**31, 2**63, 10**30, -(10**30), 1e300, -1e300, 1e-320),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        "x",
        "1",
        "nan",
        "../..",
        "../../etc/passwd",
        "/",
        "a/b",
    ),
    *("\0", "a\0b", "é\u202e", "x" * 5000, [], {}, [[]], [None], [1, 2, 3], {"a": 1}, {"kind": "x"}, DEEP),
)
"""Values that a field does not expect."""
NUMBERS = (
    *("-1", "0", "1e300", "-1e300", "nan", "inf", "-inf", "1" + "0" * 30, "-1" + "0" * 30, "x", "", "1e-320"),
    *(
        "2147483648",
        "9223372036854775808",
        "-9223372036854775809",
        "0.5",
        "-0.0",
        "1e-300",
        "1,5",
        "[1]",
        "null",
    ),
    *("true", "0x10", "1e400", "9" * 5000, " ", "\0", "18446744073709551616", "4294967296"),
)
"""Arguments in place of a number."""


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def mutate(rng: random.Random, file: Path, mark: Path) -> str:
    """Damage a file in place and return a description of the mutation.

    Args:
        rng: decides what.
        file: what to damage.
        mark: file that appears if something in the damaged file is executed.
    """
    known = _STRUCTURED.get(file.suffix)
    if known is not None and rng.random() < 0.7:
        return known(rng, file, mark)
    return rng.choice(_BYTES)(rng, file, mark)


def _flip(rng: random.Random, file: Path, __: Path) -> str:
    data = bytearray(file.read_bytes())
    # Headers decide more than weights do.
    end = min(len(data), rng.choice((64, 1024, len(data))))
    for _ in range(rng.choice((1, 4, 32)) if end else 0):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return "flip"


def _cut(rng: random.Random, file: Path, _: Path) -> str:
    data = file.read_bytes()
    end = rng.choice((rng.randint(0, len(data)), max(0, len(data) - 1), min(8, len(data))))
    file.write_bytes(data[:end])
    return f"cut to {end}"


def _insert(rng: random.Random, file: Path, _: Path) -> str:
    data, at = file.read_bytes(), 0
    at = rng.choice((0, len(data), rng.randint(0, len(data))))
    file.write_bytes(data[:at] + rng.randbytes(rng.choice((1, 7, 300))) + data[at:])
    return f"insert at {at}"


def _drop(rng: random.Random, file: Path, _: Path) -> str:
    data = file.read_bytes()
    at = rng.randint(0, len(data))
    file.write_bytes(data[:at] + data[at + rng.choice((1, 16)) :])
    return f"drop at {at}"


def _empty(_: random.Random, file: Path, __: Path) -> str:
    file.write_bytes(b"")
    return "empty"


def _missing(_: random.Random, file: Path, __: Path) -> str:
    file.unlink()
    return "missing"


def _folder(_: random.Random, file: Path, __: Path) -> str:
    file.unlink()
    file.mkdir()
    return "a folder"


def _pickle(_: random.Random, file: Path, mark: Path) -> str:
    torch.save(Evil(mark), file)
    return "a pickle"


_BYTES = (_flip, _flip, _cut, _insert, _drop, _empty, _missing, _folder, _pickle)


def alter(rng: random.Random, values: Any) -> tuple[Any, str]:
    """Return a copy of nested dicts and lists with one value changed, removed or added."""
    values = copy.deepcopy(values)
    places: list[tuple[Any, Any]] = []

    def walk(inside: Any) -> None:
        keys = (
            list(inside)
            if isinstance(inside, dict)
            else range(len(inside))
            if isinstance(inside, list)
            else ()
        )
        for key in keys:
            places.append((inside, key))
            walk(inside[key])

    walk(values)
    if not places or rng.random() < 0.03:
        odd = rng.choice(ODD)
        return copy.deepcopy(odd), f"all = {str(odd)[:20]!r}"
    inside, key = rng.choice(places)
    if rng.random() < 0.15:
        del inside[key]
        return values, f"without {key!r}"
    if rng.random() < 0.1:
        key = rng.choice(("strange", "", "kind", "..", "\0")) if isinstance(inside, dict) else key
    inside[key] = copy.deepcopy(rng.choice(ODD))
    return values, f"{key!r} = {str(inside[key])[:20]!r}"


def dump(values: Any) -> str:
    """Return JSON text, including invalid numbers and nesting that parsers reject."""
    return json.dumps(values).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)


def _json(rng: random.Random, file: Path, _: Path) -> str:
    values, what = alter(rng, json.loads(file.read_text()))
    file.write_text(dump(values), encoding="utf-8", errors="surrogatepass")
    return what


def _json_lines(rng: random.Random, file: Path, _: Path) -> str:
    lines = file.read_text().splitlines()
    if not lines:
        file.write_text("{}\n")
        return "one line"
    at = rng.randrange(len(lines))
    values, what = alter(rng, json.loads(lines[at]))
    lines[at] = dump(values)
    file.write_text("\n".join(lines) + "\n")
    return f"line {at}: {what}"


def _yaml(rng: random.Random, file: Path, _: Path) -> str:
    values, what = alter(rng, yaml.safe_load(file.read_text()))
    file.write_text(yaml.safe_dump(values, allow_unicode=True).replace(DEEP, "[" * 3000))
    return what


def _csv(rng: random.Random, file: Path, _: Path) -> str:
    rows = [line.split(",") for line in file.read_text().splitlines()]
    row = rng.choice(rows)
    at = rng.randrange(len(row))
    row[at] = rng.choice(NUMBERS).replace("\0", "\1")
    file.write_text("\n".join(map(",".join, rows)) + "\n")
    return f"a cell = {row[at][:20]!r}"


def _safetensors(rng: random.Random, file: Path, mark: Path) -> str:
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    about = header.get("__metadata__", {})
    if "latentact" in about and rng.random() < 0.7:
        values, what = alter(rng, json.loads(about["latentact"]))
        about["latentact"] = dump(values)
    elif rng.random() < 0.5:
        return _tensors(rng, file)
    else:
        header, what = alter(rng, header)
    text = dump(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return f"header: {what}"


def _tensors(rng: random.Random, file: Path) -> str:
    """Change the shape, dtype or values of one tensor in a valid file."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        about = opened.metadata()
    if not tensors:
        return "no tensors"
    name = rng.choice(sorted(tensors))
    tensors[name], what = odd_tensor(rng, tensors[name])
    if rng.random() < 0.15:
        del tensors[name]
        what = "gone"
    save_file(tensors, file, metadata=about)
    return f"{name}: {what}"


def odd_tensor(rng: random.Random, tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Return a tensor with another shape, dtype or values."""
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "a row less": lambda: tensor[:-1].clone() if tensor.ndim else tensor,
        "an axis more": lambda: tensor[None].clone(),
        "flat": lambda: tensor.reshape(-1).clone(),
        "of nothing": lambda: torch.zeros(0, dtype=tensor.dtype),
        "int64": lambda: tensor.nan_to_num().long() if tensor.is_floating_point() else tensor.long(),
        "float64": lambda: tensor.double(),
        "bfloat16": lambda: tensor.bfloat16(),
        "bool": lambda: tensor.bool(),
        "complex": lambda: tensor.to(torch.complex64),
        "NaN": lambda: torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 1),
        "huge": lambda: torch.full_like(tensor, 3e38 if tensor.dtype == torch.float32 else 1),
        "2**62": lambda: torch.full_like(tensor, 2**62 if tensor.dtype == torch.int64 else 1),
        "-1": lambda: torch.full_like(tensor, -1 if tensor.dtype.is_signed else 1),
    }
    what = rng.choice(sorted(makers))
    return makers[what]().contiguous(), what


def _pt(rng: random.Random, file: Path, mark: Path) -> str:
    values = torch.load(file, weights_only=True)
    where = rng.random()
    if where < 0.15:
        values["evil"], what = Evil(mark), "a pickle inside"
    elif where < 0.4:
        name = rng.choice(sorted(name for name in values if isinstance(values[name], torch.Tensor)))
        values[name], what = odd_tensor(rng, values[name])
        what = f"{name}: {what}"
    elif where < 0.9:
        values["metadata"], what = alter(rng, values["metadata"])
    else:
        values, what = alter(rng, dict.fromkeys(values, 0))
    torch.save(values, file)
    return what


def _npy(rng: random.Random, file: Path, mark: Path) -> str:
    array, what = _odd_array(rng, np.load(file), mark)
    with file.open("wb") as opened:
        np.save(opened, array)
    return what


def _npz(rng: random.Random, file: Path, mark: Path) -> str:
    with np.load(file) as opened:
        arrays = dict(opened)
    name = rng.choice(sorted(arrays))
    arrays[name], what = _odd_array(rng, arrays[name], mark)
    if rng.random() < 0.2:
        arrays.pop(name)
        what = "gone"
    kept: dict[str, Any] = arrays
    if rng.random() < 0.1:
        kept = {name: np.zeros(0)}
    np.savez(file, **kept)
    return f"{name}: {what}"


def _odd_array(rng: random.Random, array: np.ndarray, mark: Path) -> tuple[np.ndarray, str]:
    if rng.random() < 0.1:
        return np.array([Evil(mark)], object), "objects"
    if rng.random() < 0.1 or array.dtype.kind not in "biufc":
        return np.array(["x", "y"]), "texts"
    tensor, what = odd_tensor(rng, torch.from_numpy(np.array(array)))
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.half()
    return tensor.numpy(), what


def _zip(rng: random.Random, file: Path, _: Path) -> str:
    """Remove a member of an archive."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members.pop(rng.choice(sorted(members)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    file.write_bytes(buffer.getvalue())
    return "a member less"


_STRUCTURED: dict[str, Callable[[random.Random, Path, Path], str]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".csv": _csv,
    ".safetensors": _safetensors,
    ".pt": lambda rng, file, mark: (_pt if rng.random() < 0.9 else _zip)(rng, file, mark),
    ".npy": _npy,
    ".npz": lambda rng, file, mark: (_npz if rng.random() < 0.8 else _zip)(rng, file, mark),
}


def copy_of(source: Path, target: Path) -> Path:
    """Copy a file or a folder and return the copy."""
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target
