"""A run folder: `config.yaml` holds its settings, a result file marks it as finished.

`inputs.json` holds digests of what it learns from. If the setting `plan` names the episodes that are labeled,
`used_plan.json` is a copy of that file.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from latentact.config import current_names, from_dict, to_dict
from latentact.data.plan import PlanRecord
from latentact.errors import UserError
from latentact.io.atomic import atomic_write, read_object, write_json
from latentact.io.records import read_record, read_yaml
from latentact.training.inputs import input_digests

log = logging.getLogger(__name__)


_PLACES = {"out", "cluster", "devices", "num_nodes"}
"""Settings of where a run is executed; with other values it still resumes."""

_PLAN = "used_plan.json"
_INPUTS = "inputs.json"


class Busy(UserError):
    """Another process is using the run folder."""


def finished(out: Path, config: Any, result: str) -> bool:
    """Return whether a run folder already holds the `result` of this config; write nothing.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    check_settings(out, config)
    if not (out / result).exists():
        return False
    log.info("%s is already finished", out)
    return True


def check_settings(out: Path, config: Any) -> None:
    """Raise a UserError if the run folder holds a run with other settings or inputs, or is not a folder.

    Settings that the class of the config lists in `EXTENDS` may differ: each of their values has artifacts of
    its own.
    """
    path = out / "config.yaml"
    if path.exists():
        found = read_yaml(path)
        if not isinstance(found, dict):
            raise UserError(f"{path} must hold the settings of a run, got {found!r}; delete the folder.")
        found = _with_defaults(type(config), current_names(type(config), found))
        requested = _requested(config)
        for key in getattr(config, "EXTENDS", ()):
            found[key] = requested[key]
        if different := _first_difference(found, requested):
            key, old, new = different
            raise UserError(
                f"{out} holds a run with {key} = {old!r}, not {new!r}; "
                f"choose another out=, or delete the folder."
            )
        plan, used = _plan(config), out / _PLAN
        if plan and plan.is_file() and used.is_file():
            now, before = (read_record(PlanRecord, file) for file in (plan, used))
            if now != before:
                raise _changed(plan, out)
        _check_inputs(out, config)
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder with out=.")


def _check_inputs(out: Path, config: Any) -> None:
    """Raise a UserError if an input has changed since the run began; older releases recorded none."""
    file = out / _INPUTS
    if not file.is_file():
        return
    try:
        began = read_object(file)
    except UserError as error:
        raise UserError(f"{file} is damaged; delete it to resume without comparing inputs.") from error
    now = input_digests(config)
    for path in sorted(began.keys() & now.keys()):
        if began[path] != now[path]:
            raise _changed(path, out)


def _changed(path: str | Path, out: Path) -> UserError:
    return UserError(
        f"{path} has changed since the run in {out} began; choose another out=, or delete the folder."
    )


def discard_run(out: Path) -> None:
    """Delete a run folder, if there is one.

    Raises:
        UserError: the folder holds something else.
    """
    if (out / "config.yaml").is_file():
        shutil.rmtree(out)
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds no run to overwrite; choose another out=, or delete the folder.")


def begin_run(out: Path, config: Any) -> None:
    """Write `config.yaml`, plan and digests of inputs; call it after all of them have been checked."""
    if plan := _plan(config):
        with atomic_write(out / _PLAN) as partial:
            shutil.copyfile(plan, partial)
    if not (out / "config.yaml").exists():
        from lightning.pytorch.utilities.seed import isolate_rng

        with isolate_rng():  # libraries that are imported to read data draw random numbers
            inputs = input_digests(config)
        write_json(out / _INPUTS, inputs)
    with atomic_write(out / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(_requested(config), sort_keys=False))


@contextmanager
def run_folder(out: Path, config: Any) -> Generator[None]:
    """Begin a run; the body trains and writes the results.

    If the run raises a UserError before its first checkpoint, for example because it diverges, the folders
    that it created are removed.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        begin_run(out, config)
        yield
    except Busy:
        raise
    except UserError:
        if made and not saved_steps(out):
            shutil.rmtree(made[-1])
        raise


def saved_steps(out: Path) -> list[Path]:
    """Return the training checkpoints of a run folder."""
    return [path for path in out.glob("checkpoints/step=*") if path.name.removeprefix("step=").isdecimal()]


def _plan(config: Any) -> Path | None:
    """Return the file of the episodes to label, if the stage has one and it is given."""
    values = to_dict(config)
    return Path(values["plan"]) if values.get("plan") else None


def _requested(config: Any) -> dict[str, Any]:
    return {k: v for k, v in to_dict(config).items() if k != "out"}


def _with_defaults(cls: type, found: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run folder; settings newer than the run have their defaults."""
    place = {"out": ""} if "out" in {field.name for field in dataclasses.fields(cls)} else {}
    try:
        values = to_dict(from_dict(cls, {**found, **place}))
    except UserError:  # settings of a newer release, or damaged ones: the comparison names the first
        return found
    return {k: v for k, v in values.items() if k != "out"}


def _first_difference(found: Any, requested: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(found, dict) and isinstance(requested, dict):
        for name in {**requested, **found}:
            if name in _PLACES:
                continue
            path = f"{key}.{name}" if key else name
            if different := _first_difference(found.get(name), requested.get(name), path):
                return different
        return None
    return None if found == requested else (key, found, requested)
