"""Every kind of policy acts through the one agent protocol, batch first."""

import json

import numpy as np
import pytest
import torch

import latentact
from latentact.agents.agent import Agent
from latentact.agents.load import load_agent
from latentact.envs.episode import EpisodeEnd, ExpertActor, run_episodes
from latentact.envs.spec import EnvError, make_env
from latentact.errors import UserError
from latentact.policies.contract import Policy
from latentact.stages import rollout as rolling
from toy_env import FRAME, VECTOR, constant_policy, toy
from toy_lerobot import SMALL

CAMERA = "observation.images.top"


def write_lerobot_policy(folder, kind, **settings):
    """Write an untrained LeRobot policy for PushT."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies import get_policy_class, make_policy_config, make_pre_post_processors
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    torch.manual_seed(0)
    inputs = {
        "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(2,)),
        CAMERA: PolicyFeature(type=FeatureType.VISUAL, shape=(3, 96, 96)),
    }
    config = make_policy_config(
        kind,
        input_features=inputs | settings.pop("more_inputs", {}),
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(2,))},
        pretrained_backbone_weights=None,
        device="cpu",
        **SMALL[kind.removeprefix("lam_")],
        **settings,
    )

    def stats(*shape, low=-1.0, high=1.0):
        values = {"mean": 0.0, "std": 1.0, "min": low, "max": high}
        return {name: torch.full(shape, value) for name, value in values.items()}

    get_policy_class(kind)(config).save_pretrained(folder)
    parts = make_pre_post_processors(
        config,
        dataset_stats={
            "observation.state": stats(2, low=0.0, high=512.0),
            "action": stats(2, low=0.0, high=512.0),
            CAMERA: stats(3, 1, 1),
        },
    )
    for part in parts:
        part.save_pretrained(folder)
    return folder


def observation(b, size=96, seed=0):
    rng = np.random.default_rng(seed)
    return {
        CAMERA: rng.integers(0, 256, (b, size, size, 3), np.uint8),
        "observation.state": 512 * rng.random((b, 2), np.float32),
        "task": [""] * b,
    }


def test_a_lerobot_policy_acts_as_lerobot_evaluates_it(tmp_path):
    """The oracle is the path of lerobot-eval: preprocess_observation, processors and select_action."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.envs.utils import preprocess_observation
    from lerobot.policies import get_policy_class, make_pre_post_processors

    folder = write_lerobot_policy(tmp_path / "policy", "act")
    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class("act").from_pretrained(folder, config=config).eval()
    before, after = make_pre_post_processors(config, pretrained_path=str(folder))
    agent = load_agent(folder)
    assert isinstance(agent, Agent)
    assert (agent.spec.cameras, agent.spec.state_size, agent.spec.latent) == ((CAMERA,), 2, None)
    agent.reset(3)
    policy.reset()
    for step in range(5):  # four actions of a chunk, and the first of the next
        seen = observation(3, seed=step)
        theirs = preprocess_observation(
            {"pixels": {"top": seen[CAMERA]}, "agent_pos": seen["observation.state"]}
        )
        with torch.inference_mode():
            expected = after(policy.select_action(before({**theirs, "task": [""] * 3}))).numpy()
        np.testing.assert_allclose(agent.act(seen), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["act", "diffusion", "lam_act"])
def test_rollout_of_a_lerobot_policy(tmp_path, kind):
    more = (
        {"lam_num_learned_tokens": 1, "lam_action_latent_dim": 4, "lam_dropout": 0.5}
        if kind == "lam_act"
        else {}
    )
    if more:
        from lerobot.configs import FeatureType, PolicyFeature

        tokens = PolicyFeature(type=FeatureType.STATE, shape=(4,))
        more["more_inputs"] = {"observation.lam_tokens": tokens}
    folder = write_lerobot_policy(tmp_path / "policy", kind, **more)
    found = [
        rolling.run(
            rolling.RolloutConfig(
                policy=str(folder),
                env="pusht",
                out=str(tmp_path / name),
                episodes=2,
                max_steps=5,
                record=0,
            )
        )
        for name in ("a", "b")
    ]
    assert found[0]["lengths"] == [5, 5]
    assert found[0]["returns"] == found[1]["returns"], "the noise of diffusion follows the seed"
    assert [e["seed"] for e in found[0]["per_episode"]] == [100_000, 100_001]


def test_a_lerobot_policy_that_cannot_act_here_is_refused(tmp_path):
    from lerobot.configs import FeatureType, PolicyFeature

    extra = {"observation.environment_state": PolicyFeature(type=FeatureType.ENV, shape=(3,))}
    folder = write_lerobot_policy(tmp_path / "policy", "act", more_inputs=extra)
    with pytest.raises(
        UserError, match=r"images and observation.state as inputs, got observation.environment_state"
    ):
        load_agent(folder)
    folder = write_lerobot_policy(tmp_path / "plain", "act")
    with pytest.raises(UserError, match="is not conditioned on latent actions"):
        load_agent(folder, guided=True)
    agent = load_agent(folder)
    with pytest.raises(UserError, match="images of 96x96 pixels, got 96x80"):
        agent.act({**observation(1), CAMERA: np.zeros((1, 80, 96, 3), np.uint8)})
    with pytest.raises(UserError, match="robot state must have 2 dimensions, got none"):
        agent.act({CAMERA: observation(1)[CAMERA], "task": [""]})


