"""Demonstrations in, a verdict out: `collect`, `compare`, `report` and the `demo` that chains them."""

import csv
import json
import shutil

import av
import numpy as np
import pytest

from conftest import cli, contents, ok
from latentact.data.latents import read_labels
from latentact.policies.contract import Policy

pytestmark = pytest.mark.slow
BLIND = ["uniform", "frequencies"]
METHODS = [
    "latent",
    "latent_finetuned",
    "latent_joint",
    "bc_k",
    "bc_k_self_training",
    "idm_k",
    "idm_k_finetuned",
    "oracle",
    "oracle_finetuned",
]
NAMES = {
    "latent": "Latent policy",
    "latent_finetuned": "Latent policy, fine-tuned on k labels",
    "latent_joint": "Latent policy with joint head",
    "bc_k": "BC on k labels",
    "bc_k_self_training": "BC on k labels, self-training",
    "idm_k": "IDM on k labels",
    "idm_k_finetuned": "IDM on k labels, fine-tuned",
}
STEPS = 20
SMALL = (
    *("data.resolution=56", "lam.idm_channels=[16]", "lam.fdm_channels=[16]", "idm.channels=[16]"),
    *("policy.network.channels=[16]", "policy_training.batch_size=16", "lam_training.batch_size=16"),
    *(f"lam_training.steps={STEPS}", "lam_training.eval_every=0", f"idm_training.steps={STEPS}"),
    *(f"policy_training.steps={STEPS}", f"decoder_training.steps={STEPS}", "finetune_steps=10"),
    *("episodes=4", "record=1"),
)


