"""Dataclass -> Hydra schema, command line -> dataclass. The only file that uses Hydra.

The frozen dataclass of a stage is the single source of defaults, types and help. A field created by `choice`
is a Hydra config group whose options are the entries of a registry; inside an option its key `kind` chooses
(`lam.bottleneck.kind=vq`). Named experiments are the YAML files in `conf/<stage>/experiment`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import logging
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from latentact.errors import UserError, did_you_mean, require_between
from latentact.registry import Registry

if TYPE_CHECKING:
    from omegaconf import DictConfig


log = logging.getLogger(__name__)

MISSING = "???"
"""Value of a required setting that has not been given, as in OmegaConf."""

LARGEST = 2**31 - 1
"""Largest magnitude of a number in settings and flags."""


@dataclasses.dataclass(frozen=True)
class Between:
    """Smallest and largest value of a number, both allowed: `episodes: Annotated[int, Between(1, 100)]`."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Values that a text may have: `mode: Annotated[str, OneOf(MODES)]`.

    With a registry of environment suites a value may also be a suite, a slash and a level.
    """

    names: Collection[str] | Registry

    def known(self) -> list[str]:
        """Return the values."""
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
"""Types of settings that several stages have."""


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
    """Raise a UserError unless every number of a dataclass lies in the `Between` of its type."""
    for name, bounds in constraints(type(config)).items():
        if isinstance(bounds, Between):
            require_between(prefix + name, getattr(config, name), bounds.low, bounds.high)


def choice(registry: Registry, default: Any) -> Any:
    """Return a dataclass field for a config registered in `registry`.

    Args:
        registry: its entries are config classes with a field `kind`, their name.
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
    """Return the settings of a config with renamed settings under their current names.

    A dataclass lists its renamed settings in `RENAMED`, old name -> current name, and in `REMOVED` those that
    earlier releases wrote and that have no effect.
    """
    if not isinstance(values, dict):
        return values
    values = _renamed(cls, values)
    return {key: current_names(_class_of(cls, key, value), value) for key, value in values.items()}


def updated(cls: type, values: Any) -> Any:
    """Return settings that an earlier release wrote as this one writes them; unknown ones as they are."""
    try:
        return to_dict(from_dict(cls, values))
    except UserError:
        return values


