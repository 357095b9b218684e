"""Benchmarks of steps run, at the smallest sizes; the numbers that they print there mean nothing."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import cli, needs_gl, run_python
from latentact.composition import load_experiment
from latentact.device import supports_int8
from latentact.evaluation.policy.comparison import Row, aggregate
from latentact.evaluation.policy.intervals import success_interval
from latentact.lams.contract import load_lam
from latentact.lams.models.lapo import LapoConfig
from latentact.lams.models.laq import LaqConfig
from latentact.lams.models.villa_x import VillaXConfig
from latentact.quantizers.nsvq import NsvqConfig
from latentact.stages.train_lam import TrainLamConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("lapo_step", "--steps 1 --batch-size 2", r"ratio \d"),
        pytest.param(
            *(
                "experts",
                "--starts 1 --pusht 1 --tasks reach-v3 --frames 5",
                r"v3: 1 of 1 .*(?s:.*)84 pixels: \d",
            ),
            marks=needs_gl,
        ),
        ("augment_step", "--steps 1 --batch-size 2", r"everything: .* % of the step"),
        (
            "vla_step",
            "--device cpu --models vla_debug --batch 2 --repeats 1",
            r"\| vla_debug \| no \| 0\.2 M \|",
        ),
        ("token_step", "--steps 1 --batch-size 2 --memory-runs 0", r"on the fly .* ratio \d"),
    ],
)
def test_it_prints_what_it_measured(name: str, flags: str, said: str, tmp_path: Path) -> None:
    script = str(BENCHMARKS / f"{name}.py")
    code = f"import os, runpy\nos.chdir({str(tmp_path)!r})\nrunpy.run_path({script!r}, run_name='__main__')"
    assert re.search(said, run_python(code, *flags.split()))


def load(name: str) -> Any:
    """Return a benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_plan_multiplies_unit_costs() -> None:
    benchmark = load("scale_plan")
    bottleneck = NsvqConfig(dim=32, positions=4, codebook_size=8)
    small = {"dim": 32, "heads": 2, "head_dim": 16, "spatial_depth": 1, "temporal_depth": 1}
    model = LaqConfig(size=32, patch=4, bottleneck=bottleneck, **small).build().eval()
    measured = benchmark.measure(model, "fp32", side=48, count=60, batches=1)
    assert measured.label_bytes == 2 * 4 * 4 * 8 + 8 * 4 + 1  # k = 4 tokens of 8 numbers, and their codes
    assert min(measured.video_fps, measured.jpeg_fps, measured.encode_fps) > 10
    assert 100 < measured.jpeg_bytes < 32 * 32 * 3
    costs = benchmark.Costs(
        video_fps=100, video_bytes=1000, jpeg_fps=500, jpeg_bytes=5000, encode_fps=10, label_bytes=1000
    )
    rows = dict(
        re.findall(r"\| (.*?) \| (.*?) \|", benchmark.plan(costs, 1e8, shard_mb=500, gpu_fps=1000, gpus=8))
    )
    assert rows["storage of JPEG shards"] == "0.50 TB"
    assert rows["shards"] == "1,000 of 500 MB, 100,000 frames each"
    assert rows["video to shards"] == "278 core-hours of decoding"
    assert rows["reading shards"] == "56 core-hours; 2.0 cores feed a GPU"
    assert rows["labels"].startswith("100 GB")
    assert rows["encoding on machines like this"] == "2,778 machine-hours"
    assert rows["encoding at 1000 frames/s per GPU"] == "27.8 GPU-hours"
    assert rows["the same with 8 GPUs"] == "3.5 h"
    assert rows["GPU-hours of labels over that"] == "0.10"


