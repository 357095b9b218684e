"""Augmentation through real commands: the page of clips, a training, and settings without effect."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import ok, refused

NET = ("policy=bc", "policy.network.backbone=patch", "policy.network.channels=[8]", "data.resolution=32")
FEW = ("training.steps=2", "training.batch_size=4", "training.eval_every=0")


def test_the_page_has_clips_before_and_after(blocks: Path, tmp_path: Path) -> None:
    page = tmp_path / "preview.html"
    flags = ("--data", blocks, "--resolution", "32", "--clips", "2", "--out", page)
    ok("preview-augment", *flags, "--shift", "3", "--blur", "0.5")
    text = page.read_text()
    assert "shift=3 blur=0.5" in text
    assert len(re.findall(r'alt="clip \d"', text)) == 2
    assert re.findall(r'alt="(\w+=[\d.]+)"', text) == ["shift=3", "blur=0.5"]
    again = tmp_path / "again.html"
    ok("preview-augment", *flags[:-1], again, "--shift", "3", "--blur", "0.5")
    assert again.read_text().replace("again.html", "preview.html") == text
    assert "must change the frames, got none" in refused("preview-augment", *flags)


def test_trainings_take_the_settings(blocks: Path, tmp_path: Path) -> None:
    command = ("train-policy", f"data.path={blocks}", *NET, *FEW)
    ok(*command, f"out={tmp_path / 'a'}", "training.augment.shift=2", "training.augment.contrast=0.3")
    ok(*command, f"out={tmp_path / 'b'}")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] != weights[1]
    said = refused(*command, f"out={tmp_path / 'c'}", "training.augment.state_noise=0.1")
    assert "must not change the state, because only the frames" in said
    assert not (tmp_path / "c").exists()
    said = refused("ground", "policy=p", "labels=l", "training.augment.shift=2", f"out={tmp_path / 'd'}")
    assert "must be off without finetune_steps" in said
