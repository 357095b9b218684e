"""XLand-MiniGrid: rulesets by seed, the planner, recording without loss, and LAPO on grids of integers."""

import sys

import numpy as np
import pytest
import torch

from latentact.data.cache import DataConfig, open_store
from latentact.envs.episode import ExpertActor, batched_expert, run_batch, run_episodes
from latentact.envs.spec import env_spec, make_env
from latentact.errors import UserError

LEVEL = "xland/R1-9x9/1"


@pytest.fixture(autouse=True)
def _extra():
    pytest.importorskip("xminigrid")


@pytest.fixture(scope="module")
def suite():
    pytest.importorskip("xminigrid")
    from latentact.envs.suites.xland import XLand

    XLand().check(LEVEL)
    return XLand()


def demonstrate(seeds, explore, max_steps=0):
    """The expert's episodes, computed at once."""
    envs, expert = batched_expert(LEVEL, seeds, explore)
    return run_batch(
        expert,
        envs,
        seeds,
        camera="observation.images.agent",
        max_steps=max_steps,
        frames=[[] for _ in seeds],
        record=("actions", "states"),
    )


def test_a_seed_is_a_ruleset(suite):
    from latentact.envs.xland_planner import make_task

    task = make_task(1)
    assert task.goal.tolist() == [14, 3, 3, 0, 0]  # tile 3 (ball) of color 3 (blue), left of the agent
    assert task.text == "step to the right of the blue ball"
    assert task.tiles[0].tolist() == [3, 3]
    assert len({tuple(tile) for tile in task.tiles.tolist() if any(tile)}) == 4  # and three distractors
    again = make_task(1)
    assert np.array_equal(task.tiles, again.tiles)
    assert len({make_task(seed).text for seed in range(20)}) == 20


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("xland", "unknown XLand layout"),
        ("xland/R1-9x8/0", "did you mean 'R1-9x9'"),
        ("xland/R1-9x9", "must be a seed from 0 to 999999999, got ''"),
        ("xland/R1-9x9/-1", "got '-1'"),
    ],
)
def test_levels_that_do_not_exist(name, said):
    with pytest.raises(UserError, match=said):
        env_spec(name)


def test_frames_are_cells(suite):
    with pytest.raises(UserError, match="must be the agent's view of 5x5 cells, got resolution 64"):
        make_env(LEVEL, resolution=64)
    observation, info = make_env(LEVEL).reset(seed=4)
    cells = observation["pixels"]
    assert cells.shape == (5, 5, 3)
    assert not cells[..., 2].any()
    assert cells[..., 0].max() <= 12
    assert info["task"] == "step to the right of the blue ball"


def test_a_missing_extra_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "xminigrid", None)
    with pytest.raises(UserError, match=r"^'xminigrid' is not installed; .*latentact\[xland\]'\.$"):
        env_spec(LEVEL)


def test_the_planner_succeeds(suite):
    for explore in (0.0, 0.2):
        played = [demonstrate(range(i, i + 64), explore, 80) for i in range(0, 256, 64)]
        assert np.mean([bool(episode.success) for episodes in played for episode in episodes]) >= 0.99


def test_an_episode_is_the_same_alone_and_among_others(suite):
    seeds = [3, 8, 5]
    env = make_env(LEVEL)
    for seed, batched in zip(seeds, demonstrate(seeds, 0.3, 12), strict=True):
        (alone,) = run_episodes(
            ExpertActor(LEVEL, [env], [seed], 0.3),
            [env],
            [seed],
            camera="observation.images.agent",
            max_steps=12,
            frames=[[]],
            record=("actions", "states"),
        )
        assert batched.actions == alone.actions
        assert (batched.end, batched.successes, batched.task) == (alone.end, alone.successes, alone.task)
        assert batched.rewards == pytest.approx(alone.rewards)
        assert np.array_equal(batched.frames, alone.frames)
        assert np.array_equal(batched.states, alone.states)


def test_recorded_and_learned_from_without_loss(suite, tmp_path):
    from latentact.composition import load_experiment
    from latentact.policies.contract import Policy
    from latentact.stages import collect, ground, label, rollout, train_lam, train_policy

    data = tmp_path / "data"
    collected = collect.run(
        collect.CollectConfig(env=LEVEL, out=str(data), episodes=16, explore=0.2, workers=1)
    )
    assert collected.episodes == 16
    store = open_store(DataConfig(path=str(data), resolution=5))
    played = [e for e in demonstrate(range(16), 0.2) if e.success]
    assert np.array_equal(store.frames[: len(played[0].frames)], np.stack(played[0].frames))
    assert np.array_equal(store.frames[: store.starts[10]], np.concatenate([e.frames for e in played[:10]]))

    def settings(stage, cls, name, *more):
        short = [f"experiment={name}", "smoke_test=true", "training.batch_size=8", *more]
        return load_experiment(stage, cls, short)

    paths = {name: str(tmp_path / name) for name in ("lam", "labels", "policy", "ground")}
    config = settings(
        "train_lam", train_lam.TrainLamConfig, "lapo_xland", f"data.path={data}",
        "lam.bottleneck.commitment=0.25", "lam.bottleneck.ema_decay=0.999", "training.lr_schedule=cosine",
    )  # fmt: skip
    assert (config.lam.bottleneck.commitment, config.lam.bottleneck.decay) == (0.25, 0.999)
    train_lam.run(config, tmp_path / "lam")
    label.run(label.LabelConfig(lam=paths["lam"], data=DataConfig(path=str(data)), out=paths["labels"]))
    given = [f"labels={paths['labels']}"]
    train_policy.run(
        settings("train_policy", train_policy.TrainPolicyConfig, "lapo_agent_xland", *given),
        tmp_path / "policy",
    )
    given += [f"policy={paths['policy']}", "labeled_episodes=4"]
    ground.run(
        settings("ground", ground.GroundConfig, "lapo_action_decoder_xland", *given), tmp_path / "ground"
    )
    policy = Policy.from_pretrained(paths["ground"])
    assert policy.decoder is not None
    assert policy.decoder.codebook.abs().sum() > 0
    result = rollout.run(
        rollout.RolloutConfig(
            policy=paths["ground"],
            env=LEVEL,
            out=str(tmp_path / "rollout"),
            smoke_test=True,
            action_selection="sample",
            record=1,
        )
    )
    assert result["episodes"] == 2
    assert max(result["lengths"]) <= 20


def test_grids_of_the_policy_are_checked():
    from latentact.policies.bc import BcConfig
    from latentact.policies.conformance import check_policy
    from latentact.policies.network import NetworkConfig
    from latentact.policies.spec import PolicySpec, Target
    from latentact.types import ActionSpace

    space = ActionSpace(kind="discrete", size=6)
    spec = PolicySpec(resolution=5, target=Target(kind="classes", size=6), action_space=space)
    config = BcConfig(network=NetworkConfig(backbone="grid", grid_values=256, n_obs_steps=2))
    check_policy(config.build(spec))
    policy = BcConfig(network=NetworkConfig(backbone="grid", grid_values=16)).build(spec)
    words = torch.zeros(1, 0)
    cells = torch.randint(0, 16, (1, 1, 3, 5, 5), dtype=torch.uint8)
    enlarged = cells.repeat_interleave(4, 3).repeat_interleave(4, 4)
    assert torch.equal(policy(cells, None, words), policy(enlarged, None, words))
    with pytest.raises(UserError, match=r"integers below 16 \(network.grid_values\), got 200"):
        policy(torch.full((1, 1, 3, 5, 5), 200, dtype=torch.uint8), None, words)
