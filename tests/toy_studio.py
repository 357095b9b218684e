"""An untrained LAM, a policy that follows guides, and data of PushT, for tests of the studio."""

from dataclasses import replace

import numpy as np
import torch

from latentact.data.lerobot.writer import EpisodeBuffer, RecordSpec, stage_episode, write_dataset
from latentact.envs.spec import make_env
from latentact.lams.models.lapo import LapoConfig
from latentact.policies.decoder import DecoderConfig
from latentact.policies.guided import GuidedConfig
from latentact.policies.latent import LatentConfig
from latentact.policies.network import NetworkConfig
from latentact.policies.spec import PolicySpec, Target
from latentact.types import ActionSpace

SHAPE = {"backbone": "patch", "size": 32, "patch": 4, "idm_channels": (8,), "fdm_channels": (8,)}


def save_lam(folder, config, **spec):
    torch.manual_seed(0)
    model = config.build()
    if isinstance(config, LapoConfig):  # so that an untrained model uses several codes
        model.idm_head.weight.data *= 30
    model.spec = replace(model.spec, frame_gap_s=0.1, fps=10.0, **spec)
    model.save_pretrained(folder)
    return model


def save_policy(folder, spec):
    """Save an untrained policy for PushT that follows guides."""
    config = GuidedConfig(network=NetworkConfig(backbone="patch", patch=4, channels=(8,), use_state=True))
    space = ActionSpace(kind="continuous", size=2)
    about = PolicySpec(
        target=Target(kind="continuous", size=2),
        resolution=32,
        state_size=2,
        fps=10.0,
        camera="observation.images.top",
        action_space=space,
        guide=config.targets(spec, space).guide,
    )
    policy = config.build(about, spec)
    policy.set_action_stats(np.array([[200.0, 200.0], [300.0, 300.0]], np.float32), None)
    policy.save_pretrained(folder)


def save_grounded(folder, spec, camera):
    """Save an untrained latent policy with a decoder to four classes."""
    config = LatentConfig(network=NetworkConfig(backbone="patch", patch=4, channels=(8,)))
    target = config.targets(spec, None).target
    policy = config.build(PolicySpec(target=target, resolution=32, fps=10.0, camera=camera), spec)
    policy.ground(DecoderConfig(), ActionSpace(kind="discrete", size=4)).save_pretrained(folder)


def write_pusht(path, episodes=2, steps=15):
    """Write episodes of random moves as an npz file."""
    env, rng, rows = make_env("pusht", resolution=32), np.random.default_rng(0), []
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        for step in range(steps):
            action = (observation["agent_pos"] + rng.uniform(-40, 40, 2)).astype(np.float32)
            rows.append((observation["pixels"], observation["agent_pos"], action, step == steps - 1))
            observation = env.step(action)[0]
    columns = zip(("obs", "states", "action", "done"), map(np.array, zip(*rows, strict=True)), strict=True)
    np.savez(path, fps=10, **dict(columns))


def write_moving_block(folder, blocks, camera):
    """Write the npz dataset of `conftest.write_blocks` as a LeRobot dataset."""
    arrays, staged = np.load(blocks), []
    names = ("left", "right", "up", "down")
    spec = RecordSpec(
        fps=10,
        camera=camera,
        height=32,
        width=32,
        action_space=ActionSpace(kind="discrete", size=4),
        action_names=names,
        state_names=("x",),
        robot_type="toy",
    )
    ends = np.flatnonzero(arrays["done"]) + 1
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        staged.append(folder / f"{start}.npz")
        n = end - start
        buffer = EpisodeBuffer(
            frames=arrays["obs"][start:end],
            state=np.zeros((n, 1), np.float32),
            action=arrays["action"][start:end],
            reward=np.zeros(n, np.float32),
            success=np.zeros(n, bool),
            task="move",
        )
        stage_episode(staged[-1], spec, buffer)
    write_dataset(folder / "data", spec, staged, sidecars={})
    return folder / "data"
