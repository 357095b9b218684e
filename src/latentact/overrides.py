"""Command lines of settings (KEY=VALUE): current names, flags, help and error messages."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from latentact.config import dataclass_in, field_help
from latentact.errors import MIXTURE, UserError, did_you_mean
from latentact.registry import Registry

log = logging.getLogger(__name__)

SPELLINGS = {
    "data.batch_size": "training.batch_size",
    "training.optimizer": "training",
    "smoke_test": "training.smoke_test",
    "wandb": "training.wandb",
    "lam.bottleneck.ema_decay": "lam.bottleneck.decay",
}
"""Names of settings or groups of settings on other projects' command lines -> ours."""


def _current_override(cls: type, override: str) -> str:
    """Return an override with current names; log a warning for each deprecated name."""
    key, equals, value = override.partition("=")
    roots = {field.name for field in dataclasses.fields(cls)}
    for other, ours in SPELLINGS.items():
        if ours.partition(".")[0] in roots and (key == other or key.startswith(f"{other}.")):
            key = ours + key.removeprefix(other)
    classes, names = [cls], []
    for name in key.split("."):
        renamed = next((c.RENAMED[name] for c in classes if name in getattr(c, "RENAMED", {})), name)
        names.append(renamed)
        fields = [(c, f) for c in classes if dataclasses.is_dataclass(c) for f in dataclasses.fields(c)]
        held = [(c, f) for c, f in fields if f.name == renamed]
        classes = [r.get(n) for _, f in held if (r := f.metadata.get("registry")) for n in r.names()]
        classes += [d for c, f in held if (d := dataclass_in(typing.get_type_hints(c).get(f.name)))]
    if (current := ".".join(names)) != key:
        log.warning("%s is deprecated; use %s", key, current)
    return f"{current}{equals}{value}"


def current_overrides(cls: type, words: list[str]) -> list[str]:
    """Return the command line with current names of settings.

    Raises:
        UserError: a group gets a value instead of the name of an option.
    """
    groups, nested = dict(choices(cls)), dict(nested_dataclasses(cls))
    for key, _, value in (word.partition("=") for word in words):
        if re.fullmatch(r"[-+.]?\d.*|true|false|\{.*", value, re.IGNORECASE):
            if key in nested:
                example = next(name for name, *_ in keys(cls) if name.startswith(f"{key}."))
                raise UserError(
                    f"{key} is a group of settings; set one of them, for example {example}=VALUE."
                )
            if key in groups:
                raise UserError(f"unknown {key} {value!r}{did_you_mean(value, groups[key].names())}")
    return [_current_override(cls, word) if "=" in word and word[0] != "-" else word for word in words]


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


def flags_last(argv: list[str]) -> list[str]:
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
    return [*map(quoted, overrides), *(word for word in argv if word not in overrides)]


def quoted(override: str) -> str:
    """Quote a plain value with an equals sign, or a path with braces, which Hydra cannot parse unquoted."""
    key, _, value = override.partition("=")
    plain = "=" in value and not set(value) & set("'\"()[]{}$\\")
    pattern = re.fullmatch(r"[^{\[('\"$\\]+\{[^'\"$\\]*", value)
    return f"{key}='{value}'" if plain or pattern else override


def choices(cls: type) -> Iterator[tuple[str, Registry]]:
    """Yield the fields that choose an entry of a registry, with their registries."""
    for field in dataclasses.fields(cls):
        if "registry" in field.metadata:
            yield field.name, field.metadata["registry"]


def nested_dataclasses(cls: type) -> Iterator[tuple[str, type]]:
    """Yield the fields that are dataclasses, with their classes."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "registry" not in field.metadata and (held := dataclass_in(hints[field.name])):
            yield field.name, held


def keys(
    cls: type, prefix: str = "", chosen: dict[str, str] | None = None, defaults: Any = None
) -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, help) of every setting; `chosen` maps groups to options."""
    hints, texts = typing.get_type_hints(cls), field_help(cls)
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        default = field.default_factory() if callable(field.default_factory) else field.default
        default = default if defaults is None else getattr(defaults, field.name)
        if registry := field.metadata.get("registry"):
            key = f"{name}.kind" if prefix else name
            option: str = (chosen or {}).get(key, "")
            if option not in registry.names():  # also an option of the user's own files
                option = field.metadata["default"]
            yield key, "|".join(registry.names()), option, texts.get(field.name, "")
            values = default if prefix and option == field.metadata["default"] else None
            inner = keys(registry.get(option), f"{name}.", chosen, values)
            yield from (setting for setting in inner if setting[0] != f"{name}.kind")
        elif nested := dataclass_in(hints[field.name]):
            values = None if default is dataclasses.MISSING else default
            yield from keys(nested, f"{name}.", chosen, values)
        else:
            kind = getattr(hints[field.name], "__name__", str(hints[field.name]))
            yield (
                name,
                kind,
                "required" if default is dataclasses.MISSING else str(default),
                texts.get(field.name, ""),
            )


