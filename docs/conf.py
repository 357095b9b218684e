"""Sphinx configuration, and the pages that are generated: commands and Python API.

`make docs` builds the site without a network. Warnings, such as a link without a target, are errors.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config as NapoleonConfig
from sphinx.ext.napoleon import GoogleDocstring
from typer.main import get_command

import latentact
from latentact.cli import app
from latentact.cli.stage_command import FILE_COMMANDS, HYDRA_COMMANDS
from latentact.config import Between, OneOf
from latentact.overrides import choices, keys

project = "latentact"
copyright = "the latentact authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = "latentact"
html_static_path = html_css_files = ["site.css"]
html_show_sphinx = html_show_sourcelink = html_copy_source = False
default_role = "code"
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 90


def commands() -> Iterator[str]:
    """Yield the command reference in Markdown: every command with its settings, then the choices."""
    groups: dict[tuple[str, ...], type] = {}  # (group, *its options): a config that has it
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        text, _, example = re.sub(r"\s+", " ", command.help or "").partition(" Example")
        yield f"## `{name}`\n\n{text.replace(' Takes Hydra overrides; see --help.', '')}\n"
        if name in FILE_COMMANDS:
            examples = example.partition(": ")[2].split("; ")
            yield from ("```bash", *examples, "```\n")
            yield from flag_table(FILE_COMMANDS[name])
            continue
        hydra = HYDRA_COMMANDS[name]
        yield from ("```bash", hydra.example, "```\n")
        cls = hydra.config_class
        if hydra.stage != name.replace("-", "_"):
            yield f"Settings of [`{hydra.stage}`](#{hydra.stage}); presets: `{' '.join(hydra.presets)}`.\n"
            continue
        folder = Path(latentact.__path__[0], "conf", hydra.stage, "experiment")
        yield f"`experiment=` {', '.join(f'`{path.stem}`' for path in sorted(folder.glob('*.yaml')))}\n"
        local = dict(choices(cls))
        for group, registry in local.items():
            groups.setdefault((group, *registry.names()), cls)
        yield from setting_table(
            row for row in keys(cls) if row[0] in local or row[0].partition(".")[0] not in local
        )
    for (group, *options), cls in groups.items():
        for option in options:
            yield f"## `{group}={option}`\n"
            inner = (row for row in keys(cls, chosen={group: option}) if row[0].startswith(f"{group}."))
            yield from setting_table(inner)


def flag_table(command: Any) -> Iterator[str]:
    """Yield the table of a command's flags; positional arguments have no dashes."""
    yield "| flag | type | default | effect |\n| --- | --- | --- | --- |"
    for flag in command.flags:
        name = (
            flag.path[-1].upper()
            if flag.path[-1] in command.argument.split()
            else flag.option.replace("/", "`, `")
        )
        kind = inspect.formatannotation(flag.kind).replace("typing.", "")
        if isinstance(flag.constraint, OneOf):
            kind = " | ".join(flag.constraint.known())
        elif isinstance(flag.constraint, Between):
            low, high = flag.constraint.low, flag.constraint.high
            kind += f", at least {low:g}" if high >= 1e6 else f", {low:g} to {high:g}"
        required = flag.default is inspect.Parameter.empty
        default = "required" if required else "" if flag.default is False else code(str(flag.default))
        yield f"| `{name}` | {cell(kind)} | {default} | {cell(flag.help)} |"
    yield ""


def setting_table(rows: Any) -> Iterator[str]:
    """Yield the table of settings as `latentact.overrides.keys` lists them."""
    lines = [
        f"| `{key}` | {cell(kind)} | {default if default == 'required' else code(default)} | {cell(text)} |"
        for key, kind, default, text in rows
    ]
    yield from (
        ("| setting | type | default | effect |\n| --- | --- | --- | --- |", *lines, "")
        if lines
        else ("It has no settings.\n",)
    )


def code(text: str) -> str:
    """Return a default as code, or nothing for an empty one."""
    return f"`{text}`".replace("|", "\\|") if text else ""


def cell(text: str) -> str:
    """Return plain text for a cell of a table; code between backticks stays."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_<>\[\]$~])", r"\\\1", part) for part in parts
    ).replace("|", "\\|")


def api() -> Iterator[str]:
    """Yield the reference of all public names, from their docstrings."""
    yield "```{eval-rst}\n.. currentmodule:: latentact\n"
    for name in latentact.__all__:
        value = getattr(importlib.import_module(f"latentact.{latentact._WHERE[name]}"), name)
        yield (
            f".. autoclass:: {name}\n   :members:\n"
            if inspect.isclass(value)
            else f".. autofunction:: {name}\n"
        )
    yield "```"


def generate(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the placeholder of a generated page."""
    for page in (commands, api):
        mark = f"<!-- generated: {page.__name__} -->"
        if mark in source[0]:
            source[0] = source[0].replace(mark, "\n".join(page()))


def read_google_style(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Convert the sections of a docstring; a field has none, and napoleon would take "a: b" for its type."""
    if what not in ("attribute", "property"):
        lines[:] = GoogleDocstring(lines, NapoleonConfig(), app, what, name, obj, options).lines()


def setup(app: Sphinx) -> None:
    """Connect the generated pages."""
    app.connect("source-read", generate)
    app.connect("autodoc-process-docstring", read_google_style)
