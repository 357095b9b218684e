"""LeRobot files of a policy folder, which make it a pretrained policy of type `latentact`.

They are plain JSON, written without LeRobot: `config.json` gets LeRobot's keys alongside our own, and the two
processor files hold LeRobot's standard steps. Normalization is the identity: the statistics are in the
policy's weights.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from latentact.types import ActionSpace, LatentActionSpec

TYPE = "latentact"
"""LeRobot policy type of our policies, registered by the plugin `lerobot_policy_latentact`."""
VLA_TYPE = "lam_vla"
"""LeRobot policy type of our vision-language-action models."""
SINGLE_CAMERA = "observation.image"
"""LeRobot's key of a single camera, for policies whose data has no camera key."""
NORMALIZATION = {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"}


def config_entries(
    *,
    camera: str,
    resolution: int,
    channels: int,
    state_size: int,
    actions: ActionSpace | None,
    n_obs_steps: int,
    latent: LatentActionSpec | None,
) -> dict[str, Any]:
    """Return LeRobot's entries of `config.json`.

    Args:
        camera: key of the camera; empty: `observation.image`.
        resolution: height and width of the frames in pixels.
        channels: channels of a frame.
        state_size: dimensions of the robot state that the policy uses; 0: none.
        actions: robot action space; None: the policy outputs no robot actions. A discrete one is a float32
            feature of shape (1,) that holds the environment's integer.
        n_obs_steps: observed frames.
        latent: spec of the policy's latent actions.
    """
    inputs = {camera or SINGLE_CAMERA: {"type": "VISUAL", "shape": [channels, resolution, resolution]}}
    if state_size:
        inputs["observation.state"] = {"type": "STATE", "shape": [state_size]}
    outputs = {}
    if actions is not None:
        outputs["action"] = {"type": "ACTION", "shape": [1 if actions.discrete else actions.size]}
    return {
        "type": TYPE,
        "n_obs_steps": n_obs_steps,
        "input_features": inputs,
        "output_features": outputs,
        "device": None,
        "use_amp": False,
        "use_peft": False,
        "push_to_hub": False,
        "repo_id": None,
        "private": None,
        "tags": None,
        "license": None,
        "pretrained_path": None,
        "pretrained_revision": None,
        "latent": None if latent is None else asdict(latent) | {"value_range": [*latent.value_range]},
        "normalization_mapping": NORMALIZATION,
        "optimizer_lr": 1e-4,
        "optimizer_weight_decay": 0.01,
        "optimizer_grad_clip_norm": 2.0,
    }


def processor_files(entries: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the contents of LeRobot's processor files by file name, from the entries of `config.json`."""
    inputs, outputs = entries["input_features"], entries["output_features"]
    to_cpu = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}

    def normalize(name: str, features: dict[str, Any]) -> dict[str, Any]:
        settings = {"eps": 1e-8, "features": features, "norm_map": NORMALIZATION}
        return {"registry_name": name, "config": settings}

    return {
        "policy_preprocessor.json": {
            "name": "policy_preprocessor",
            "steps": [
                {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
                {"registry_name": "to_batch_processor", "config": {}},
                to_cpu,
                normalize("normalizer_processor", {**inputs, **outputs}),
            ],
        },
        "policy_postprocessor.json": {
            "name": "policy_postprocessor",
            "steps": [normalize("unnormalizer_processor", outputs), to_cpu],
        },
    }
