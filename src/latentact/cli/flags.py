"""Flags of a command, generated from its stage's dataclass: names, types, defaults, bounds, choices, help.

LeRobot's flag names (`--dataset.root`) are also translated here.
"""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from latentact.config import Between, OneOf, constraints, field_help
from latentact.errors import MIXTURE, UserError, did_you_mean, require_between
from latentact.io.records import read_yaml
from latentact.registry import Registry

SYNONYMS = {
    "dataset.repo_id": ("dataset_repo_id", "data", "path"),
    "dataset.root": ("dataset_root", "data", "path"),
    "policy.path": ("policy_path", "policy"),
    "output_dir": ("output_dir", "out"),
    "latents_path": ("guide",),
    "stroke": ("step_size",),
}
"""LeRobot's or an older flag name -> fields that it may set; a command uses the first that its stage has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """A field of a stage's dataclass, or of a nested dataclass, as a flag."""

    path: tuple[str, ...]
    """Field names on the path to it: `("batch_size",)`, `("data", "camera")`."""
    name: str
    """Name without leading dashes: `batch-size`."""
    kind: Any
    """Type: bool, int, float, str, one of these or None, or a tuple of strings."""
    default: Any
    """Default; `inspect.Parameter.empty` if the flag is required."""
    help: str
    """The string under the field."""
    constraint: Between | OneOf | None
    """Bounds of a number, or choices of a string."""

    @property
    def option(self) -> str:
        """The flag as typed: `--batch-size`, or `--render/--no-render` for a switch that is on by default."""
        return f"--{self.name}/--no-{self.name}" if self.default is True else f"--{self.name}"

    @property
    def identifier(self) -> str:
        """Name of the Python parameter."""
        name = self.name.replace("-", "_")
        return f"{name}_" if keyword.iskeyword(name) else name


def read_flags(config: type, names: Mapping[str, str], hidden: Iterable[str] = ()) -> list[Flag]:
    """Return the flags of a stage's dataclass; a nested dataclass is replaced by its flags.

    Args:
        config: the dataclass.
        names: field -> flag name, if different from the field's.
        hidden: fields without a flag.
    """
    flags = _flags_of(config, None, ())
    outer = {flag.path[0] for flag in flags if len(flag.path) == 1}
    return [
        dataclasses.replace(flag, name=names.get(flag.path[-1], flag.name))
        for flag in flags
        if flag.path[-1] not in hidden and (len(flag.path) == 1 or flag.path[-1] not in outer)
    ]


def _flags_of(config: type, default: Any, path: tuple[str, ...]) -> list[Flag]:
    """Return a flag for every field; defaults come from the instance `default`, or else from the class."""
    hints, texts, limits = typing.get_type_hints(config), field_help(config), constraints(config)
    flags: list[Flag] = []
    for field in dataclasses.fields(config):
        value = getattr(default, field.name) if default is not None else _default(field)
        here, hint = (*path, field.name), hints[field.name]
        if dataclasses.is_dataclass(hint):
            flags += _flags_of(
                typing.cast(type, hint), None if value is inspect.Parameter.empty else value, here
            )
            continue
        # The path of a dataset is named after the field that holds the dataset.
        name = path[-1] if path and field.name == "path" else field.name
        flags.append(
            Flag(
                path=here,
                name=name.replace("_", "-"),
                kind=hint,
                default=value,
                help=texts.get(field.name, ""),
                constraint=limits.get(field.name),
            )
        )
    return flags


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty


def parameter(flag: Flag, positional: bool) -> inspect.Parameter:
    """Return a flag as a parameter of a Typer command."""
    kind, default = flag.kind, flag.default
    options: dict[str, Any] = {"help": flag.help}
    if isinstance(flag.constraint, OneOf):
        known = flag.constraint.known()
        options["autocompletion"] = lambda incomplete: [name for name in known if name.startswith(incomplete)]
        if isinstance(flag.constraint.names, Registry):  # other values are possible: SUITE/LEVEL
            options["help"] += f" {flag.constraint.names.kind.capitalize()}s: {', '.join(known)}."
        else:
            options["metavar"] = "|".join(known)
    if typing.get_origin(kind) is tuple:
        kind, default = list[str] | None, None
    elif isinstance(flag.constraint, Between):
        options["callback"] = _check_between(flag.constraint)
    elif default is inspect.Parameter.empty:
        options["callback"] = _check_not_empty
    info: Any = typer.Argument(**options) if positional else typer.Option(flag.option, **options)
    return inspect.Parameter(
        flag.identifier,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, info],
    )


def _check_between(bounds: Between) -> Callable[[typer.CallbackParam, Any], Any]:
    def check(param: typer.CallbackParam, value: Any) -> Any:
        require_between(param.opts[0], value, bounds.low, bounds.high)
        return value

    return check


def _check_not_empty(param: typer.CallbackParam, value: str) -> str:
    """Raise a usage error for an empty name, which would mean the current folder."""
    if not value:
        raise UserError(f"{param.opts[0]} must not be empty. Give a name.")
    return value