def test_speed_of_models_makes_a_row_each_and_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load("lam_speed")
    monkeypatch.setattr(benchmark, "_peak", lambda *_: 1e11)  # measuring it takes seconds
    shared: dict[str, Any] = {"encoder_n_heads": 2, "decoder_n_heads": 2, "map_heads": 2, "patch_size": 16}
    small = {
        "lapo": LapoConfig(size=32, idm_scale=1, fdm_base=4),
        "laq": LaqConfig(
            size=32, patch=4, dim=32, heads=2, head_dim=16, spatial_depth=1, temporal_depth=1,
            bottleneck=NsvqConfig(dim=32, positions=4, codebook_size=8),
        ),
        "villa_x": VillaXConfig(
            resolution=32, encoder_depth=1, decoder_depth=1, encoder_embed_dim=32, decoder_embed_dim=32,
            window="chunked", **shared,
        ),
    }  # fmt: skip
    assert small.keys() == benchmark.CONFIGS.keys()
    monkeypatch.setattr(benchmark, "CONFIGS", small)
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## Another machine\n\n| lapo | fp32 |\n")
    precisions = ["bf16", *["int8"] * supports_int8("cpu")]
    for name, precision in itertools.product(small, precisions):
        benchmark._write(page, "This machine", benchmark._row(name, precision, "no", "cpu", 1))
    text = page.read_text()
    assert "## Another machine" in text
    for precision in precisions:
        rows = [name for name in small if re.search(rf"\| {name} \| {precision} \| no \|.* GiB \|", text)]
        assert rows == [*small]


def test_the_page_first_says_where_latent_actions_do_not_pay(tmp_path: Path) -> None:
    pays = load("pays")

    def row(method: str, won: int, k: int | None = 5) -> Row:
        low, high = success_interval([True] * won + [False] * (100 - won))
        return Row(
            method=method,
            k=k,
            seed=0,
            episodes=100,
            success=won / 100,
            mean_return=0.0,
            ci95=(low, high),
            return_ci95=(0.0, 0.0),
        )

    clear = [row("latent", 90), row("idm_k", 50), row("bc_k", 20), row("oracle", 95, None)]
    close = [row("latent", 60), row("idm_k", 66), row("bc_k", 30), row("oracle", 95, None)]
    pays.write(tmp_path, {"A": aggregate(clear), "B": aggregate(close)})
    lines = (tmp_path / "does_it_pay.md").read_text().splitlines()
    assert lines[2] == (
        "With k = 5, latent actions do not clearly pay on B (behind, intervals overlap); they are ahead with "
        "non-overlapping intervals in 1 of 2 cells; the best latent row reaches 0.79 of the oracle on "
        "average."
    )
    assert "| IDM on k labels | 0.50 (0.40 to 0.60) | 0.66 (0.56 to 0.75) |" in lines
    assert "| best latent row | ahead | behind, intervals overlap |" in lines


@pytest.mark.parametrize("quick", [False, True])
def test_every_cell_has_the_rows_that_its_models_allow(*, quick: bool) -> None:
    pays = load("pays")
    given = argparse.Namespace(ks=[2, 5], episodes=10, quick=quick, overrides=["max_steps=30"])
    for cell in pays.CELLS.values():
        config = pays.settings(cell, "", "data", 1, given)
        joint = config.lam.with_action_head(1.0) is not None
        extra = {"latent_joint"} if joint else set()
        extra |= {"act_k"} if cell.continuous else set()
        assert {*config.methods} == {*pays.ROWS} - {"latent_joint"} | extra
        assert (config.env, config.ks, config.seeds, config.episodes) == (cell.env, (2, 5), (1,), 10)
        assert config.max_steps == 30


