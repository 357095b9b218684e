"""Which episodes to label: the methods, what they cover, the prediction, and stages that follow a plan."""

import json

import numpy as np
import pytest

from conftest import TINY_LAM, TINY_POLICY, ok, refused, write_blocks
from latentact.data.cache import DataConfig, open_store
from latentact.data.plan import read_plan
from latentact.data.splits import choose_labeled, draw_order, split_episodes
from latentact.errors import UserError
from latentact.evaluation.lam.clusters import cluster
from latentact.evaluation.lam.selection import (
    METHODS,
    Candidates,
    Coverage,
    by_chance,
    by_kmeans,
    by_length,
    means_of,
    random_equivalent,
)
from latentact.evaluation.policy.learning_curve import LearningCurve, Measured

LINE = np.array([[0.0], [1], [2], [10], [11]])
"""Points of five episodes."""


def test_clusters_are_the_blobs():
    rng = np.random.default_rng(0)
    points = np.concatenate([at + 0.1 * rng.normal(size=(20, 2)) for at in ((0, 0), (9, 0), (0, 9))])
    group = cluster(points, 3)
    assert [len(set(group[i : i + 20])) for i in (0, 20, 40)] == [1, 1, 1]
    assert len(set(group)) == 3
    assert set(cluster(np.zeros((5, 2)), 3)) == {0}


def test_coverage_is_the_distance_to_the_nearest_labeled_episode():
    coverage = Coverage.fit(LINE, np.arange(5))
    spread = np.abs(LINE - LINE.mean()).mean()
    assert coverage.of(np.array([1])) == pytest.approx(1 - (1 + 0 + 1 + 9 + 10) / 5 / spread)
    assert coverage.of(np.array([1, 3])) == pytest.approx(1 - (1 + 0 + 1 + 0 + 1) / 5 / spread)
    assert coverage.of(np.arange(5)) == pytest.approx(1)


def test_greedy_takes_what_adds_most_and_only_of_those_left():
    coverage = Coverage.fit(LINE, np.arange(5))
    nothing = np.array([], int)
    assert coverage.greedy(nothing, np.arange(5), 2).tolist() == [2, 3]
    assert coverage.greedy(np.array([1]), np.array([0, 2, 3, 4]), 1).tolist() == [3]
    assert coverage.greedy(np.array([1, 3]), np.array([0, 4]), 9).tolist() == [0, 4]
    assert Coverage.fit(LINE, np.array([0, 1, 2])).greedy(nothing, np.arange(3), 1).tolist() == [1]


def test_importance_weights_episodes():
    coverage = Coverage.fit(LINE, np.arange(5), np.array([0.01, 0.01, 0.01, 1, 1]))
    assert coverage.greedy(np.array([], int), np.arange(5), 1).tolist()[0] in (3, 4)
    assert coverage.of(np.array([4])) > coverage.of(np.array([1]))


def test_random_episodes_are_worth_themselves():
    points = np.random.default_rng(0).normal(size=(40, 2))
    coverage = Coverage.fit(points, np.arange(40))
    curve = coverage.random_curve(np.arange(40), 20)
    assert len(curve) == 20
    assert (np.diff(curve) > 0).all()
    worth = [random_equivalent(coverage.of(draw_order(np.arange(40), s)[:10]), curve) for s in range(30)]
    assert np.mean(worth) == pytest.approx(10, abs=1)
    planned = coverage.greedy(np.array([], int), np.arange(40), 10)
    assert random_equivalent(coverage.of(planned), curve) > 12


def test_flat_curves_give_the_least_number():
    wide = np.random.default_rng(0).normal(size=(200, 128))
    coverage = Coverage.fit(wide, np.arange(200))
    curve = coverage.random_curve(np.arange(200), 100)
    planned = coverage.greedy(np.array([], int), np.arange(200), 20)
    worth = [random_equivalent(coverage.of(planned[:k]), curve) for k in (1, 2, 5, 10, 20)]
    assert worth == sorted(set(worth))
    few = np.repeat(np.arange(4.0), 45)[:, None]
    coverage = Coverage.fit(few, np.arange(180))
    planned = coverage.greedy(np.array([], int), np.arange(180), 4)
    assert 4 < random_equivalent(coverage.of(planned), coverage.random_curve(np.arange(180), 180)) < 60


