"""`stage_command` and `hydra_command` turn a function that formats a stage's result into a command.

A stage is imported when its command runs, so that `latentact --help` imports none.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import typer
from typer.core import TyperCommand

from latentact.cli.flags import (
    Flag,
    build_config,
    parameter,
    read_flags,
    settings_as_flags,
    translate_flags,
    translate_settings,
)

app = typer.Typer(
    help="Robot policies from video without actions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="rich",
)
HYDRA = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
OVERWRITE = ("overwrite=true", "overwrite=false")
JSON_HELP = "Print the result as one line of JSON instead of text."


@dataclass(frozen=True, kw_only=True)
class FileCommand:
    """A command whose flags are the fields of its stage's dataclass."""

    name: str
    """Name of the command."""
    stage: str
    """Module in `latentact.stages`; its `run(config)` returns the result."""
    config: str
    """Name of the dataclass in that module."""
    show: Callable[[Any, Any], str]
    """Returns human-readable output: `show(config, result)`; its docstring is the help."""
    argument: str = ""
    """Positional fields in order, separated by spaces."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Field -> flag name, if different from the field's."""
    hidden: tuple[str, ...] = ()
    """Fields without a flag."""
    ok: Callable[[Any], bool] = lambda result: True
    """Whether a result counts as success."""
    failure: int = 2
    """Exit code otherwise."""

    @functools.cached_property
    def config_class(self) -> type:
        """The stage's dataclass; imports the stage."""
        return getattr(importlib.import_module(f"latentact.stages.{self.stage}"), self.config)

    @functools.cached_property
    def flags(self) -> list[Flag]:
        """The flags; imports the stage."""
        return read_flags(self.config_class, self.names, self.hidden)

    def run(self, as_json: bool, **values: Any) -> None:
        """Run the stage and print its result."""
        config = build_config(self.config_class, self.flags, values)
        result = importlib.import_module(f"latentact.stages.{self.stage}").run(config)
        print(json_line(self.name, result) if as_json else self.show(config, result))
        if not self.ok(result):
            raise typer.Exit(self.failure)


@dataclass(frozen=True, kw_only=True)
class HydraCommand:
    """A command that takes Hydra overrides."""

    stage: str
    """Module in `latentact.stages`; its `run(config, out)` returns the result."""
    config: str
    """Name of the dataclass in that module."""
    example: str
    """Command line shown by `--help`."""
    presets: tuple[str, ...]
    """Overrides that come first, except of settings that the command line names."""

    @property
    def config_class(self) -> type:
        """The stage's dataclass; imports the stage."""
        return getattr(importlib.import_module(f"latentact.stages.{self.stage}"), self.config)


@runtime_checkable
class JsonResult(Protocol):
    """A result whose JSON differs from its fields."""

    def to_json(self) -> Any:
        """Return what `--json` prints, as dicts, lists and scalars."""
        ...


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage returned, and how it is shown on the terminal; None: not at all."""

    value: Any
    show: Callable[[Any], str] | None

    def __str__(self) -> str:
        """Return the text for the terminal, which may be empty."""
        return self.show(self.value) if self.show else ""

    def to_json(self) -> Any:
        """Return the value as dicts, lists and scalars."""
        return _plain(self.value)


FILE_COMMANDS: dict[str, FileCommand] = {}
HYDRA_COMMANDS: dict[str, HydraCommand] = {}
"""Command -> its stage."""


class LazyCommand(TyperCommand):
    """A Typer command that imports its stage when it runs."""

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the arguments after the command."""
        assert self.name is not None
        command = FILE_COMMANDS[self.name]
        if not command.argument:
            args = settings_as_flags(args, command.flags, command.stage)
        args = translate_flags(args, command.flags, command.argument)
        return _built(self.name, self.help or "").make_context(info_name, args, parent=parent, **extra)