def _renamed(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    renamed: dict[str, str] = getattr(cls, "RENAMED", {})
    removed = {*getattr(cls, "REMOVED", ())} - {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return {renamed.get(key, key): value for key, value in values.items() if key not in removed}


def _class_of(cls: type, name: Any, value: Any) -> type:
    """Return the dataclass of a setting with nested settings; `object` for any other setting."""
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
    return _dataclass_in(typing.get_type_hints(cls)[field.name]) or object


def _current_override(cls: type, override: str) -> str:
    """Return an override with current names; log a warning for each deprecated name."""
    key, equals, value = override.partition("=")
    classes, names = [cls], []
    for name in key.split("."):
        renamed = next((c.RENAMED[name] for c in classes if name in getattr(c, "RENAMED", {})), name)
        names.append(renamed)
        fields = [(c, f) for c in classes if dataclasses.is_dataclass(c) for f in dataclasses.fields(c)]
        held = [(c, f) for c, f in fields if f.name == renamed]
        classes = [r.get(n) for _, f in held if (r := f.metadata.get("registry")) for n in r.names()]
        classes += [d for c, f in held if (d := _dataclass_in(typing.get_type_hints(c).get(f.name)))]
    if (current := ".".join(names)) != key:
        log.warning("%s is deprecated; use %s", key, current)
    return f"{current}{equals}{value}"


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


def run_stage(
    stage: str, cls: type, run: Callable[[Any, Path], Any], argv: list[str], example: str
) -> list[Any]:
    """Run a stage as a Hydra application: `experiment=`, overrides, `--multirun`, `--cfg job`.

    Args:
        stage: name of the stage; its experiments are the files in `conf/<stage>/experiment`.
        cls: config of the stage; its field `out` is the run folder. Each job of a sweep runs in a subfolder.
        run: called as `run(config, out)`.
        argv: command-line arguments after the command.
        example: command line shown by `--help`.

    Returns:
        The result of `run` of each job; empty if nothing ran (`--help`, `--cfg job`).
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    if {"-h", "--help"} & set(argv):
        sys.stdout.write(_help(stage, cls, example, argv))
        return []
    _register(stage, cls)

    @hydra.main(version_base="1.3", config_path=f"pkg://latentact.conf.{stage}", config_name=stage)
    def app(composed: DictConfig) -> None:
        try:
            config = _decode(cls, composed)
            single = HydraConfig.get().mode == RunMode.RUN
            out = config.out if single else HydraConfig.get().runtime.output_dir
            if not out:
                raise UserError("out must be a folder, got an empty path. Give out=FOLDER.")
            results.append(run(config, Path(out).absolute()))
        except (UserError, OmegaConfBaseException) as error:  # the other jobs of a sweep continue
            failures.append(error)

    saved, saved_env = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [stage, *(_current_override(cls, word) if "=" in word else word for word in _flags_last(argv))]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failures: list[Exception] = []
    results: list[Any] = []
    try:
        app()
    except (HydraException, OmegaConfBaseException) as error:
        failures.append(error)
    finally:
        sys.argv = saved
        if saved_env is None:
            del os.environ["HYDRA_FULL_ERROR"]
    for error in failures:
        raise error if isinstance(error, UserError) else UserError(_explain(error, cls)) from error
    return results


SHORT_FLAGS = {
    "--hydra-help": "",
    "--version": "",
    "--cfg": "-c",
    "--resolve": "",
    "--package": "-p",
    "--run": "-r",
    "--info": "-i",
    "--multirun": "-m",
    "--shell-completion": "-sc",
    "--config-path": "-cp",
    "--config-name": "-cn",
    "--config-dir": "-cd",
    "--experimental-rerun": "",
}
"""Flags of Hydra and their short forms."""


def _flags_last(argv: list[str]) -> list[str]:
    """Move flags after the overrides, as Hydra requires.

    Raises:
        UserError: a flag is unknown to Hydra, or a number has too many digits for Python.
    """
    known = {*SHORT_FLAGS, *SHORT_FLAGS.values()}
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("-") and flag not in known:
            raise UserError(f"unknown flag {flag!r}; settings are KEY=VALUE{did_you_mean(flag, SHORT_FLAGS)}")
        if re.search(r"\d{1000}", word):
            raise UserError(f"{flag} must be a number of fewer than 1000 digits, got {len(word)} characters.")
    overrides = [word for word in argv if "=" in word and not word.startswith("-")]
    return [*map(_quoted, overrides), *(word for word in argv if word not in overrides)]


def _quoted(override: str) -> str:
    """Quote a plain value with an equals sign, or a path with braces, which Hydra cannot parse unquoted."""
    key, _, value = override.partition("=")
    plain = "=" in value and not set(value) & set("'\"()[]{}$\\")
    pattern = re.fullmatch(r"[^{\[('\"$\\]+\{[^'\"$\\]*", value)
    return f"{key}='{value}'" if plain or pattern else override


def load_experiment[T](stage: str, cls: type[T], overrides: list[str]) -> T:
    """Return the config that the command line of a stage composes from `overrides`.

    Raises:
        UserError: an override or an experiment is unknown or invalid.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    _register(stage, cls)
    try:
        with initialize_config_module(f"latentact.conf.{stage}", version_base="1.3"):
            return _decode(cls, compose(stage, [*map(_quoted, overrides)]))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, cls)) from error


