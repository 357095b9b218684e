"""The report in a real browser: it draws, it plays, it fits a phone, and it asks the network for nothing."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from latentact.evaluation.policy.comparison import Row
from latentact.evaluation.policy.rollout import success_interval
from latentact.io.video_writer import write_video
from latentact.reporting.comparison_plot import write_comparison
from latentact.stages.report import ReportConfig, run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "demo"
    lam = folder / "lam"
    lam.mkdir(parents=True)
    rng = np.random.default_rng(0)
    probe = {"score": 0.5, "metric": "r2", "ci95": [0.4, 0.6]}
    names = ("latent_linear", "latent_mlp", "state_only", "shuffled_future")
    errors = {"recon_mse": 0.001, "copy_mse": 0.05, "shuffled_mse": 0.03}
    numbers = {**errors, "probes": dict.fromkeys(names, probe), "codebook": None, "warnings": []}
    (lam / "lam.json").write_text(json.dumps(numbers))
    (lam / "metrics.csv").write_text("step,train/loss,val/loss\n0,1,1\n10,0.5,0.6\n")
    frames = rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    np.savez(
        lam / "lam.npz",
        vectors=rng.normal(size=(50, 4)),
        episode=np.arange(50) // 10,
        time=np.arange(50) % 10 / 10,
        action=rng.normal(size=(50, 2)),
        **dict.fromkeys(("now", "next", "predicted"), frames[:2]),
        transfer_source=frames[:4].reshape(2, 2, 64, 64, 3),
        transfer_start=frames[:6],
        transfer_grid=np.stack([frames, frames]),
    )
    rows = []
    for method in ("latent", "bc_k"):
        rollout = {"episodes": 4, "success": 0.5, "return": 0.5, "successes": [1, 0, 1, 0]}
        rollout["ci95"] = success_interval(rollout["successes"])
        (folder / method).mkdir()
        write_video(folder / method / "episode_000.mp4", frames, 5.0)
        (folder / method / "rollout.json").write_text(json.dumps(rollout))
        rows.append(Row.from_json({**rollout, "method": method, "k": 5, "seed": 0, "run": method}))
    write_comparison(folder, "toy", rows)
    return run(ReportConfig(run_dir=str(folder))).html


def browse(page, tmp_path, *arguments):
    profile = f"--user-data-dir={tmp_path}"
    command = (BROWSER, *QUIET, profile, "--virtual-time-budget=5000", *arguments, page.as_uri())
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_charts_are_drawn_videos_load_and_nothing_is_requested(page, tmp_path):
    watched = page.with_name("watched.html")
    watched.write_text(
        page.read_text().replace(
            "</body>",
            "<script>addEventListener('load', () => setTimeout(() => { const root = document.documentElement;"
            "root.dataset.wide = root.scrollWidth - innerWidth;"
            "root.dataset.requests = performance.getEntriesByType('resource').map((e) => e.name)"
            ".filter((name) => !name.startsWith('data:')).length;"
            "const films = [...document.querySelectorAll('video')];"
            "root.dataset.films = films.map((film) => film.videoWidth + ':' + film.error);"
            "}, 1500))</script></body>",
        )
    )
    dom = browse(watched, tmp_path, "--window-size=500,900", "--dump-dom")
    root = re.search(r"<html[^>]*>", dom).group()
    assert 'data-charts="2"' in root  # the map and the one learning curve
    assert re.search(r'data-films="[1-9]\d*:null,[1-9]\d*:null"', root)
    assert 'data-requests="0"' in root
    assert int(re.search(r'data-wide="(-?\d+)"', root).group(1)) <= 0  # nothing sticks out sideways
    assert dom.count("<option") == 3  # two dimensions of the action, and time


def test_a_screenshot_is_not_blank(page, tmp_path):
    from PIL import Image

    shot = tmp_path / "shot.png"
    browse(page, tmp_path / "profile", "--window-size=1000,1400", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 100
