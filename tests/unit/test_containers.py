"""The recipes in `containers/`, checked as text; no daemon is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "containers/build.sh"


def recipes(folder: Path, *image: str) -> tuple[str, str]:
    subprocess.run([BUILD, "recipes", *image], cwd=folder, check=True)
    return (folder / "latentact.def").read_text(), (folder / "latentact.enroot.sh").read_text()


def dockerfile() -> list[str]:
    text = (ROOT / "containers/Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_recipes_name_the_image_and_start_the_program(tmp_path):
    definition, script = recipes(tmp_path, "registry.example/latentact:1")
    assert definition.startswith("Bootstrap: docker-daemon\nFrom: registry.example/latentact:1\n")
    sections = re.findall(r"^%(\w+)", definition, re.MULTILINE)
    assert sections == ["environment", "runscript", "test", "help"]
    assert 'exec latentact "$@"' in definition
    assert '"dockerd://registry.example/latentact:1"' in script
    for text in (definition, script):
        assert "${" not in text
        assert "$image" not in text
    assert "From: latentact:latest" in recipes(tmp_path)[0]


def test_the_image_runs_as_an_ordinary_user_with_the_pinned_packages():
    lines = dockerfile()
    final = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert next(line for line in reversed(final) if line.startswith("USER ")) == "USER latentact"
    assert not any(line.startswith("RUN") for line in final[final.index("USER latentact") :])
    assert 'ENTRYPOINT ["latentact"]' in final
    installs = [line for line in lines if "uv pip install" in line]
    assert ["--requirement" in line for line in installs] == [True, False]
    assert "--no-deps" in installs[1]
    sent = set((ROOT / ".dockerignore").read_text().split())
    copied = {
        word
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert {f"!{name}" for name in copied} <= sent
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize(
    ("given", "arguments"),
    [({}, []), ({"BASE": "my/base"}, ["--build-arg", "BASE=my/base"])],
)
def test_build_starts_the_tool_that_is_installed(given, arguments, tmp_path):
    tool = tmp_path / "podman"
    tool.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/asked\n')
    tool.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("BASE", "TOOL")}
    subprocess.run([BUILD, "docker", "me/it:2"], env={**environment, "TOOL": str(tool), **given}, check=True)
    asked = (tmp_path / "asked").read_text().split("\n")
    expected = [
        "build",
        *arguments,
        "--file",
        str(BUILD.parent / "Dockerfile"),
        "--tag",
        "me/it:2",
        str(ROOT),
    ]
    assert asked[:-1] == expected


def test_build_without_its_tool_ends_with_one_sentence(tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("bash", "cat", "chmod", "dirname", "env"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    environment = {"PATH": str(tmp_path / "bin")}
    for kind in ("apptainer", "enroot", "docker"):
        done = subprocess.run(
            [BUILD, kind], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "build.sh needs one of" in done.stderr


def test_build_says_what_it_takes():
    done = subprocess.run([BUILD, "everything"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "docker|apptainer|enroot|recipes [IMAGE]" in done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_the_scripts_are_sound_shell(tmp_path):
    recipes(tmp_path)
    done = subprocess.run(
        ["shellcheck", BUILD, tmp_path / "latentact.enroot.sh"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
