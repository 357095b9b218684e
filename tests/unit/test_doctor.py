"""`latentact doctor` says what works, what does not and what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import shutil
from collections import namedtuple

import pytest

from conftest import cli
from latentact.stages import doctor

Usage = namedtuple("Usage", "total used free")


def checks(check):
    return {each.name: each for each in check()}


def test_this_machine_works(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = cli("doctor", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert (result["command"], result["ok"]) == ("doctor", True)
    found = {check["name"]: check for check in result["checks"]}
    for name in ("python", "torch", "video", "latentact", "latentact[train]", "cache", "hub", "SLURM"):
        assert found[name]["status"] in ("ok", "warning"), found[name]
        assert found[name]["found"]
    assert {check["status"] for check in result["checks"]} <= {"ok", "warning", "error"}
    assert all(check["advice"] for check in result["checks"] if check["status"] != "ok")


@pytest.fixture
def only(monkeypatch):
    def choose(*names):
        monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in names})

    return choose


def test_a_broken_module_of_an_installed_extra_is_an_error(only, monkeypatch):
    import_module = importlib.import_module

    def broken(name, *rest):
        if name == "plotly":
            raise ImportError("libfoo.so.1: cannot open shared object file\nmore")
        return import_module(name, *rest)

    only("extras")
    monkeypatch.setattr(importlib, "import_module", broken)
    done = cli("doctor")
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("error")]
    assert "plotly cannot be imported (ImportError: libfoo.so.1: cannot open shared object file)" in line
    assert "pip install --upgrade 'latentact[report]'" in line
    assert done.stdout.splitlines()[-1] == "1 errors, 0 warnings"


def test_a_wrong_version_is_an_error_and_a_missing_extra_is_not(monkeypatch):
    version = importlib.metadata.version

    def changed(name):
        if name == "umap-learn":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "lightning" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", changed)
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    found = checks(doctor._extras)
    assert found["latentact[train]"].status == "error"
    assert "lightning 0.1, not <2.7,>=2.6" in found["latentact[train]"].found
    assert found["latentact[umap]"].status == "ok"
    assert found["latentact[umap]"].advice == "Install it: pip install 'latentact[umap]'"
    assert found["latentact"].status == "ok"


def test_a_full_or_closed_cache_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTACT_CACHE", str(tmp_path / "not/yet"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 99, 10**9))
    [check] = doctor._cache()
    assert (check.status, "1 GB free" in check.found) == ("warning", True)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    [check] = doctor._cache()
    assert check.status == "error"
    assert "LATENTACT_CACHE" in check.advice


def test_a_check_that_fails_is_a_line(only, monkeypatch):
    def fails():
        raise RuntimeError("the driver\nis gone")
        yield

    monkeypatch.setattr(doctor, "CHECKS", {"torch": fails})
    result = doctor.run(doctor.DoctorConfig())
    assert not result.ok
    [check] = result.checks
    assert (check.name, check.status, check.found) == ("torch", "error", "RuntimeError: the driver")


def test_a_hub_that_cannot_be_reached_is_a_warning(monkeypatch):
    import urllib.request

    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    [check] = doctor._hub()
    assert check.status == "warning"
    assert "HF_HUB_OFFLINE=1" in check.advice