@functools.cache
def _built(name: str, text: str) -> Any:
    """Return the Typer command with the flags of its stage's dataclass."""
    command = FILE_COMMANDS[name]

    def run(**values: Any) -> None:
        command.run(**values)

    positional = {flag.path[-1]: flag.path[-1] in command.argument.split() for flag in command.flags}
    as_json = inspect.Parameter(
        "as_json",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option("--json", help=JSON_HELP)],
    )
    parameters = [parameter(flag, positional[flag.path[-1]]) for flag in command.flags]
    run.__signature__ = inspect.Signature([*parameters, as_json])  # type: ignore[attr-defined]
    run.__annotations__ = {}
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command(name=name, help=text)(run)
    return typer.main.get_command(single)


def stage_command(
    name: str,
    config: str,
    *,
    stage: str = "",
    argument: str = "",
    names: Mapping[str, str] | None = None,
    hidden: tuple[str, ...] = (),
    ok: Callable[[Any], bool] = lambda result: True,
    failure: int = 2,
) -> Callable[[Callable[[Any, Any], str]], Callable[[Any, Any], str]]:
    """Return a decorator that turns a function that formats a stage's result into a command.

    Args:
        name: name of the command.
        config: name of the stage's dataclass.
        stage: module of the stage; empty: the command's name.
        argument: see `FileCommand`.
        names: see `FileCommand`.
        hidden: see `FileCommand`.
        ok: see `FileCommand`.
        failure: see `FileCommand`.
    """

    def register(show: Callable[[Any, Any], str]) -> Callable[[Any, Any], str]:
        FILE_COMMANDS[name] = FileCommand(
            name=name,
            stage=stage or name.replace("-", "_"),
            config=config,
            show=show,
            argument=argument,
            names=names or {},
            hidden=hidden,
            ok=ok,
            failure=failure,
        )
        app.command(name=name, cls=LazyCommand, help=inspect.getdoc(show))(lambda: None)
        return show

    return register


def hydra_command(
    name: str,
    config: str,
    *,
    help: str,
    example: str,
    show: Callable[[Any], str] | None = None,
    stage: str = "",
    presets: tuple[str, ...] = (),
) -> None:
    """Add a command that takes Hydra overrides to `app`; `show` formats its result for people.

    Args:
        name: the command.
        config: the stage's dataclass.
        help: of the command.
        example: command line shown by `--help`.
        show: formats the result.
        stage: module of the stage; empty: the command's name.
        presets: see `HydraCommand`.
    """
    stage = stage or name.replace("-", "_")
    command = HydraCommand(stage=stage, config=config, example=example, presets=presets)
    HYDRA_COMMANDS[name] = command

    def run(context: typer.Context) -> None:
        from latentact.composition import run_stage

        module, cls = importlib.import_module(f"latentact.stages.{stage}"), command.config_class
        words = [word for word in context.args if word != "--json" and word not in OVERWRITE]
        given = {word.partition("=")[0] for word in words}
        words = [*(word for word in presets if word.partition("=")[0] not in given), *words]
        arguments = translate_settings(words, cls)
        overwrite = OVERWRITE[0] in context.args

        def finish(settings: Any, out: Path) -> StageResult:
            return StageResult(value=module.run(settings, out), show=show)

        def launch(settings: Any, out: Path) -> Any:
            if settings.only_plans:
                return finish(settings, out)
            if overwrite:
                from latentact.training.run_folder import discard_run

                discard_run(out)
            return settings.cluster.launch(name, finish, settings, out)

        results = run_stage(stage, cls, launch, arguments, f"{example} [--json]")
        if "--json" in context.args and results:
            print(json_line(name, results[0] if len(results) == 1 else {"runs": results}))
        else:
            for text in filter(None, map(str, results)):
                print(text)

    run.__annotations__ = {"context": typer.Context}
    app.command(name=name, context_settings=HYDRA, help=help)(run)


def json_line(command: str, result: Any) -> str:
    """Return the result of a command as one line of JSON: its name and the fields of the result."""
    content = _plain(result)
    content = content if isinstance(content, dict) else {"path": content}
    return json.dumps({"command": command, **content}, allow_nan=False)


def _plain(value: Any) -> Any:
    """Return a result as dicts, lists and scalars; paths are text."""
    if isinstance(value, JsonResult):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