def _register(stage: str, cls: type) -> None:
    """Register the schema of a stage and the options of its groups with Hydra."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for field in dataclasses.fields(cls):  # a group of this name from another stage hides the setting
        store.repo.pop(field.name, None)
    store.store(name=stage, node=_schema(cls, stage))
    for group, registry in _choices(cls):
        for name in registry.names():
            store.store(group=group, name=name, node=_schema(registry.get(name), None))


def _decode[T](cls: type[T], composed: DictConfig) -> T:
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(composed, resolve=True)
    values.pop("experiment", None)
    for group, registry in _choices(cls):
        if isinstance(option := values.get(group), dict):
            _keep_chosen(registry.get(str(option["kind"])), option, group)
    if missing := next(_missing(values), None):
        raise UserError(f"{missing} is required; give it as KEY=VALUE on the command line.")
    return from_dict(cls, values)


def _keep_chosen(cls: type, values: dict[str, Any], where: str) -> None:
    """Remove the settings of other kinds from the nested choices of a config.

    Raises:
        UserError: such a setting has another value than the default kind gives it.
    """
    for field in dataclasses.fields(cls):
        if not (registry := field.metadata.get("registry")):
            continue
        given, default = values[field.name], to_dict(field.default_factory())  # type: ignore[misc]
        chosen = {f.name for f in dataclasses.fields(registry.get(str(given["kind"])))}
        for name in [*given]:
            if name in chosen and given[name] != MISSING:
                continue
            if name not in chosen and given[name] not in (MISSING, default.get(name, MISSING)):
                key = f"{where}.{field.name}"
                raise UserError(
                    f"{key}.{name} has no effect with {key}.kind={given['kind']}, which has the settings "
                    f"{', '.join(sorted(chosen - {'kind'}))}."
                )
            del given[name]


def _missing(values: Any, key: str = "") -> Iterator[str]:
    """Yield the keys of required settings without a value."""
    if values == MISSING:
        yield key
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _missing(value, f"{key}.{name}" if key else name)


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


def _choices(cls: type) -> Iterator[tuple[str, Registry]]:
    for field in dataclasses.fields(cls):
        if "registry" in field.metadata:
            yield field.name, field.metadata["registry"]


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


def _schema(cls: type, stage: str | None) -> DictConfig:
    """Return the Hydra node of a config; `stage` is None for the option of a group."""
    from omegaconf import OmegaConf

    groups, hints = dict(_choices(cls)), typing.get_type_hints(cls)
    fields = [
        (f.name, hints[f.name], _schema_default(f, hints[f.name]))
        for f in dataclasses.fields(cls)
        if f.name not in groups
    ]
    if stage is None:
        fields += [
            (name, inner := _any_kind(cls, name), dataclasses.field(default_factory=inner)) for name in groups
        ]
    node = _thaw(OmegaConf.structured(dataclasses.make_dataclass(cls.__name__, fields)))
    if stage is None:
        return node
    root = OmegaConf.create(
        {"defaults": [*({g: _default(cls, g)} for g in groups), "_self_", {"experiment": None}]}
    )
    root.defaults += [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    root.update({k: node._get_node(k) for k in node})
    root.experiment = None
    sweep = {"dir": "${out}", "subdir": "${hydra.job.num}"}
    # The stage creates the run folder after it has validated its inputs.
    root.hydra = {"run": {"dir": "."}, "sweep": sweep, "output_subdir": None, "job": {"chdir": False}}
    return root


def _any_kind(cls: type, name: str) -> type:
    """Return a dataclass with the settings of all kinds of a nested choice."""
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    registry, default = field.metadata["registry"], field.default_factory()  # type: ignore[misc]
    hints: dict[str, Any] = {}
    for kind in registry.names():
        hints |= typing.get_type_hints(registry.get(kind))
    own = {f.name for f in dataclasses.fields(default)}
    return dataclasses.make_dataclass(
        f"{cls.__name__}.{name}",
        [(n, hints[n], getattr(default, n) if n in own else MISSING) for n in hints if n.islower()],
    )


def _default(cls: type, name: str) -> str:
    return next(f for f in dataclasses.fields(cls) if f.name == name).metadata["default"]


def _schema_default(field: dataclasses.Field, hint: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    if dataclasses.is_dataclass(hint):  # its required settings stay required
        return dataclasses.field(default_factory=lambda: hint)
    return MISSING


def _thaw(node: Any) -> Any:
    """Make the node of a frozen dataclass writable, so that overrides apply."""
    node._set_flag("readonly", None)
    for child in node._content.values() if isinstance(node._content, dict) else ():
        if isinstance(getattr(child, "_content", None), dict):
            _thaw(child)
    return node


def _keys(
    cls: type, prefix: str = "", chosen: dict[str, str] | None = None, defaults: Any = None
) -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, help) of every setting; `chosen` maps groups to options."""
    hints, texts = typing.get_type_hints(cls), field_help(cls)
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        default = field.default_factory() if callable(field.default_factory) else field.default
        if registry := field.metadata.get("registry"):
            key = f"{name}.kind" if prefix else name
            option: str = (chosen or {}).get(key) or field.metadata["default"]
            yield key, "|".join(registry.names()), option, texts.get(field.name, "")
            values = default if prefix and option == field.metadata["default"] else None
            yield from _keys(registry.get(option), f"{name}.", chosen, values)
        elif nested := _dataclass_in(hints[field.name]):
            yield from _keys(nested, f"{name}.", chosen)
        elif field.name != "kind":
            default = default if defaults is None else getattr(defaults, field.name)
            kind = getattr(hints[field.name], "__name__", str(hints[field.name]))
            yield (
                name,
                kind,
                "required" if default is dataclasses.MISSING else str(default),
                texts.get(field.name, ""),
            )


