"""Words that we avoid in names, comments, messages and documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AVOIDED = {
    "told": "code gets or receives values",
    "said": "code reports or returns; the text of an error is its message",
    "wanted": '"X must be ..., got ..."; the name is expected or target',
    "judge": "evaluate or score",
    "judges": "evaluates or scores",
    "judged": "evaluated or scored",
    "picture": "image or frame",
    "pictures": "images or frames",
    "moment": "timestep or time",
    "moments": "timesteps or times",
    "footage": "video or frames",
    "go on where": "resume",
    "goes on": "resumes or continues",
    "going on from": "resuming from",
    "same command again": "re-run the command",
    "whole or not at all": "atomically",
    "what is there": "the available data",
    "for ever": "forever",
    "says": "reports, shows or returns",
    "say so": "report it",
    "side by side": "next to each other, in parallel or alternately",
    "give such": "what to give",
    "give another": "choose another X",
}
"""Word or phrase -> what PyTorch, LeRobot and Gymnasium write instead."""
PLACES = ("src", "plugins", "benchmarks", "examples", "docs", "README.md", "CONTRIBUTING.md", "AGENTS.md")
SUFFIXES = {".py", ".md", ".yaml", ".toml", ".js", ".css", ".ipynb"}


def _pattern(words: str) -> str:
    """Match words in prose (also across the lines of a comment) and as a part of snake_case or CamelCase."""
    lower, capitalized, upper = (
        spelling.replace(" ", r"\s+(?:#\s+)?") for spelling in (words, words.capitalize(), words.upper())
    )
    return (
        rf"(?<![A-Za-z])(?:{lower}|{capitalized})(?![a-z])"
        rf"|(?<=[a-z]){capitalized}(?![a-z])"
        rf"|(?<![A-Za-z]){upper}(?![A-Za-z])"
    )


PATTERNS = {words: re.compile(_pattern(words)) for words in AVOIDED}


def _files() -> Iterator[Path]:
    for place in (ROOT / name for name in PLACES):
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.suffix in SUFFIXES and path.is_file():
                yield path


def _avoided_words(text: str) -> list[str]:
    """Return "line N: 'words': what to write" for every avoided word in a text."""
    found = [
        (text.count("\n", 0, match.start()) + 1, words)
        for words, pattern in PATTERNS.items()
        for match in pattern.finditer(text)
    ]
    lines = text.splitlines()
    return [
        f"line {line}: {words!r}: {AVOIDED[words]}"
        for line, words in sorted(found)
        if "renamed" not in lines[line - 1].lower()  # a table of former names
    ]


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in _files()])
def test_no_avoided_words(path: Path) -> None:
    found = _avoided_words(path.read_text())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "What it said.",
        "said_before = 1",
        "class LastSaid: ...",
        "MOMENT = 3",
        "it goes\n    # on where it stopped",
        "pictures",
    ],
)
def test_avoided_words_are_found(text: str) -> None:
    assert len(_avoided_words(text)) == 1


@pytest.mark.parametrize("text", ["momentum", "besaid", "depicture", "untold", "unwantedly", "a Saidi name"])
def test_parts_of_other_words_are_not_found(text: str) -> None:
    assert not _avoided_words(text)