def build_config(config: type, flags: Iterable[Flag], values: Mapping[str, Any]) -> Any:
    """Build the stage's dataclass from flag values by identifier."""
    given: dict[str, Any] = {}
    for flag in flags:
        value = values[flag.identifier]
        if typing.get_origin(flag.kind) is tuple:
            value = tuple(value or ())
        inside = given
        for name in flag.path[:-1]:
            inside = inside.setdefault(name, {})
        inside[flag.path[-1]] = value
    hints = typing.get_type_hints(config)
    return config(**{k: hints[k](**v) if isinstance(v, dict) else v for k, v in given.items()})


def translate_flags(arguments: list[str], flags: list[Flag], argument: str) -> list[str]:
    """Return the arguments with LeRobot's names, underscores, and flags for positional fields replaced.

    If data is a single flag, `--dataset.root` overrides `--dataset.repo_id`, as in LeRobot.

    Args:
        arguments: arguments after the command.
        flags: flags of the command.
        argument: positional fields; empty: none.
    """
    fields = {flag.path[0] if flag.name == flag.path[0] else flag.path[-1]: flag for flag in flags}
    targets = {
        synonym: fields[field]
        for synonym, names in SYNONYMS.items()
        if (field := next((name for name in names if name in fields), ""))
        and not isinstance(fields[field].constraint, OneOf)  # the kind of a policy is not a path
    }
    targets |= {name: fields[name] for name in argument.split() if name in fields}  # LAM or --lam LAM
    switches = {f"--{flag.name}": flag for flag in flags if flag.kind is bool}
    root, repo_id = targets.get("dataset.root"), targets.get("dataset.repo_id")
    typed = {word.partition("=")[0] for word in arguments}
    drop_repo_id = root is not None and root == repo_id and "--dataset.root" in typed
    translated: list[str] = []
    words = iter(arguments)
    for word in words:
        key, equals, value = word.partition("=")
        if key == "data.mixture" or value.startswith("data.mixture="):
            raise UserError(MIXTURE)
        name = (
            key.removeprefix("--").replace("output-dir", "output_dir").replace("latents-path", "latents_path")
        )
        target = targets.get(name) if key.startswith("--") else None
        if target is None:
            dashed = key.replace("_", "-") if key.startswith("--") else key
            switch = switches.get(dashed) if equals else None
            translated += _switch(switch, value) if switch else [f"{dashed}{equals}{value}"]
            continue
        value = value if equals else next(words, "")
        if name == "dataset.repo_id" and drop_repo_id:
            continue
        translated += [value] if target.path[-1] in argument.split() else [f"--{target.name}", value]
    return translated


def settings_as_flags(arguments: list[str], flags: list[Flag], stage: str) -> list[str]:
    """Replace KEY=VALUE by flags, and `experiment=NAME` by the flags of its file.

    The file is `conf/STAGE/experiment/NAME.yaml`; other arguments take precedence over it.

    Raises:
        UserError: there is no such experiment, or a switch is neither true nor false.
    """
    names = {flag.path[-1]: flag for flag in flags}
    words: list[str] = []
    for word in arguments:
        key, equals, value = word.removeprefix("--").partition("=")
        if equals and key == "experiment":
            words = [*(f"{k}={v}" for k, v in _experiment(stage, value).items()), *words]
        else:
            words.append(word)
    typed: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in names:
            typed.append(word)
        elif names[key].kind is not bool:
            typed.append(f"--{names[key].name}={value}")
        else:
            typed += _switch(names[key], value)
    return typed


def _switch(flag: Flag, value: str) -> list[str]:
    """Return a switch as it is typed for `true` or `false`; nothing if that is how it is off by default."""
    if value.lower() not in ("true", "false"):
        raise UserError(f"{flag.path[-1]} must be true or false, got {value!r}.")
    if value.lower() == "true":
        return [f"--{flag.name}"]
    return [f"--no-{flag.name}"] if flag.default is True else []


def _experiment(stage: str, name: str) -> dict[str, Any]:
    """Return the settings of an experiment of a stage."""
    folder = Path(__file__).parents[1] / "conf" / stage / "experiment"
    known = [path.stem for path in folder.glob("*.yaml")]
    if name not in known:
        raise UserError(f"unknown experiment {name!r}{did_you_mean(name, known)}")
    values = read_yaml(folder / f"{name}.yaml")
    assert isinstance(values, dict)
    return values


def translate_settings(arguments: list[str], config: type) -> list[str]:
    """Return the arguments of a Hydra command with LeRobot's flag names replaced by settings."""
    hints = typing.get_type_hints(config)
    targets = {"output_dir": "out"}
    if "data" in hints:
        targets |= {"dataset.root": "data.path", "dataset.repo_id": "data.path"}
    if hints.get("policy") is str:
        targets["policy.path"] = "policy"
    if "dry_run" in hints:
        arguments = ["dry_run=true" if word in ("--dry-run", "--dry_run") else word for word in arguments]
    rooted = any(word.startswith("--dataset.root") for word in arguments)
    translated: list[str] = []
    words = iter(arguments)
    for word in words:
        key, equals, value = word.partition("=")
        name = key.removeprefix("--").replace("output-dir", "output_dir")
        if not key.startswith("--") or name not in targets:
            translated.append(word)
            continue
        value = value if equals else next(words, "")
        if not (name == "dataset.repo_id" and rooted):
            translated.append(f"{targets[name]}={value}")
    return translated