def candidates(**more):
    points = np.array([[0.0, 0], [0.1, 0], [0.2, 0], [9, 9], [9.1, 9]])
    given = {"steps": np.array([4, 2, 4, 1, 18]), "points": points, "seed": 0}
    given |= {"train": np.arange(5), "labeled": np.array([], int), **more}
    return Candidates(coverage=Coverage.fit(given["points"], np.arange(5)), **given)


def test_baselines():
    assert by_length(candidates(), 3).tolist() == [4, 0, 2]
    assert by_length(candidates(labeled=np.array([4])), 1).tolist() == [0]
    assert by_kmeans(candidates(), 2).tolist()[0] == 1
    assert by_kmeans(candidates(), 2).tolist()[1] in (3, 4)
    assert by_chance(candidates(), 3).tolist() == draw_order(np.arange(5), 0)[:3].tolist()
    for method in METHODS.values():  # an episode without a latent action is never chosen
        assert 3 not in method(candidates(steps=np.array([4, 2, 4, 0, 18])), 4)
    same = candidates(points=np.zeros((5, 2)))
    for method in METHODS.values():
        for given in (candidates(), same):
            assert len(set(method(given, 4).tolist())) == 4


def test_an_episode_is_the_mean_of_its_steps():
    values, episode = np.array([[1.0], [3], [8]]), np.array([0, 0, 2])
    assert means_of(values, episode, 3).tolist() == [[2], [4], [8]]


# --- the prediction


def test_success_is_predicted_from_rollouts():
    measured = [Measured(k=5, successes=50, episodes=100), Measured(k=20, successes=85, episodes=100)] * 5
    fitted, prior = LearningCurve.fit(measured), LearningCurve.fit([])
    assert fitted.predict(5).success == pytest.approx(0.5, abs=0.05)
    assert fitted.predict(20).success == pytest.approx(0.85, abs=0.05)
    assert 0.5 < fitted.predict(10).success < 0.85
    for k in (5, 10, 20):
        known, guess = fitted.predict(k), prior.predict(k)
        assert known.low < known.success < known.high
        assert known.high - known.low < 0.6 * (guess.high - guess.low)
    assert prior.predict(5).low < 0.1 < 0.9 < prior.predict(5).high


# --- the command


@pytest.fixture(scope="module")
def runs(tmp_path_factory, blocks):
    root = tmp_path_factory.mktemp("plan")
    short = ("training.steps=2", "training.eval_every=0")
    ok("train-lam", f"data.path={blocks}", *TINY_LAM, *short, f"out={root}/lam")
    ok("label", "--lam", root / "lam", "--data", blocks, "--out", root / "labels")
    ok("train-policy", f"labels={root}/labels", *TINY_POLICY, *short, f"out={root}/policy")
    return root


def planned(*arguments):
    return json.loads(ok("plan", *arguments, "--json").stdout)


def chosen(plan):
    return [each["name"] for each in plan["episodes"]]


def test_labels_or_lam_and_data_give_the_same_plan(runs, blocks, tmp_path):
    few = ("--budget", 3, "--held-out", 0.25)
    given = ("--lam", runs / "lam", "--data", blocks, *few, "--out", tmp_path / "a.json")
    first = planned(*given)
    second = planned("--labels", runs / "labels", *few, "--out", tmp_path / "b.json")
    assert first["episodes"] == second["episodes"]
    store = open_store(DataConfig(path=str(blocks), resolution=32))
    train, _ = split_episodes(store, held_out=0.25, seed=0)
    found = read_plan(tmp_path / "a.json", store)
    assert found is not None
    assert set(found) <= set(train)
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["digest"] == store.digest
    assert written["spec"]["weights"] == json.loads((runs / "lam/spec.json").read_text())["weights"]
    covered = [each["coverage"] for each in written["episodes"]]
    assert covered == sorted(covered)
    assert planned(*given)["episodes"] == first["episodes"]
    shown = ok("plan", *given).stdout
    assert "No rollouts are known" in shown
    assert all(name in shown for name in chosen(first))


