import os
from pathlib import Path

import numpy as np
import pytest

from latentact.data.cache import DataConfig, cache_folder
from latentact.errors import UserError
from latentact.stages import cache


def episodes(path, shade):
    np.savez(path, obs=np.full((4, 64, 64, 3), shade, np.uint8))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "cache")


def listed(folder, clear=""):
    return cache.run(cache.CacheConfig(data=DataConfig(path="", cache_dir=folder), clear=clear))


def test_an_empty_cache(folder):
    report = listed(folder)
    assert (report.folder, report.entries, report.bytes) == (Path(folder), (), 0)


def test_build_show_and_clear(tmp_path, folder):
    a, b = episodes(tmp_path / "a.npz", 1), episodes(tmp_path / "b.npz", 2)
    report = cache.run(cache.CacheConfig(data=DataConfig(path=a, cache_dir=folder)))
    (first,) = report.entries
    assert first.dataset == a
    assert (first.frames, first.resolution, first.camera, first.finished) == (4, "64x64", "", True)
    assert first.bytes > 4 * 64 * 64 * 3
    os.utime(Path(folder) / first.key / "used", (1, 1))
    report = cache.run(cache.CacheConfig(data=DataConfig(path=b, cache_dir=folder, resolution=32)))
    assert [entry.dataset for entry in report.entries] == [b, a]  # last used first
    assert [entry.resolution for entry in report.entries] == ["32x32", "64x64"]
    assert report.bytes == sum(entry.bytes for entry in report.entries)
    report = listed(folder, first.key[:8])
    assert [entry.key for entry in report.removed] == [first.key]
    assert [entry.dataset for entry in report.entries] == [b]
    assert not (Path(folder) / first.key).exists()
    report = listed(folder, "all")
    assert (len(report.removed), report.entries) == (1, ())
    assert not list(Path(folder).iterdir())


def test_an_unknown_key_is_one_sentence(tmp_path, folder):
    cache.run(cache.CacheConfig(data=DataConfig(path=episodes(tmp_path / "a.npz", 1), cache_dir=folder)))
    with pytest.raises(UserError, match="got 'zz', which matches 0"):
        listed(folder, "zz")


def test_an_interrupted_build_is_shown_and_cleared(folder):
    partial = Path(folder) / "abc.partial"
    partial.mkdir(parents=True)
    (partial / "frames").write_bytes(b"12345")
    (entry,) = listed(folder).entries
    assert (entry.key, entry.bytes, entry.finished) == ("abc", 5, False)
    assert listed(folder, "abc").entries == ()
    assert not partial.exists()


def test_where_the_cache_lies(monkeypatch):
    assert cache_folder("x") == Path("x")
    monkeypatch.setenv("LATENTACT_CACHE", "/y")
    assert cache_folder() == Path("/y")
    monkeypatch.delenv("LATENTACT_CACHE")
    assert cache_folder() == Path.home() / ".cache/latentact"