def times(folder):
    """Return when each file was last written, for the files of trained weights."""
    files = sorted(path for path in folder.rglob("*.safetensors") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("collect") / "data"
    ok("collect", "babyai/GoToLocal", "--episodes", "8", "--workers", "1", "--out", out)
    return out


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    """A comparison, its folder and the command that made it."""
    out = tmp_path_factory.mktemp("compare") / "compare"
    settings = (f"data.path={data}", "env=babyai/GoToLocal", "ks=[2]", "seeds=[0]", f"out={out}")
    command = ("compare", "experiment=babyai", f"methods=[{','.join(METHODS)}]", *settings, *SMALL)
    ok(*command)
    return json.loads((out / "comparison.json").read_text()), out, command


def test_rows(compared):
    content, out, _ = compared
    assert content["env"] == "babyai/GoToLocal"
    assert [row["method"] for row in content["rows"]] == [*METHODS, *BLIND]
    for row in content["rows"]:
        assert row["k"] == (None if row["method"].startswith(("oracle", *BLIND)) else 2)
        assert (row["seed"], row["episodes"], len(row["successes"])) == (0, 4, 4)
        assert row["success"] == np.mean(row["successes"])
        low, high = row["ci95"]
        assert 0 <= low <= row["success"] <= high <= 1
        assert row["return_ci95"][0] <= row["return"] <= row["return_ci95"][1]
        told = json.loads((out / row["run"] / "rollout.json").read_text())
        assert (told["success"], told["return"], told["seed"]) == (row["success"], row["return"], 100_000)
        assert ("decoder_only" in row) == (row["method"] in ("latent", "latent_joint"))
        if "decoder_only" in row:
            assert set(row["decoder_only"]) >= {"success", "return", "ci95"}


def test_csv_and_plot_agree_with_json(compared):
    content, out, _ = compared
    with (out / "comparison.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["method"] for row in rows] == [*METHODS, *BLIND]
    for row, other in zip(rows, content["rows"], strict=True):
        assert row["k"] == ("" if other["k"] is None else "2")
        assert float(row["success"]) == other["success"]
        assert [float(row["success_low"]), float(row["success_high"])] == other["ci95"]
        assert float(row["return"]) == other["return"]
        tuned = other.get("decoder_only")
        assert row["decoder_only_success"] == ("" if tuned is None else str(tuned["success"]))
    assert (out / "comparison.svg").read_text().lstrip().startswith("<svg")


def test_verdict_names_a_winner_of_the_rows(compared):
    content, _, _ = compared
    best = max(row["success"] for row in content["rows"] if row["k"] == 2)
    winners = [row["method"] for row in content["rows"] if row["k"] == 2 and row["success"] == best]
    first = content["verdict"].partition(":")[0]
    if best == 0:
        assert first.startswith("No method wins")
    elif len(winners) == 1:
        assert first == f"{NAMES[winners[0]]} wins with 2 labeled episodes"
    else:
        assert "tie with 2 labeled episodes" in first
        assert all(NAMES[method] in first for method in winners)


def test_rows_are_on_equal_terms(compared):
    """Same network, same steps, same labeled episodes; the IDM's labels are robot actions."""
    content, out, _ = compared
    root = out / "seed0"
    folders = {
        "latent": root / "latent_k2/grounded",
        "latent_joint": root / "latent_joint_k2/grounded",
        **{method: root / f"{method}_k2/policy" for method in ("bc_k", "idm_k")},
        "oracle": root / "oracle/policy",
    }
    policies = {method: Policy.from_pretrained(folder) for method, folder in folders.items()}
    assert len({policy.config.network for policy in policies.values()}) == 1
    assert len({policy.spec.action_space for policy in policies.values()}) == 1
    samples = {
        method: json.loads((folders[method] / "policy.json").read_text())["episodes"]
        for method in ("bc_k", "idm_k", "oracle")
    }
    assert samples == {"bc_k": 2, "idm_k": 7, "oracle": 7}
    base = {"bc_k", "idm_k", "oracle"}
    learned = [row for row in content["rows"] if row["method"] not in BLIND]
    assert all(row["updates"] == STEPS + 10 * (row["method"] not in base) for row in learned)
    assert [row["updates"] for row in content["rows"][-2:]] == [0, 0]
    assert "Without observations, " in content["verdict"]
    for method in ("bc_k_self_training_k2", "idm_k_finetuned_k2", "oracle_finetuned"):
        last = [*csv.DictReader((root / method / "finetuned/metrics.csv").open(newline=""))][-1]
        assert int(last["step"]) == 10
    assert "with the decoder only" in content["verdict"]
    assert "At the same number of updates, BC on k labels goes from" in content["verdict"]
    for method in ("latent", "latent_joint", "bc_k", "idm_k", "oracle"):
        last = [*csv.DictReader((root / _policy(method) / "metrics.csv").open(newline=""))][-1]
        assert int(last["step"]) == STEPS
    labels, store = read_labels(root / "idm_k_k2/labels")
    assert labels.spec.model == "idm"
    assert store.action_space is not None
    assert labels.spec.codebook_size == store.action_space.size


def _policy(method):
    return {"latent": "latent/policy", "oracle": "oracle/policy"}.get(method, f"{method}_k2/policy")


def test_videos_play(compared):
    _, out, _ = compared
    videos = sorted(out.rglob("episode_*.mp4"))
    assert len(videos) == 13  # one of each of eleven rows, and of two policies before fine-tuning
    with av.open(str(videos[0])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert len([*container.decode(stream)]) > 1


def test_same_command_again_returns_the_same(compared):
    _, out, command = compared
    before, written = contents(out), times(out)
    ok(*command)
    assert contents(out) == before
    assert times(out) == written, "nothing is trained again"


def test_other_settings_are_refused(compared):
    _, out, command = compared
    before = contents(out)
    done = cli(*command, "episodes=5")
    assert done.returncode == 2
    assert "episodes = 4, not 5" in done.stderr.splitlines()[-1]
    assert contents(out) == before


def test_other_ks_and_methods_are_added(compared):
    content, out, command = compared
    before = contents(out)
    ok(*command, "ks=[1,2]", "methods=[bc_k,oracle]")
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert [(row["method"], row["k"]) for row in rows[:3]] == [("bc_k", 1), ("bc_k", 2), ("oracle", None)]
    assert all(row in content["rows"] for row in rows[1:])
    written = {path for path, value in contents(out).items() if before.get(path) != value}
    summary = {"config.yaml", *(f"comparison.{kind}" for kind in ("json", "csv", "svg"))}
    assert written - summary == {path for path in written if "/bc_k_k1/" in path}, "nothing is trained again"
    ok(*command)
    assert json.loads((out / "comparison.json").read_text()) == content
    shutil.rmtree(out / "seed0" / "bc_k_k1")
    assert contents(out) == before


def test_report_of_a_comparison(compared):
    content, out, _ = compared
    done = ok("report", out)
    report = json.loads((out / "report.json").read_text())
    assert set(report) >= {"wall_s", "lam", "comparison", "verdict"}
    assert report["verdict"] == content["verdict"]
    assert content["verdict"] in done.stdout
    assert set(report["lam"]) >= {"recon_mse", "copy_mse", "shuffled_mse", "probes"}
    for row, other in zip(report["comparison"], content["rows"], strict=True):
        keys = ("method", "k", "seed", "episodes", "success", "return", "ci95")
        assert [row[key] for key in keys] == [other[key] for key in keys]
    page = (out / "report.html").read_text()
    assert page.count("<video") == 13
    assert 'src="http' not in page


def test_demo(tmp_path):
    out = tmp_path / "demo"
    more = ("env=babyai/GoToLocal", "methods=[latent,oracle]", *SMALL)
    command = ("demo", "--out", out, "--episodes", "8", "--k", "2", *more)
    done = ok(*command)
    assert str(out / "report.html") in done.stdout
    report = json.loads((out / "report.json").read_text())
    assert [row["method"] for row in report["comparison"]] == ["latent", "oracle", *BLIND]
    assert report["wall_s"] > 1
    assert (out / "report.html").stat().st_size > 1_000_000  # everything is inside
    before, written = contents(out / "compare"), times(out)
    ok(*command)
    assert contents(out / "compare") == before
    assert times(out) == written, "nothing is trained again"
    again = json.loads((out / "report.json").read_text())
    assert {key: again[key] for key in again if key != "wall_s"} == {
        key: report[key] for key in report if key != "wall_s"
    }
    other = cli(*command, "idm_training.steps=7")
    assert other.returncode == 2
    assert f"idm_training.steps = {STEPS}, not 7" in other.stderr.splitlines()[-1]
    ok("demo", "--out", out, "--episodes", "8", "--k", "3", *more)
    rows = json.loads((out / "report.json").read_text())["comparison"]
    assert [(row["method"], row["k"]) for row in rows[:2]] == [("latent", 3), ("oracle", None)]
    assert {path: when for path, when in times(out).items() if path in written} == written


def test_rows_of_a_vision_language_action_model(data, tmp_path):
    """Pretrained, not pretrained and on all labels: one network, and the labels and steps that they claim."""
    out, tiny = tmp_path / "compare", [word for word in SMALL if not word.startswith("policy")]
    steps = ("vla.training.steps=3", "vla_finetuning.training.steps=2", "vla_finetuning.training.device=cpu")
    more = ("methods=[vla,vla_scratch,vla_oracle]", "ks=[2]", *steps, "vla.training.batch_size=8")
    command = ("compare", "experiment=babyai_pickuploc_vla", f"data.path={data}", "env=babyai/GoToLocal")
    command += ("vla_finetuning.decoder_training.steps=4", "vla_finetuning.decoder_training.device=cpu")
    command += (*tiny, *more, "vla_finetuning.training.batch_size=8", "vla.training.device=cpu", f"out={out}")
    refused = cli(*command, "vla_finetuning.head.kind=bins")
    assert (refused.returncode, out.exists()) == (2, False)
    assert "head.kind must be chunk for discrete actions" in refused.stderr.splitlines()[-1]
    ok(*command)
    comparison = json.loads((out / "comparison.json").read_text())
    assert comparison["verdict"].endswith("actions were sampled (temperature 1).")
    assert (out / "seed0/vla_k2/finetuned/decoder/metrics.csv").is_file()  # of the pseudo labels
    assert not (out / "seed0/vla_scratch_k2/finetuned/decoder").exists()
    found = {row["method"]: (row["k"], row["updates"], row["run"]) for row in comparison["rows"]}
    root = out / "seed0"
    assert found == {
        "vla": (2, 5, "seed0/vla_k2/rollout"),
        "vla_scratch": (2, 2, "seed0/vla_scratch_k2/rollout"),
        "vla_oracle": (None, 5, "seed0/vla_oracle/rollout"),
        "uniform": (None, 0, "seed0/uniform/rollout"),
        "frequencies": (None, 0, "seed0/frequencies/rollout"),
    }
    assert sorted(path.name for path in root.iterdir()) == [
        *("frequencies", "latent", "uniform", "vla", "vla_k2", "vla_oracle", "vla_scratch_k2"),
    ]
    tuned = {name: root / name / "finetuned" for name in ("vla_k2", "vla_scratch_k2", "vla_oracle")}
    for folder, steps in zip(tuned.values(), (2, 2, 5), strict=True):
        last = [*csv.DictReader((folder / "metrics.csv").open(newline=""))][-1]
        assert int(last["step"]) == steps
    episodes = {
        name: json.loads((folder / "finetune_vla.json").read_text())["labeled_episodes"]
        for name, folder in tuned.items()
    }
    assert episodes == {"vla_k2": 2, "vla_scratch_k2": 2, "vla_oracle": 7}
    configs = {
        json.dumps(json.loads((f / "config.json").read_text()), sort_keys=True) for f in tuned.values()
    }
    assert len(configs) == 1
    with (out / "comparison.csv").open(newline="") as file:
        assert [row["updates"] for row in csv.DictReader(file)] == ["5", "2", "5", "0", "0"]
    before = contents(out)
    ok(*command)
    assert contents(out) == before
    ok("report", out)
    page = (out / "report.html").read_text()
    assert "Oracle VLA (all labels)" in page
    assert "Latent and robot actions from image and text" in page
    card = ok("push", tuned["vla_k2"], "someone/vla", "--dry-run").stdout
    assert "**VLA pretrained on latent actions (this policy)** | 2 |" in card
    assert "| VLA on k labels, not pretrained | 2 |" in card