def test_reference_lams_have_cards_and_can_be_pushed(
    blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, out = load("reference_lams"), tmp_path / "models"
    given = ["--clips", str(blocks), "--out", str(out), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["reference_lams", *given, "--only", "robot_clips", "--steps", "1"])
    script.main()
    assert "robot_clips: " in capsys.readouterr().out
    assert "prediction of the next frame, held-out episodes" in (out / "robot_clips/README.md").read_text()
    assert cli("push", out / "robot_clips", "me/lam", "--dry-run").returncode == 0
    assert load_lam(out / "robot_clips").spec.frame_gap == 2


def test_reference_lams_are_small() -> None:
    for reference in load("reference_lams").REFERENCES.values():
        settings = [f"experiment={reference.experiment}", "data.path=x", *reference.settings]
        lam = load_experiment("train_lam", TrainLamConfig, settings).lam
        assert 4 * sum(parameter.numel() for parameter in lam.build(None).parameters()) < 5e6


def test_pretraining_and_its_baselines_take_as_many_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load("pretrain_act")
    monkeypatch.setattr(sys, "argv", ["pretrain_act", "--pretrain-steps=30", "--tune-steps=10"])
    options, runs = benchmark._options(), {}

    def lerobot_train(flags: tuple[str, ...]) -> None:
        given = dict(flag.removeprefix("--").split("=") for flag in flags)
        out = Path(given["output_dir"])
        row = runs.setdefault(out.parent.name, {})
        row[given["dataset.root"]] = int(given["steps"]), given.get("policy.path")
        checkpoint = out / "checkpoints/last/pretrained_model"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").touch()

    def adapt(config: Any) -> Any:
        assert config.policy == "pretrained"
        return SimpleNamespace(path=config.out)

    monkeypatch.setattr(benchmark, "run_lerobot_train", lerobot_train)
    monkeypatch.setattr(benchmark.adapt_policy, "run", adapt)
    for row, _ in itertools.product(benchmark.ROWS, range(2)):  # the second time nothing is missing
        data = (Path("all"), Path("labeled"), Path("pretrained"))
        assert benchmark.trained(row, tmp_path / row, *data, 0, options).parent.parent.parent.name == "act"
    adapted = str(tmp_path / "pretrained/adapted")
    assert runs == {
        "pretrained": {"labeled": (10, adapted)},  # after the 30 on the videos
        "scratch": {"labeled": (40, None)},
        "scratch_short": {"labeled": (10, None)},
        "oracle": {"all": (40, None)},
    }


def test_table_of_pretraining_pools_the_seeds() -> None:
    benchmark = load("pretrain_act")
    won = {"row": "pretrained", "successes": [1] * 100, "max_rewards": [10.0] * 100, "error": 0.25}
    lost = {"row": "scratch", "successes": [0] * 100, "max_rewards": [2.0] * 100, "error": 0.5}
    page = benchmark.page(
        [{**won, "seed": 0}, {**won, "successes": [0] * 100, "seed": 1}, {**lost, "seed": 0}]
    )
    first, second = (line.split(" | ") for line in page.splitlines()[2:])
    assert first[1:] == ["1.00, 0.00", "0.50 (0.43 to 0.57)", "10.00 (10.00 to 10.00)", "0.25 |"]
    assert second == ["| ACT", "0.00", "0.00 (0.00 to 0.04)", "2.00 (2.00 to 2.00)", "0.50 |"]


@needs_gl
def test_clams_ablation_has_a_row_per_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark, rows = load("clam"), ("codes_joint", "idm")
    sizes = "--demonstrations=3 --k=3 --play-steps=20 --lam-steps=2 --policy-steps=2 --decoder-steps=2"
    few = "--seeds 0 --episodes=2 --max-steps=3"
    monkeypatch.setattr(
        sys, "argv", ["clam", f"--out={tmp_path}", "--rows", *rows, *sizes.split(), *few.split()]
    )
    benchmark.main()
    page = (tmp_path / "clam.md").read_text().splitlines()
    assert page[0] == "| metaworld/reach-v3 | success by seed | success |"
    assert [line.split(" | ")[0] for line in page[2:]] == [f"| {benchmark.ROWS[row]}" for row in rows]
    assert page[2].endswith("| 0.00 | 0.00 (0.00 to 0.66) |")


def test_planned_and_random_episodes_are_compared() -> None:
    benchmark = load("label_plan")
    given = SimpleNamespace(ks=[5, 10], methods=["coverage", "random", "longest"])
    rates = {("coverage", 5): [0.7, 0.9], ("coverage", 10): [0.8, 0.8], ("random", 5): [0.5, 0.5]}
    rates |= {("random", 10): [0.6, 0.8], ("longest", 5): [0.2, 0.4]}
    predicted = {5: [(0.6, 0.4, 0.8), (0.7, 0.5, 0.8)], 10: [(0.8, 0.6, 0.9), (0.9, 0.7, 1.0)]}
    found = {"rates": rates, "predicted": predicted, "episodes": 100}
    text = "\n".join(benchmark.page("A", found, given))
    assert "| coverage | 0.80 (0.70 to 0.90): 0.70, 0.90 | 0.80 (0.80 to 0.80): 0.80, 0.80 |" in text
    assert "| longest | 0.30 (0.20 to 0.40): 0.20, 0.40 |  |" in text
    assert "| 5 | 0.65 | 0.80 | -0.15 | 0.15 | 1 of 2 |" in text
    assert "| 10 | 0.85 | 0.80 | +0.05 | 0.05 | 2 of 2 |" in text
    alone = benchmark.Cell(method="random", k=5, rates=[0.5], episodes=100)
    assert alone.interval == success_interval([True] * 50 + [False] * 50)