def test_policy_actor_is_deprecated_and_still_works(tmp_path):
    policy = Policy.from_pretrained(constant_policy(tmp_path / "policy", 1))
    with pytest.warns(DeprecationWarning, match=r"use latentact.load_agent"):
        actor = latentact.PolicyActor(policy)
    actor.reset(2)
    assert actor.act(np.stack([FRAME, FRAME]), None, ["", ""]).tolist() == [1, 1]
    agent = load_agent(tmp_path / "policy")
    agent.reset(2)
    seen = {"observation.images.camera": np.stack([FRAME, FRAME]), "task": ["", ""]}
    assert agent.act(seen).tolist() == [1, 1]
    with pytest.raises(UserError, match="is not conditioned on latent actions"):
        load_agent(tmp_path / "policy", guided=True)


# --- the environment loop


class Countdown:
    """Takes action 1; each episode ends by None after as many steps as its row has left."""

    def __init__(self, *left):
        self.left = list(left)

    def reset(self, num_envs):
        assert num_envs == len(self.left)

    def act(self, observation):
        assert observation["observation.images.camera"].shape == (len(self.left), 32, 32, 3)
        self.left = [n - 1 for n in self.left]
        return [1 if n >= 0 else None for n in self.left]


def test_each_episode_has_its_own_end():
    def step(env, default):
        return (*default[:2], env.seed == 4, *default[3:])

    envs = [make_env(toy("ToyLoop-v0", limit=4, step=step)) for _ in range(4)]
    frames = [[], []]
    episodes = run_episodes(
        Countdown(2, 9, 9, 9),
        envs,
        [1, 2, 4, 5],
        camera="observation.images.camera",
        frames=frames,
        record=("actions", "infos"),
    )
    ends = [EpisodeEnd.ACTOR, EpisodeEnd.TRUNCATED, EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED]
    assert [episode.end for episode in episodes] == ends
    assert [episode.steps for episode in episodes] == [2, 4, 1, 4]
    assert [len(seen) for seen in frames] == [3, 5]
    assert [len(episode.actions) for episode in episodes] == [len(e.infos) for e in episodes] == [2, 4, 1, 4]
    assert [episode.success for episode in episodes] == [None] * 4
    assert episodes[1].total_reward == 4
    (limited,) = run_episodes(Countdown(9), envs[:1], [1], camera="observation.images.camera", max_steps=3)
    assert (limited.end, limited.steps, limited.actions) == (EpisodeEnd.MAX_STEPS, 3, [])


@pytest.mark.parametrize("at", ["reset", "step"])
def test_a_failure_ends_its_own_episode_and_drops_later_ones(at):
    def fail(env, *default):
        if env.seed == 2:
            raise RuntimeError("jammed")
        return default[0] if default else (env.observe(), {})

    name = toy("ToyLoop-v0", limit=4, **{at: fail})
    envs = [make_env(name) for _ in range(3)]
    actor = Countdown(*[9] * (1 if at == "reset" else 3))
    episodes = run_episodes(actor, envs, [1, 2, 3], camera="observation.images.camera")
    assert [episode.end for episode in episodes] == [EpisodeEnd.TRUNCATED, EpisodeEnd.ENV_ERROR]
    assert isinstance(episodes[1].error, EnvError)
    assert [episode.steps for episode in episodes] == [4, 0]


def test_experts_act_side_by_side_as_alone():
    name = "babyai/GoToRedBallNoDists"
    envs, seeds = [make_env(name) for _ in range(2)], [3, 4]

    def run(envs, seeds):
        actor = ExpertActor(name, envs, seeds, explore=0.3)
        return run_episodes(
            actor, envs, seeds, camera="observation.images.agent", max_steps=40, record=("actions",)
        )

    together = run(envs, seeds)
    alone = [run(envs[:1], [seed])[0] for seed in seeds]
    assert [e.actions for e in together] == [e.actions for e in alone]
    assert all(e.success for e in together)


def test_continuous_actions_are_batched(tmp_path):
    folder = constant_policy(tmp_path / "policy", [0.25, -0.5])
    agent = load_agent(folder)
    envs = [make_env(toy("ToyLoop-v0", action=VECTOR)) for _ in range(2)]
    episodes = run_episodes(agent, envs, [1, 2], camera="observation.images.camera", record=("actions",))
    np.testing.assert_allclose(np.stack(episodes[1].actions), [[0.25, -0.5]] * 5)
    assert json.loads((folder / "config.json").read_text())["spec"]["camera"] == "observation.images.camera"