def test_a_plan_sees_no_action(runs, tmp_path):
    plans = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        data = write_blocks(tmp_path / str(seed) / "blocks.npz")
        arrays = dict(np.load(data))
        arrays["action"] = np.random.default_rng(seed).permutation(arrays["action"])
        np.savez(data, allow_pickle=False, **arrays)
        given = ("--lam", runs / "lam", "--data", data, "--budget", 4)
        plans.append(planned(*given, "--out", tmp_path / f"{seed}.json"))
    assert chosen(plans[0]) == chosen(plans[1])
    assert plans[0]["digest"] != plans[1]["digest"]


def test_a_plan_is_continued(runs, tmp_path):
    given = ("--labels", runs / "labels", "--method", "longest")
    first = planned(*given, "--budget", 2, "--out", tmp_path / "first.json")
    for method in METHODS:
        out = tmp_path / f"{method}.json"
        more = ("--labels", runs / "labels", "--method", method, "--labeled", tmp_path / "first.json")
        plan = planned(*more, "--budget", 3, "--out", out)
        assert plan["labeled"] == 2
        assert chosen(plan)[:2] == chosen(first)
        assert len(set(chosen(plan))) == 5


def test_ground_follows_a_plan(runs, tmp_path):
    """The random plan gives the run that no plan gives; another plan uses other episodes."""
    ground = ("ground", f"policy={runs}/policy", f"labels={runs}/labels", "labeled_episodes=2")
    ground = (*ground, "training.steps=2", "held_out=0.25")
    scores = {}
    for method in ("", "random", "longest"):
        plan = ()
        if method:
            file = tmp_path / f"{method}.json"
            planned(
                *("--labels", runs / "labels", "--held-out", 0.25, "--budget", 3, "--out", file),
                "--method",
                method,
            )
            plan = (f"plan={file}",)
        ok(*ground, *plan, f"out={tmp_path}/ground{method}")
        scores[method] = (tmp_path / f"ground{method}" / "model.safetensors").read_bytes()
    assert scores[""] == scores["random"]
    assert scores[""] != scores["longest"]

    plan = tmp_path / "longest.json"
    command = (*ground, f"plan={plan}", f"out={tmp_path}/groundlongest")
    used = tmp_path / "groundlongest/used_plan.json"
    assert used.read_bytes() == plan.read_bytes()
    plan.write_text(json.dumps(json.loads(plan.read_text())))
    assert "is already finished" in ok(*command).stderr
    plan.write_bytes((tmp_path / "random.json").read_bytes())
    assert "longest.json has changed since the run in" in refused(*command)
    assert used.read_bytes() != plan.read_bytes()
    plan.write_text("{}")
    assert "episodes is missing" in refused(*command)


def test_episodes_are_compared_by_a_policy_and_weighted_by_its_uncertainty(runs, tmp_path):
    ground = ("ground", f"policy={runs}/policy", f"labels={runs}/labels", "labeled_episodes=2")
    ok(*ground, "training.steps=20", f"out={tmp_path}/ground")
    given = ("--labels", runs / "labels", "--budget", 3)
    found = {}
    for name in ("", "policy", "ground"):
        folder = {"policy": runs / "policy", "ground": tmp_path / "ground"}.get(name)
        policy = ("--policy", folder) if folder else ()
        plan = planned(*given, *policy, "--out", tmp_path / f"{name}.json")
        assert bool(plan["policy_weights"]) == bool(name)
        found[name] = [each["coverage"] for each in plan["episodes"]]
    assert found[""] != found["policy"] != found["ground"]
    assert "--policy must be a policy of latent actions" in refused(
        "plan", *given, "--policy", bc(runs), "--out", tmp_path / "no.json"
    )


def bc(runs):
    """Return the folder of a policy that is not latent."""
    data = (f"data.path={json.loads((runs / 'labels/manifest.json').read_text())['data']['path']}",)
    short = ("training.steps=2", "training.eval_every=0", "data.resolution=32", f"out={runs}/bc")
    ok("train-policy", "policy=bc", *data, *TINY_POLICY, *short)
    return runs / "bc"


