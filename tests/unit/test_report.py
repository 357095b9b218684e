import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from latentact.errors import UserError
from latentact.evaluation.policy.comparison import Row
from latentact.reporting.charts import codebook_usage, curve_panels, latent_map
from latentact.reporting.comparison_plot import write_comparison
from latentact.reporting.pages.run import build_report
from latentact.reporting.run_data import find
from latentact.stages.report import ReportConfig, run

EVIL = "<script>alert('x')</script>&\""
LAM = {
    "recon_mse": 0.001,
    "copy_mse": 0.05,
    "shuffled_mse": 0.03,
    "probes": {
        name: {"score": score, "metric": "accuracy", "ci95": [score - 0.1, score + 0.1]}
        for name, score in (
            ("latent_linear", 0.8),
            ("latent_mlp", 0.9),
            ("state_only", 0.4),
            ("shuffled_future", 0.3),
        )
    },
    "codebook": {"size": 4, "used": 3, "dead": 1, "perplexity": 2.5},
    "warnings": [],
    "action_names": ["left", EVIL],
}


def write_lam(folder, **changes):
    folder.mkdir(parents=True)
    (folder / "lam.json").write_text(json.dumps(LAM | changes))
    rng = np.random.default_rng(0)

    def pictures(*shape):
        return rng.integers(0, 256, (*shape, 8, 8, 3), dtype=np.uint8)

    np.savez(
        folder / "lam.npz",
        vectors=rng.normal(size=(30, 3)).astype(np.float32),
        episode=np.repeat(np.arange(3), 10),
        time=np.tile(np.arange(10) / 5, 3),
        action=np.arange(30) % 2,
        codes=(np.arange(30) % 3)[:, None],
        now=pictures(2),
        next=pictures(2),
        predicted=pictures(2),
        transfer_source=pictures(2, 2),
        transfer_start=pictures(3),
        transfer_grid=pictures(2, 3),
    )


def write_run(folder, env="babyai/Toy"):
    write_lam(folder / "lam")
    (folder / "lam" / "metrics.csv").write_text(
        "step,train/loss,val/loss,probe/x\n0,1,,\n5,0.5,0.6,0.2\n10,0.0"
    )
    (folder / "lam" / "config.yaml").write_text(f"name: {EVIL}\n")
    rows = []
    for method, won in (("latent", 8), ("bc_k", 2), ("oracle", 9)):
        successes = [1] * won + [0] * (10 - won)
        numbers = {
            "env": env,
            "episodes": 10,
            "seed": 0,
            "success": won / 10,
            "return": won / 10,
            "ci95": [0.1, 0.9],
            "successes": successes,
        }
        rollout = folder / "compare" / method
        rollout.mkdir(parents=True)
        (rollout / "rollout.json").write_text(json.dumps(numbers))
        (rollout / "episode_000.mp4").write_bytes(b"film of " + method.encode())
        (rollout / "episode_009.mp4").write_bytes(b"film of " + method.encode())
        rows.append(
            Row.from_json(numbers | {"method": method, "k": None if method == "oracle" else 5, "run": method})
        )
    write_comparison(folder / "compare", env, rows)
    (folder / "demo.json").write_text('{"wall_s": 600.5}')
    return folder


