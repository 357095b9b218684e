"""Dataclasses of settings: bounds, choices, help, current names, to and from plain dicts.

The frozen dataclass of a stage is the single source of defaults, types and help. A field created by `choice`
holds one of the entries of a registry, chosen by its key `kind`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Collection
from itertools import pairwise
from typing import Annotated, Any

from latentact.errors import UserError, did_you_mean, require_between
from latentact.registry import Registry

MISSING = "???"
"""Value of a required setting that has not been given, as in OmegaConf."""

LARGEST = 2**31 - 1
"""Maximum magnitude of a number in settings and flags."""


@dataclasses.dataclass(frozen=True)
class Between:
    """Minimum and maximum of a number, inclusive: `episodes: Annotated[int, Between(1, 100)]`."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Allowed values of a string: `mode: Annotated[str, OneOf(MODES)]`.

    With a registry of environment suites, SUITE/LEVEL is also allowed.
    """

    names: Collection[str] | Registry

    def known(self) -> list[str]:
        """Return the allowed values."""
        return self.names.names() if isinstance(self.names, Registry) else [*self.names]


Seed = Annotated[int, Between(0, LARGEST)]
Count = Annotated[int, Between(1, 10**9)]
Limit = Annotated[int, Between(0, 10**9)]
BatchSize = Annotated[int, Between(1, 1 << 16)]
Workers = Annotated[int, Between(0, 1024)]
Pixels = Annotated[int, Between(0, 4096)]
Fraction = Annotated[float, Between(0, 1)]
Rate = Annotated[float, Between(0, 10**6)]
Seconds = Annotated[float, Between(0, 10**6)]
"""Setting types shared by several stages."""


def constraints(cls: type) -> dict[str, Between | OneOf]:
    """Return the `Between` or `OneOf` in the type of each field of a dataclass, by field name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        name: constraint
        for name, hint in hints.items()
        for constraint in getattr(hint, "__metadata__", ())
        if isinstance(constraint, (Between, OneOf))
    }


def check_bounds(config: Any, prefix: str = "") -> None:
    """Raise a UserError unless every number of a dataclass is within the `Between` of its type."""
    for name, bounds in constraints(type(config)).items():
        if isinstance(bounds, Between):
            require_between(prefix + name, getattr(config, name), bounds.low, bounds.high)


def choice(registry: Registry, default: Any) -> Any:
    """Return a dataclass field for a config registered in `registry`.

    Args:
        registry: entries are config classes with a field `kind`, the registered name.
        default: name of the default entry, or a config.
    """
    named = isinstance(default, str)
    return dataclasses.field(
        default_factory=lambda: registry.get(default)() if named else default,
        metadata={"registry": registry, "default": default if named else default.kind},
    )


def to_dict(config: Any) -> Any:
    """Convert a config to plain dicts, lists and scalars."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [to_dict(v) for v in config] if isinstance(config, (tuple, list)) else config


def current_names(cls: type, values: Any) -> Any:
    """Return the settings of a config under their current names.

    A dataclass lists its renamed settings in `RENAMED`, old name -> current name, and in `REMOVED` those of
    earlier releases that have no effect any more.
    """
    if not isinstance(values, dict):
        return values
    values = _renamed(cls, values)
    return {key: current_names(_class_of(cls, key, value), value) for key, value in values.items()}


def updated(cls: type, values: Any) -> Any:
    """Convert settings of an earlier release to the current format; unknown settings stay unchanged."""
    try:
        return to_dict(from_dict(cls, values))
    except UserError:
        return values


def _renamed(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set[str]()
    renamed: dict[str, str] = getattr(cls, "RENAMED", {})
    removed = {*getattr(cls, "REMOVED", ())} - known
    return {renamed.get(key, key): value for key, value in values.items() if key not in removed}


def _class_of(cls: type, name: Any, value: Any) -> type:
    """Return the dataclass of a nested setting; `object` for any other setting."""
    field = (
        next((f for f in dataclasses.fields(cls) if f.name == name), None)
        if dataclasses.is_dataclass(cls)
        else None
    )
    if field is None or not isinstance(value, dict):
        return object
    if registry := field.metadata.get("registry"):
        kind = str(value.get("kind", field.metadata["default"]))
        return registry.get(kind) if kind in registry.names() else object
    return dataclass_in(typing.get_type_hints(cls)[field.name]) or object


def from_dict[T](cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build a config from the output of `to_dict`, including that of earlier releases.

    Raises:
        UserError: a key is unknown or a value is invalid; the message names the field.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where or 'the content'} must be a mapping of settings, got {values!r}.")
    values = _renamed(cls, values)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    built = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            raise UserError(f"unknown setting {path!r}{did_you_mean(key, known)}")
        if "registry" in known[key].metadata:
            value = _chosen(known[key].metadata["registry"], value, path)
        built[key] = _convert(hints[key], value, path)
    try:
        return cls(**built)
    except TypeError as error:
        raise UserError(f"incomplete settings{f' in {where}' if where else ''}: {error}.") from error


def field_help(cls: type) -> dict[str, str]:
    """Return field name -> docstring below the field, for the fields of a dataclass."""
    found = {}
    for base in cls.__mro__[-2:0:-1]:
        if dataclasses.is_dataclass(base):
            found |= field_help(base)
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    for field, text in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[typing.cast(ast.Name, field.target).id] = " ".join(str(text.value.value).split())
    return found


def _chosen(registry: Registry, values: Any, path: str) -> Any:
    if not isinstance(values, dict) or "kind" not in values:
        raise UserError(
            f"{path} must be a {registry.kind}, got {values!r}{did_you_mean(str(values), registry.names())}"
        )
    return from_dict(registry.get(str(values["kind"])), values, path)


def _convert(hint: Any, value: Any, path: str) -> Any:
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else _convert(typing.get_args(hint)[0], value, path)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        if not isinstance(value, dict):
            raise UserError(f"{path} must be a mapping of settings, got {value!r}.")
        return from_dict(typing.cast(type, hint), value, path)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if not isinstance(value, (list, tuple)) or (inner[-1] is not ... and len(value) != len(inner)):
            raise UserError(f"{path} must be a list{_numbered(inner)}, got {value!r}.")
        return tuple(_convert(inner[0], v, path) for v in value)
    if typing.get_origin(hint) is typing.Literal and value not in typing.get_args(hint):
        raise UserError(f"{path} must be {' or '.join(map(str, typing.get_args(hint)))}, got {value!r}.")
    if type(value) in (int, float) and hint in (int, float):
        if math.isnan(value):
            raise UserError(f"{path} must be a finite number, got nan.")
        require_between(path, value, -LARGEST, LARGEST)
        value = float(value) if hint is float else value
    if hint in (bool, int, float, str) and type(value) is not hint:
        raise UserError(f"{path} must be of type {hint.__name__}, got {value!r}.")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{path} must not contain NUL characters, got {value!r}.")
    return value


def _numbered(inner: tuple[Any, ...]) -> str:
    return "" if inner[-1] is ... else f" of {len(inner)} values"


def dataclass_in(hint: Any) -> type | None:
    """Return the dataclass X of a field annotated `X` or `X | None`; None for any other annotation."""
    options = [hint, *typing.get_args(hint)] if isinstance(hint, types.UnionType) else [hint]
    return next((typing.cast(type, h) for h in options if dataclasses.is_dataclass(h)), None)
