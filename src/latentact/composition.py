"""Dataclass -> Hydra schema, command line -> dataclass. The only file that uses Hydra.

The frozen dataclass of a stage is the single source of defaults, types and help. A field created by `choice`
is a Hydra config group whose options are the entries of a registry; inside an option its key `kind` chooses
(`lam.bottleneck.kind=vq`). A field that is a dataclass is a group, too: its options are YAML files with
differences from the defaults, in `conf/<stage>/<field>` (`data=openx_webdataset`) and in the user's
`--config-dir`. Experiments, in `conf/<stage>/experiment`, do the same for all settings together.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from latentact.config import MISSING, from_dict, to_dict
from latentact.errors import UserError
from latentact.overrides import (
    choices,
    current_overrides,
    flags_last,
    help_text,
    nested_dataclasses,
    quoted,
    user_error,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


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
        sys.stdout.write(help_text(stage, cls, example, argv))
        return []
    _register(stage, cls)

    process = os.getpid()

    @hydra.main(version_base="1.3", config_path=f"pkg://latentact.conf.{stage}", config_name=stage)
    def app(composed: DictConfig) -> None:
        try:
            config = _decode(cls, composed)
            single = HydraConfig.get().mode == RunMode.RUN
            out = config.out if single else HydraConfig.get().runtime.output_dir
            if not out:
                raise UserError("out must be a folder, got an empty path. Give out=FOLDER.")
            results.append(run(config, Path(out).absolute()))
        except (UserError, OmegaConfBaseException) as error:
            if os.getpid() != process:  # a launcher runs this job elsewhere and returns the error
                raise user_error(error, cls, argv) from None
            failures.append(error)  # the other jobs of a sweep continue

    saved, saved_env = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [stage, *current_overrides(cls, flags_last(argv))]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failures: list[Exception] = []
    results: list[Any] = []
    try:
        app()
    except (UserError, HydraException, OmegaConfBaseException, YAMLError) as error:
        failures.append(error)
    finally:
        sys.argv = saved
        if saved_env is None:
            del os.environ["HYDRA_FULL_ERROR"]
    for error in failures:
        raise user_error(error, cls, argv) from error
    return results


def job_settings() -> list[str]:
    """Return the overrides of the running job, including the sweep values of a multirun job."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    folders = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    return [*hydra.overrides.task, *(f"--config-dir={Path(folder).absolute()}" for folder in folders)]


def load_experiment[T](stage: str, cls: type[T], overrides: list[str]) -> T:
    """Return the config that a stage composes from `overrides`.

    Raises:
        UserError: an override or an experiment is unknown or invalid.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    _register(stage, cls)
    try:
        with initialize_config_module(f"latentact.conf.{stage}", version_base="1.3"):
            return _decode(cls, compose(stage, current_overrides(cls, [*map(quoted, overrides)])))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise user_error(error, cls, overrides) from error


def _register(stage: str, cls: type) -> None:
    """Register the schema of a stage and the options of its groups with Hydra."""
    from hydra.core.config_store import ConfigStore

    repository = ConfigStore.instance().repo
    for field in dataclasses.fields(cls):  # a group of this name from another stage hides the setting
        repository.pop(field.name, None)
    repository.update(_stored(stage, cls, tuple(_kinds(cls))))


def _kinds(cls: type) -> Iterator[tuple[str, type]]:
    """Yield the options of the groups of a config, and of the groups of its options."""
    for group, registry in choices(cls):
        for name in registry.names():
            yield group, registry.get(name)
            yield from _kinds(registry.get(name))


@functools.cache
def _stored(stage: str, cls: type, kinds: tuple[tuple[str, type], ...]) -> dict[str, Any]:
    """Return what Hydra's store holds for a stage, by name; `kinds` makes it anew when an option is added."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name=stage, node=_schema(cls, stage))
    for group, registry in choices(cls):
        for name in registry.names():
            store.store(group=group, name=name, node=_schema(registry.get(name), None))
    return {name: store.repo[name] for name in (f"{stage}.yaml", *dict(choices(cls)))}


def _decode[T](cls: type[T], composed: DictConfig) -> T:
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(composed, resolve=True)
    if values.pop("experiment", None) is not None:
        raise UserError(
            "a file of an experiment must begin with the line `# @package _global_`, got one without it. Its "
            "settings would have no effect."
        )
    for group, registry in choices(cls):
        if isinstance(option := values.get(group), dict):
            _keep_chosen(registry.get(str(option["kind"])), option, group)
    if missing := next(_missing(values), None):
        raise UserError(f"{missing} is required; give it as KEY=VALUE on the command line.")
    return from_dict(cls, values)


def _keep_chosen(cls: type, values: dict[str, Any], where: str) -> None:
    """Remove the settings of other kinds from the nested choices of a config; warn if any was given."""
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
                log.warning(
                    "%s.%s has no effect with %s.kind=%s, which has the settings %s",
                    *(key, name, key, given["kind"], ", ".join(sorted(chosen - {"kind"}))),
                )
            del given[name]


def _missing(values: Any, key: str = "") -> Iterator[str]:
    """Yield the keys of required settings without a value."""
    if values == MISSING:
        yield key
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _missing(value, f"{key}.{name}" if key else name)


def _schema(cls: type, stage: str | None) -> DictConfig:
    """Return the Hydra node of a config; `stage` is None for the option of a group."""
    from omegaconf import OmegaConf

    groups, hints = dict(choices(cls)), typing.get_type_hints(cls)
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
    nested = dict(nested_dataclasses(cls))
    options = [*({g: _default(cls, g)} for g in groups), "_self_", *({name: None} for name in nested)]
    root = OmegaConf.create({"defaults": [*options, {"experiment": None}]})
    root.defaults += [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    root.update({k: node._get_node(k) for k in node})
    root.experiment = None
    for name, held in nested.items():
        for setting, source in getattr(held, "FOLLOWS", {}).items():
            if source.partition(".")[0] in groups:
                root[name][setting] = f"${{{source}}}"
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