class Page(HTMLParser):
    """What a page loads, and its headings, in order."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.headings, self.scripts, self.images, self.policy, self._open = (
            [],
            [],
            0,
            [],
            "",
            None,
        )
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.loads += [attrs[name] for name in ("src", "srcset", "poster", "data", "action") if name in attrs]
        if tag == "link" or (tag == "a" and not attrs["href"].startswith("#")):
            self.loads.append(attrs["href"])
        if tag == "script":
            self.scripts += attrs.get("type") is None
        if tag == "img":
            self.images.append(attrs["alt"])
        if attrs.get("http-equiv") == "Content-Security-Policy":
            self.policy = attrs["content"]
        self._open = tag

    def handle_data(self, data):
        if self._open in ("h1", "h2"):
            self.headings.append(data)
        self._open = None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "demo", env=f"env {EVIL}")
    return folder, run(ReportConfig(run_dir=str(folder)))


def test_report_json(whole):
    folder, result = whole
    content = json.loads(result.json.read_text())
    assert content["wall_s"] == 600.5
    assert content["verdict"] == result.verdict
    assert result.verdict.startswith("Latent policy wins with 5 labeled episodes: success 0.80")
    assert content["lam"]["probes"]["latent_mlp"]["score"] == 0.9
    assert [(r["method"], r["k"], r["success"], r["ci95"]) for r in content["comparison"]] == [
        ("latent", 5, 0.8, [0.1, 0.9]),
        ("bc_k", 5, 0.2, [0.1, 0.9]),
        ("oracle", None, 0.9, [0.1, 0.9]),
    ]
    assert sorted(p.name for p in folder.iterdir()) == [
        "compare",
        "demo.json",
        "lam",
        "report.html",
        "report.json",
    ]


def test_the_page_has_every_section_and_loads_nothing_from_elsewhere(whole):
    page = Page(whole[1].html.read_text())
    assert page.headings[0] == "Latent policy wins with 5 labeled episodes."
    assert page.headings[1:] == [
        f"Every method on env {EVIL}",
        "Watch the policies act",
        "The latent action model",
        "Prediction and reality",
        "One latent, many places",
        "Do latents hold the action?",
        "Map of latent actions",
        "Codebook",
        "Learning curves",
        "Configurations",
    ]
    assert page.loads
    assert all(load.startswith("data:") for load in page.loads)
    assert page.scripts == 2  # plotly once, and the page's own
    assert len(page.images) == 2 * 3 + 2 * 2 + 3 + 2 * 3
    assert all(page.images)
    assert "default-src 'none'" in page.policy


def test_text_from_files_is_escaped(whole):
    page = whole[1].html.read_text()
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)") >= 3
    assert "\\u003cscript>alert" in page  # in the chart's json


def test_videos_carry_method_and_outcome(whole):
    page = whole[1].html.read_text()
    assert page.count("<video ") == 6
    assert page.count("controls autoplay muted loop playsinline") == 6
    assert "Latent policy, k = 5, episode 0: succeeds" in page.replace("env &lt;", "")
    assert "Oracle BC (all labels), episode 9: fails" in page


def test_the_same_run_makes_the_same_page(whole):
    folder, result = whole
    before = result.html.read_bytes()
    build_report(folder)
    assert result.html.read_bytes() == before


def test_a_lone_lam_run(tmp_path):
    write_lam(tmp_path / "run")
    result = run(ReportConfig(run_dir=str(tmp_path / "run")))
    content = json.loads(result.json.read_text())
    assert content["comparison"] == []
    assert content["wall_s"] is None
    assert result.verdict.startswith("The latent action model works. Its error is 2.0% of that of copying")
    page = Page(result.html.read_text())
    assert page.headings[0] == "The latent action model works."
    assert page.headings[-1] == "Not in this report"
    assert "No comparison of methods was run. No rollout was recorded." in result.html.read_text()


def test_warnings_of_a_lam_come_first(tmp_path):
    write_lam(tmp_path / "run", warnings=["Latents are ignored: so."], probes={}, codebook=None)
    result = run(ReportConfig(run_dir=str(tmp_path / "run")))
    assert result.verdict.startswith("The latent action model has warnings to read first.")
    assert "Latents are ignored: so." in result.verdict
    page = result.html.read_text()
    assert "Probes need actions" in page
    assert 'id="codebook"' not in page


def test_a_comparison_alone(tmp_path):
    write_run(tmp_path / "demo")
    result = run(ReportConfig(run_dir=str(tmp_path / "demo" / "compare")))
    assert json.loads(result.json.read_text())["lam"] is None
    assert "No latent action model was evaluated." in result.html.read_text()


def test_several_lams_are_all_in_the_report_the_least_nested_first(tmp_path):
    write_lam(tmp_path / "run" / "compare" / "a")
    write_lam(tmp_path / "run" / "lam", recon_mse=0.002)
    content = build_report(tmp_path / "run")
    assert content["lam"]["recon_mse"] == 0.002
    assert list(content["lams"]) == ["lam", "compare/a"]
    assert "All latent action models of this run" in (tmp_path / "run" / "report.html").read_text()


def write_evaluation(folder, **groups):
    """Write the files of lerobot-eval: ten episodes per group of tasks, of which a number succeed."""

    def scores(won, n):
        return {
            "avg_sum_reward": 10.0 * won / n,
            "avg_max_reward": 1.0,
            "pc_success": 100.0 * won / n,
            "n_episodes": n,
            "video_paths": ["elsewhere/videos/pusht_0/eval_episode_0.mp4"],
            "predicted_video_paths": [],
        }

    for name in groups:
        (folder / "videos" / f"{name}_0").mkdir(parents=True)
        (folder / "videos" / f"{name}_0" / "eval_episode_0.mp4").write_bytes(b"film")
    content = {
        "per_task": [{"task_group": name, "task_id": 0, "metrics": {}} for name in groups],
        "per_group": {name: scores(won, 10) for name, won in groups.items()},
        "overall": scores(sum(groups.values()), 10 * len(groups)) | {"eval_s": 1.0, "eval_ep_s": 0.1},
    }
    (folder / "eval_info.json").write_text(json.dumps(content))


def test_the_report_lists_rollouts_of_both_programs(tmp_path):
    write_evaluation(tmp_path / "run" / "eval", pusht=3)
    write_evaluation(tmp_path / "run" / "suites", easy=10, hard=0)
    (tmp_path / "run" / "rollout").mkdir()
    numbers = {"env": "pusht", "success": 0.5, "ci95": [0.2, 0.8], "return": 4.0, "episodes": 10, "seed": 0}
    (tmp_path / "run" / "rollout" / "rollout.json").write_text(json.dumps(numbers))
    result = run(ReportConfig(run_dir=str(tmp_path / "run")))
    content = json.loads(result.json.read_text())
    del numbers["seed"]
    assert content["rollouts"] == {"rollout": numbers}
    assert list(content["lerobot_evals"]) == ["eval", "suites"]
    evaluation = content["lerobot_evals"]["eval"]
    assert (evaluation["success"], evaluation["return"], evaluation["episodes"]) == (0.3, 3.0, 10)
    assert evaluation["ci95"] == pytest.approx([0.1078, 0.6032], abs=1e-4)  # Wilson's, 3 of 10
    assert content["lerobot_evals"]["suites"]["success"] == 0.5
    assert content["lerobot_evals"]["suites"]["groups"]["easy"]["success"] == 1
    page = result.html.read_text()
    assert "eval, by lerobot-eval <small>success 0.30 (0.11 to 0.60), return 3.00 over 10 episodes" in page
    assert "rollout <small>success 0.50 (0.20 to 0.80), return 4.00 over 10 episodes" in page
    assert page.count("<video ") == 3
    assert "easy_0, eval episode 0" in page
    assert "No rollout was recorded." not in page
    rows = re.findall(r'<tr><th scope="row">(\w+)</th><td class=n>(.*?)</td>', page)
    assert rows == [("easy", "1.00 (0.72 to 1.00)"), ("hard", "0.00 (0.00 to 0.28)")]


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        (
            {"held_out_accuracy": 0.75, "majority_accuracy": 0.5},
            "accuracy on held-out episodes 0.75, of the majority action 0.5.",
        ),
        (
            {"held_out_l1": [0.1, 0.3], "mean_action_l1": [0.4, 0.6]},
            "L1 on held-out episodes 0.2, of the mean action 0.5.",
        ),
    ],
)
def test_a_lone_finetuned_vla(tmp_path, scores, sentence):
    numbers = {"labeled_steps": 33, "labeled_episodes": 3} | scores
    (tmp_path / "finetune_vla.json").write_text(json.dumps(numbers))
    result = run(ReportConfig(run_dir=str(tmp_path)))
    assert json.loads(result.json.read_text())["finetuned_vlas"] == {".": numbers}
    page = result.html.read_text()
    assert f"Fine-tuning: 33 steps with robot actions of 3 episodes; {sentence}" in page
    assert "Robot actions from image and text" in Page(page).headings


def test_trained_and_finetuned_vlas_share_a_section(tmp_path):
    (tmp_path / "vla.json").write_text('{"metric": "accuracy", "score": 0.5}')
    numbers = {"labeled_steps": 33, "labeled_episodes": 3, "held_out_l1": [0.1], "mean_action_l1": [0.2]}
    (tmp_path / "robot").mkdir()
    (tmp_path / "robot" / "finetune_vla.json").write_text(json.dumps(numbers))
    content = build_report(tmp_path)
    assert (list(content["vlas"]), list(content["finetuned_vlas"])) == (["."], ["robot"])
    headings = Page((tmp_path / "report.html").read_text()).headings
    assert "Latent and robot actions from image and text" in headings


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        run(ReportConfig(run_dir=str(tmp_path / "missing")))
    (tmp_path / "video.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="nothing to report"):
        run(ReportConfig(run_dir=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lam.json", "{"),
        ("lam.json", "[]"),
        ("lam.json", "{}"),
        ("lam.npz", "not an archive"),
        ("comparison.json", '{"env": "x", "rows": [{"method": "latent"}]}'),
        ("rollout.json", "nothing"),
        ("eval_info.json", "[]"),
        ("eval_info.json", '{"per_episode": [], "aggregated": {}}'),
        ("eval_info.json", '{"overall": {"pc_success": NaN, "avg_sum_reward": 1, "n_episodes": 1}}'),
        ("finetune_vla.json", '{"labeled_steps": 3, "labeled_episodes": 1}'),
        ("demo.json", "1"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content):
    write_lam(tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(name)):
        run(ReportConfig(run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "report.html").exists()


def test_curves_skip_empty_cells_and_a_line_cut_short(tmp_path):
    (curves,) = find(write_run(tmp_path / "demo")).curves
    assert curves.series == {
        "train/loss": ([0, 5, 10], [1, 0.5, 0]),
        "val/loss": ([5], [0.6]),
        "probe/x": ([5], [0.2]),
    }
    panels = curve_panels(curves)
    assert list(panels) == ["loss", "probe"]
    assert [trace["name"] for trace in panels["loss"]["data"]] == ["train", "val"]


def test_the_map_names_actions_episodes_and_times():
    arrays = {
        "vectors": np.array([[1.0, 0], [-1, 0], [0, 0.5], [0, -0.5]]),
        "episode": np.array([3, 3, 4, 4]),
        "time": np.array([0.0, 0.5, 0, 0.5]),
        "action": np.array([0, 1, 1, -1]),
    }
    content = latent_map(arrays, ["left", "right"])
    assert content["share"] == pytest.approx(1)
    assert [(trace["name"], trace["text"]) for trace in content["data"]] == [
        ("left", ["episode 3, 0.0 s, left"]),
        ("right", ["episode 3, 0.5 s, right", "episode 4, 0.0 s, right"]),
    ]
    arrays["action"] = np.array([[0.0, 1], [2, 3], [4, 5], [np.nan, np.nan]])
    assert latent_map(arrays, ["x"])["colors"] == {
        "x": [0, 2, 4, None],
        "action 1": [1, 3, 5, None],
        "time in the episode (s)": [0, 0.5, 0, 0.5],
    }


def test_code_usage_is_sorted():
    bar = codebook_usage(np.array([[2], [2], [0], [2]]), 4)["data"][0]
    assert bar["y"] == [0.75, 0.25, 0, 0]
    assert bar["hovertext"][0] == "code 2: 3 times"