def help_text(stage: str, cls: type, example: str, argv: list[str]) -> str:
    """Return the text of `--help`: settings with defaults and help, for the options chosen in `argv`."""
    lines = [f"Usage: latentact {stage.replace('_', '-')} [experiment=NAME] [KEY=VALUE ...]", ""]
    lines += [(inspect.getdoc(cls) or "").strip(), "", f"Example: {example}", ""]
    folder = Path(__file__).parent / "conf" / stage / "experiment"
    if folder.is_dir():
        lines += [f"Experiments: {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}", ""]
    lines += ["Settings:"]
    chosen = {key: value for key, _, value in (word.partition("=") for word in argv)}
    for key, kind, default, text in keys(cls, chosen=chosen):
        lines.append(f"  {key}={default}  ({kind})")
        lines += textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      ")
    lines += [
        "",
        *(f"{group}=NAME --help lists the settings of another {group}." for group, _ in choices(cls)),
        "overwrite=true deletes the run that the folder of out= holds, and begins anew.",
        "Hydra flags such as --multirun, --cfg job, --info and --shell-completion work; see --hydra-help.",
    ]
    return "\n".join(lines) + "\n"


def user_error(error: Exception, cls: type, words: list[str]) -> UserError:
    """Return the message for an error of Hydra, OmegaConf or YAML; `words` is the command line."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, yaml.YAMLError):
        return UserError(
            f"settings must be a YAML file, got one that cannot be read: {' '.join(str(error).split())}."
        )
    chosen = {key: value for key, _, value in (word.partition("=") for word in words)}
    file = re.match(r"In '([^/']+/[^']+)': ", str(error))
    return UserError(f"{f'{file[1]}.yaml: ' if file else ''}{_explain(error, cls, chosen)}")


def _item_type(cls: type, name: str) -> type | None:
    """Return the dataclass of this name whose instances a setting lists."""
    for hint in typing.get_type_hints(cls).values():
        for item in typing.get_args(hint):
            if dataclasses.is_dataclass(item) and getattr(item, "__name__", "") == name:
                return item
        if (held := dataclass_in(hint)) and (found := _item_type(held, name)):
            return found
    return None


def _explain(error: Exception, cls: type, chosen: dict[str, str]) -> str:
    """Convert a Hydra or OmegaConf error to a one-sentence message; `chosen` maps groups to options."""
    merging = "Error merging override" in str(error) and error.__cause__
    text, cause = str(merging or error), error.__cause__ or error
    text = re.sub(r"^In '[^']+': (?:\w+ raised while composing config:\s)?", "", text)
    stated = re.search(r"full_key: (\S+)", text)
    key = getattr(cause, "full_key", None) or getattr(error, "full_key", None) or (stated and stated[1])
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
        if name == "data.mixture":
            return MIXTURE
        if name in SPELLINGS:
            return f"unknown setting {name!r}; did you mean {SPELLINGS[name]!r}?"
        within = re.search(r"object_type=(\w+)", str(cause))
        if "." not in name and within and (item := _item_type(cls, within[1])):
            return f"unknown setting {name!r}{did_you_mean(name, (f.name for f in dataclasses.fields(item)))}"
        parts = name.split(".")
        same_level = {tuple(k.split(".")[: len(parts)]) for k, *_ in keys(cls, chosen=chosen)}
        siblings = {k for k in same_level if k[:-1] == tuple(parts[:-1])} or same_level
        return f"unknown setting {name!r}{did_you_mean(name, map('.'.join, siblings))}"
    if "Cannot merge" in text or "Merge error" in text:
        return "expected KEY: VALUE, with the settings of a group below its name. See docs/cluster.md."
    if "could not be converted to" in text:
        expected = text.rpartition("could not be converted to ")[2].split()[0]
        return f"{key} must be of type {expected}, got {text.split(chr(39))[1]!r}."
    if "is not a ListConfig" in text:
        return f"{key} must be a list, as in {key}=[VALUE], got a single value."
    if "Invalid type assigned" in text:
        nested = next(k for k, *_ in keys(cls, chosen=chosen) if k.startswith(f"{key}."))
        return f"{key} is a group of settings; set one of them, for example {nested}=VALUE."
    if override := getattr(error, "override", None):
        return f"{override!r} is not a setting; give KEY=VALUE, and quote values with special characters."
    if "Missing mandatory value" in text:
        return f"{key or text.rpartition(': ')[2]} is required; give it as KEY=VALUE on the command line."
    return f"{' '.join(text.partition('full_key')[0].split())}{f' ({key})' if key else ''}"