def _dataclass_in(hint: Any) -> type | None:
    """Return the dataclass X of a field annotated `X` or `X | None`; None for any other annotation."""
    options = [hint, *typing.get_args(hint)] if isinstance(hint, types.UnionType) else [hint]
    return next((typing.cast(type, h) for h in options if dataclasses.is_dataclass(h)), None)


def _help(stage: str, cls: type, example: str, argv: list[str]) -> str:
    lines = [f"Usage: latentact {stage.replace('_', '-')} [experiment=NAME] [KEY=VALUE ...]", ""]
    lines += [(inspect.getdoc(cls) or "").strip(), "", f"Example: {example}", ""]
    folder = Path(__file__).parent / "conf" / stage / "experiment"
    if folder.is_dir():
        lines += [f"Experiments: {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}", ""]
    lines += ["Settings:"]
    chosen = {key: value for key, _, value in (word.partition("=") for word in argv)}
    for key, kind, default, text in _keys(cls, chosen=chosen):
        lines.append(f"  {key}={default}  ({kind})")
        lines += textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      ")
    lines += [
        "",
        *(f"{group}=NAME --help lists the settings of another {group}." for group, _ in _choices(cls)),
        "Hydra flags such as --multirun, --cfg job, --info and --shell-completion work; see --hydra-help.",
    ]
    return "\n".join(lines) + "\n"


def _explain(error: Exception, cls: type) -> str:
    """Convert a Hydra or OmegaConf error to a one-sentence message."""
    merging = "Error merging override" in str(error) and error.__cause__
    text, cause = str(merging or error), error.__cause__ or error
    key = getattr(cause, "full_key", None) or getattr(error, "full_key", None)
    if "Could not find" in text and "'" in text:  # an option of a group
        group, _, name = text.split("Could not find '")[1].split("'")[0].rpartition("/")
        options = [
            line.strip()
            for line in text.partition("Available options")[2]
            .partition("Config search path")[0]
            .splitlines()[1:]
            if line.strip()
        ]
        return f"unknown {group or 'config'} {name!r}{did_you_mean(name, options)}"
    if "Could not override" in text or "is not in struct" in text or "not in '" in text:
        name = str(key) if key else text.split("'")[1]
        parts = name.split(".")
        same_level = {tuple(k.split(".")[: len(parts)]) for k, *_ in _keys(cls)}
        siblings = {k for k in same_level if k[:-1] == tuple(parts[:-1])} or same_level
        return f"unknown setting {name!r}{did_you_mean(name, map('.'.join, siblings))}"
    if "could not be converted to" in text:
        expected = text.rpartition("could not be converted to ")[2].split()[0]
        return f"{key} must be of type {expected}, got {text.split(chr(39))[1]!r}."
    if "is not a ListConfig" in text:
        return f"{key} must be a list, as in {key}=[VALUE], got a single value."
    if "Invalid type assigned" in text:
        nested = next(k for k, *_ in _keys(cls) if k.startswith(f"{key}."))
        return f"{key} is a group of settings; set one of them, for example {nested}=VALUE."
    if override := getattr(error, "override", None):
        return f"{override!r} is not a setting; give KEY=VALUE, and quote values with special characters."
    if "Missing mandatory value" in text:
        return f"{key or text.rpartition(': ')[2]} is required; give it as KEY=VALUE on the command line."
    return f"{' '.join(text.partition('full_key')[0].split())}{f' ({key})' if key else ''}"
