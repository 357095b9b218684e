"""PPO on a policy of ours: its own scores, what is frozen stays, and numbers keep to their bounds."""

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")

from latentact.data.samples import PolicyBatch
from latentact.envs.spec import make_env
from latentact.lams.contract import LatentActionModel
from latentact.learners.ppo.environment import PolicyEnv
from latentact.learners.ppo.online import ActorNetwork, PolicyFeatures, from_scratch, train_online
from latentact.policies.decoder import DecoderConfig
from latentact.policies.latent import LatentConfig
from latentact.policies.network import NetworkConfig
from latentact.policies.spec import PolicySpec, Target
from latentact.stages.ground_online import OnlineConfig, _scale_actions_to_bounds, random_play
from latentact.types import ActionSpace, LatentActions, LatentActionSpec
from toy_env import toy

LATENT = LatentActionSpec(
    model="lapo", tokens=1, token_dim=3, codebook_size=5, frame_gap=1, frame_gap_s=0.1, fps=10.0,
    resolution=32, camera="",
)  # fmt: skip
DISCRETE, CONTINUOUS = ActionSpace(kind="discrete", size=4), ActionSpace(kind="continuous", size=2)


def grounded(target, decoder, space, **spec):
    torch.manual_seed(0)
    network = NetworkConfig(backbone="patch", channels=(8,), n_obs_steps=2, use_state="state_size" in spec)
    kind = Target(kind="classes", size=5) if target == "codes" else Target(kind="continuous", size=3)
    latent = LatentConfig(network=network, target=target).build(
        PolicySpec(resolution=32, target=kind, fps=10.0, **spec), LATENT
    )
    policy = latent.ground(decoder, space)
    if decoder.mixture:
        policy.decoder.codebook.normal_()
    return policy.eval()


CASES = {
    "vectors": ("vectors", DecoderConfig(hidden=(8,)), DISCRETE, {}),
    "state and words": (
        "continuous",
        DecoderConfig(hidden=(8,), use_state=True),
        DISCRETE,
        {"state_size": 2, "words": ("go",)},
    ),
    "codes": ("codes", DecoderConfig(hidden=(8,)), DISCRETE, {}),
    "mixture": ("codes", DecoderConfig(hidden=(8,), mixture=True), DISCRETE, {}),
    "continuous": ("vectors", DecoderConfig(hidden=(8,)), CONTINUOUS, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scratch", [False, True])
@torch.no_grad()
def test_the_actor_gives_the_scores_of_the_policy(case, scratch):
    target, decoder, space, spec = CASES[case]
    policy = grounded(target, decoder, space, **spec)
    policy = from_scratch(policy) if scratch else policy
    frames = torch.randint(0, 256, (6, 2, 32, 32, 3), dtype=torch.uint8)
    size, words = policy.spec.state_size, len(policy.spec.words)
    inputs = {"state": torch.randn(6, size), "words": torch.randn(6, words)}
    observation = {"frames": frames} | {name: value for name, value in inputs.items() if value.shape[1]}
    latent, features = PolicyFeatures(policy)(observation)
    batch = PolicyBatch(
        frames=frames.permute(0, 1, 4, 2, 3), state=observation.get("state"),
        words=inputs["words"], target=torch.zeros(6, 0, 1), mask=torch.zeros(6, 0, dtype=torch.bool),
    )  # fmt: skip
    actor = ActorNetwork(policy, latent.shape[1])
    scores = actor(torch.cat([latent, features], dim=1))
    torch.testing.assert_close(scores, policy.action_scores(batch)[:, 0])


def pull():
    """Register an environment that pays for actions near (4, -1), of bounds 1..5 and -2..2."""
    box = gymnasium.spaces.Box(np.array([1, -2], np.float32), np.array([5, 2], np.float32))

    def step(env, default):
        return (default[0], -float(np.abs(env.taken[-1] - np.array([4.0, -1.0])).sum()), False, False, {})

    return toy("Pull-v0", action=box, limit=4, step=step)


def test_numbers_are_learned_between_their_bounds(tmp_path):
    config = OnlineConfig(env=pull(), envs=4, rollout_steps=32, batch_size=32, epochs=4, lr=0.01, entropy=0.0)
    policy = grounded("vectors", DecoderConfig(hidden=(8,)), CONTINUOUS)
    _scale_actions_to_bounds(config, policy.decoder, CONTINUOUS)
    assert policy.decoder.mean.tolist() == [3, 0]
    assert policy.decoder.std.tolist() == [2, 2]
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    train_online(
        policy, lambda number: PolicyEnv(make_env("Pull-v0"), policy, max_steps=3, seed=(0, number)), config,
        steps=1000, lr=0.01, frozen=True, seed=0, name="toy", metrics=tmp_path / "toy.csv",
    )  # fmt: skip
    changed = {key for key, value in policy.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"decoder.net.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    rows = [line.split(",") for line in (tmp_path / "toy.csv").read_text().splitlines()[1:]]
    assert [int(row[0]) for row in rows] == [*range(128, 1025, 128)]
    assert int(rows[0][3]) == 4 * (32 // 3)  # episodes of three steps
    assert float(rows[-1][1]) > float(rows[0][1])


class Brightness(LatentActionModel):
    """A LAM whose latent action is how bright the next frame is, and how many frames the clip has."""

    def __init__(self):
        torch.nn.Module.__init__(self)

    def encode(self, frames, valid=None, last=False, states=None):
        latent = torch.zeros(1, len(frames) - 1, 1, 3)
        latent[0, :, 0, 0] = frames[1:].float().mean((1, 2, 3))
        latent[0, :, 0, 1] = len(frames)
        return LatentActions(
            vectors=latent,
            continuous=latent,
            codes=None,
            valid=torch.ones(1, len(frames) - 1, dtype=torch.bool),
        )

    predict = loss = None


def test_random_actions_are_paired_with_what_they_did():
    def observe(env):
        return np.full((32, 32, 3), 10 + 50 * env.taken[-1] if env.steps else 0, np.uint8)

    name = toy("Bright-v0", action=gymnasium.spaces.Discrete(4), observe=observe, limit=5)
    policy = grounded("vectors", DecoderConfig(hidden=(8,)), DISCRETE)
    pairs = random_play(OnlineConfig(env=name, play_steps=12), policy, Brightness(), seed=3)
    assert len(pairs) == 12
    assert set(pairs.actions.flatten().tolist()) == {0, 1, 2, 3}
    assert torch.equal(pairs.inputs[:, 0], 10.0 + 50 * pairs.actions[:, 0])
    assert pairs.inputs[:, 1].tolist() == [6] * 10 + [3] * 2  # the last episode is cut
