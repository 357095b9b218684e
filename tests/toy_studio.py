"""An untrained LAM, a policy that follows guides, and data of PushT, for tests of the studio."""

from dataclasses import replace

import numpy as np
import torch

from latentact.envs.spec import make_env
from latentact.lams.models.lapo import LapoConfig
from latentact.policies.guided import GuidedConfig
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