def test_success_comes_from_rollouts_of_grounded_policies(runs, tmp_path):
    ground = ("ground", f"policy={runs}/policy", f"labels={runs}/labels", "training.steps=2")
    for k in (2, 4):
        out = tmp_path / f"k{k}"
        ok(*ground, f"labeled_episodes={k}", f"out={out}/ground")
        (out / "rollout").mkdir()
        rollout = {"config": {"policy": f"{out}/ground"}, "env": "babyai/GoToLocal"}
        rollout |= {"success": 0.2 * k, "episodes": 400}
        (out / "rollout/rollout.json").write_text(json.dumps(rollout))
    given = ("--labels", runs / "labels", "--method", "random", "--budget", 4)
    plan = planned(*given, "--results", tmp_path, "--out", tmp_path / "plan.json")
    assert plan["rollouts"] == 2
    assert 0.35 < plan["episodes"][1]["success"] < 0.6
    assert 0.65 < plan["episodes"][3]["success"] < 0.9
    assert (
        "No rollouts" not in ok("plan", *given, "--results", tmp_path, "--out", tmp_path / "plan.json").stdout
    )
    assert "--results must hold rollouts" in refused(
        "plan", *given, "--results", runs / "lam", "--out", tmp_path / "no.json"
    )


def test_what_is_refused(runs, blocks, tmp_path):
    given = ("plan", "--labels", runs / "labels", "--out", tmp_path / "plan.json", "--budget")
    assert "--budget must be at most 7" in refused(*given, 8)
    assert "--labels, or --lam and --data, must be given" in refused("plan", "--budget", 1)
    assert "--labels, or" in refused("plan", "--lam", runs / "lam", "--budget", 1)
    assert "--method must be" in refused(*given, 2, "--method", "best")
    assert not (tmp_path / "plan.json").exists()
    ok(*given, 2)
    assert "must be new or a plan with these settings" in refused(*given, 3)
    (tmp_path / "broken.json").write_text("{}")
    assert "episodes is missing" in refused(
        *("plan", "--labels", runs / "labels", "--budget", 1, "--labeled", tmp_path / "broken.json"),
        *("--out", tmp_path / "new.json"),
    )
    assert "must be new or" in refused(*given[:3], "--budget", 1, "--out", tmp_path)
    ground = ("ground", f"policy={runs}/policy", f"labels={runs}/labels", f"plan={tmp_path}/plan.json")
    assert "labeled episodes must be between 0 and 2, the number of episodes of the plan, got 3" in refused(
        *ground, "labeled_episodes=3", f"out={tmp_path}/ground"
    )
    message = [
        refused(*ground, "labeled_episodes=1", f"split_seed={seed}", f"out={tmp_path}/ground", "held_out=0.8")
        for seed in range(1)
    ]
    assert "the plan must list training episodes only" in message[0]


def test_a_plan_holds_for_a_copy_of_the_same_frames_only(runs, blocks, tmp_path):
    planned("--labels", runs / "labels", "--budget", 2, "--out", tmp_path / "plan.json")
    store = open_store(DataConfig(path=str(blocks), resolution=16))
    found = read_plan(tmp_path / "plan.json", store)
    assert found is not None
    assert len(found) == 2
    other = open_store(DataConfig(path=str(write_blocks(tmp_path / "other.npz", seed=1)), resolution=32))
    with pytest.raises(UserError, match=r"must list episodes of .*Make the plan for this data"):
        read_plan(tmp_path / "plan.json", other)
    assert read_plan("", store) is None


def test_a_planned_choice_is_nested_and_in_order():
    train, order = np.arange(6), np.array([4, 1, 5])
    assert choose_labeled(train, 1, 0, order).tolist() == [4]
    assert choose_labeled(train, 2, 0, order).tolist() == [1, 4]
    assert choose_labeled(train, None, 0, order).tolist() == [1, 4, 5]
    with pytest.raises(UserError, match="held out"):
        choose_labeled(np.arange(5), 1, 0, order)


def test_a_plan_without_effect_is_refused(runs, tmp_path):
    labels, plan, out = f"labels={runs}/labels", "plan=plan.json", f"out={tmp_path}/no"
    data = json.loads((runs / "labels/manifest.json").read_text())["data"]["path"]
    for command, message in (
        (("ground", "mode=online", f"policy={runs}/policy", labels), "plan must be empty for mode=online"),
        (("train-policy", labels), "plan must be empty where all episodes have labels, got plan.json"),
        (
            ("train-lam", *TINY_LAM, f"data.path={data}"),
            "labeled_episodes must be at least 1 with plan, got 0",
        ),
    ):
        assert message in refused(*command, plan, out)
    assert not (tmp_path / "no").exists()
