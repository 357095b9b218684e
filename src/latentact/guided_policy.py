"""Policies that follow a guide, behind one small interface: what they look at, and one action per call.

Three kinds are known by their folder: LeRobot policies of the plugin (`lam_diffusion`, `lam_act`), our own
guided policies, and our own grounded latent policies, whose decoder alone turns a latent action into robot
actions. Observations are dicts with LeRobot's keys: `observation.images.<camera>` uint8 `[h, w, 3]`,
`observation.state` float32 `[s]`, `task`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from latentact.data.decode.resize import resize
from latentact.errors import UserError, missing_extra
from latentact.io.atomic import read_json
from latentact.io.hub import resolve_folder
from latentact.policies.actor import PolicyActor, action_values
from latentact.policies.policy import GuideSpec, Policy
from latentact.types import ActionSpace, LatentActionSpec

IMAGES = "observation.image"
STATE = "observation.state"


@runtime_checkable
class GuidedPolicy(Protocol):
    """A policy that takes the guide's tokens of the present step, or of several."""

    latent: LatentActionSpec | None
    """What the latent actions meant that it was trained with; None where it does not say."""
    lam_weights: str
    """Hash of the LAM's weights; empty where it does not say."""
    gap_s: float
    """Seconds that its latent actions spanned; 0 where it does not say."""
    token_size: int
    """Numbers of one step's tokens, k x d."""
    tokens: str
    """continuous, vectors or codes."""
    offsets: tuple[int, ...]
    """Steps ahead whose tokens it sees; (0,): only the present ones."""
    stride: int
    """Robot actions per latent action."""
    fps: float
    """Robot actions per second in its training data; 0: unknown."""
    cameras: tuple[str, ...]
    """Keys of the pictures that it looks at; ("",): any one."""
    state_size: int
    """Numbers of the robot state that it looks at; 0: none."""
    actions: ActionSpace
    """What its actions are."""
    without_guide: bool
    """Whether it has learned to act without a guide, too."""

    def reset(self) -> None:
        """Forget everything: a new episode begins."""
        ...

    def prepare(
        self, observation: dict[str, Any], latent_action: Float32[Tensor, "o f"] | None
    ) -> dict[str, Any]:
        """Return what `act` takes; None: without a guide, for a policy that has learned that."""
        ...

    def act(self, batch: dict[str, Any]) -> np.ndarray:
        """Return one robot action: float32 `[a]`, or an int64 class by its `ActionSpace.values`."""
        ...


def load_guided_policy(where: str | Path, device: str = "cpu") -> GuidedPolicy:
    """Load a policy that can follow a guide, of any of the three kinds.

    Args:
        where: folder or hub id; a LeRobot training's output folder stands for its last checkpoint.
        device: cpu, cuda or mps.

    Raises:
        UserError: it is missing, damaged, or acts by observations alone.
    """
    last = Path(where) / "checkpoints" / "last" / "pretrained_model"
    folder = resolve_folder(last if last.is_dir() else where)
    values = read_json(folder / "config.json")
    if isinstance(values, dict) and "type" in values:
        return LeRobotGuided(folder, device)
    policy = Policy.from_pretrained(folder, device)
    if policy.spec.guide is not None and policy.spec.action_space is not None:
        return OwnGuided(policy, policy.spec.guide, device)
    if policy.latent is not None and policy.decoder is None:
        raise UserError(f"{where} predicts latent actions; ground it first: latentact ground --help.")
    if policy.latent is None:
        raise UserError(
            f"{where} acts by what it sees alone and cannot follow a guide; give a grounded latent policy, "
            "one of policy=guided, or lam_diffusion or lam_act."
        )
    return Decoded(policy, device)


def picture(observation: dict[str, Any], camera: str) -> np.ndarray:
    """Return the picture of a camera; where there is only one, that one."""
    pictures = {key: value for key, value in observation.items() if key.startswith(IMAGES)}
    if camera in pictures:
        return pictures[camera]
    if len(pictures) == 1:
        return next(iter(pictures.values()))
    raise UserError(
        f"the policy looks at {camera or 'one picture'} and there is {', '.join(pictures) or 'none'}; map "
        "one of the robot's cameras to that key."
    )


class Decoded:
    """A grounded latent policy that is told its latent action: only its decoder is used.

    Args:
        policy: grounded, with a decoder.
        device: where it is.
    """

    lam_weights = ""
    offsets: tuple[int, ...] = (0,)
    cameras: tuple[str, ...] = ()
    without_guide = False

    def __init__(self, policy: Policy, device: str) -> None:
        assert policy.decoder is not None
        assert policy.latent is not None
        assert policy.spec.action_space is not None
        self._policy, self._decoder, self._device = policy, policy.decoder, device
        self.latent: LatentActionSpec | None = policy.latent
        self.gap_s = policy.latent.frame_gap_s
        self.token_size = policy.latent.tokens * policy.latent.token_dim
        self.tokens = str(getattr(policy.config, "target", "continuous"))
        self.stride, self.fps = policy.spec.stride, policy.spec.fps
        self.state_size = policy.spec.state_size if self._decoder.config.use_state else 0
        self.actions: ActionSpace = policy.spec.action_space
        self.reset()

    def reset(self) -> None:
        """Forget the actions still to be taken."""
        self._plan: list[np.ndarray] = []

    def prepare(
        self, observation: dict[str, Any], latent_action: Float32[Tensor, "o f"] | None
    ) -> dict[str, Any]:
        """Return the decoder's input: normalised numbers or one-hot codes, and the state where it sees it."""
        assert latent_action is not None
        latent, target = latent_action.to(self._device), self._policy.spec.target
        if target.kind == "classes":
            latent = torch.nn.functional.one_hot(latent.long(), target.size).flatten(1).float()
        else:
            latent = (latent - self._policy.mean) / self._policy.std
        state = None
        if self.state_size:
            state = torch.from_numpy(_state(observation, self.state_size))[None].to(self._device)
        return {"latent": latent[:, None], "state": state}

    @torch.inference_mode()
    def act(self, batch: dict[str, Any]) -> np.ndarray:
        """Return the next action of the latent action that was given when none was left."""
        if not self._plan:
            state = None if batch["state"] is None else self._policy.normal_state(batch["state"])
            scores = self._decoder(batch["latent"], state)[0]
            if not scores.isfinite().all():
                raise UserError(
                    "the actions of the policy must be finite, got NaN or infinity. Train it again, with a "
                    "smaller learning rate."
                )
            chosen = scores.argmax(-1) if self.actions.discrete else self._decoder.unnormalise(scores)
            self._plan = [*action_values(self.actions, chosen.numpy(force=True))]
        return np.asarray(self._plan.pop(0))


class OwnGuided:
    """A policy of `policy=guided`.

    Args:
        policy: the policy.
        guide: what of the guide it sees.
        device: where it is.
    """

    lam_weights = ""
    stride = 1

    def __init__(self, policy: Policy, guide: GuideSpec, device: str) -> None:
        assert policy.spec.action_space is not None
        self._actor = PolicyActor(policy, device)
        self.latent = policy.latent
        self.gap_s = policy.latent.frame_gap_s if policy.latent else 0.0
        self.tokens, self.offsets, self.token_size = guide.tokens, guide.offsets, guide.size
        self.without_guide = guide.dropout > 0
        self.fps, self.cameras = policy.spec.fps, (policy.spec.camera,)
        self.state_size = policy.spec.state_size if policy.config.network.use_state else 0
        self.actions: ActionSpace = policy.spec.action_space

    def reset(self) -> None:
        """Forget the frames that were seen."""
        self._actor.reset(1)

    def prepare(
        self, observation: dict[str, Any], latent_action: Float32[Tensor, "o f"] | None
    ) -> dict[str, Any]:
        """Return a batch of one for the policy's actor."""
        state = _state(observation, self.state_size)[None] if self.state_size else None
        return {
            "pixels": picture(observation, self.cameras[0])[None],
            "state": state,
            "tasks": [str(observation.get("task", ""))],
            "guide": None if latent_action is None else latent_action[None].numpy(force=True),
        }

    def act(self, batch: dict[str, Any]) -> np.ndarray:
        """Return the action."""
        return np.asarray(self._actor.act(**batch)[0])


class LeRobotGuided:
    """A LeRobot policy that is conditioned on LAM tokens, from its `pretrained_model` folder.

    It looks at its guide before every action: of each predicted chunk only the first action is taken.

    Args:
        folder: the checkpoint.
        device: where to run it.

    Raises:
        UserError: it is of an unknown type, cannot be loaded, or is not conditioned on tokens.
    """

    latent: LatentActionSpec | None = None
    offsets: tuple[int, ...] = (0,)
    stride = 1

    def __init__(self, folder: Path, device: str) -> None:
        try:
            from lerobot.configs import PreTrainedConfig
            from lerobot.policies import get_policy_class, make_pre_post_processors
            from lerobot.utils.import_utils import register_third_party_plugins
        except ModuleNotFoundError as error:
            raise missing_extra(error.name or "lerobot", "lerobot") from error
        register_third_party_plugins()
        kind = str(read_json(folder / "config.json")["type"])
        if kind not in PreTrainedConfig.get_known_choices():
            raise UserError(
                f"{folder} is a policy of type {kind!r}, which no installed package knows; "
                "install its LeRobot plugin."
            )
        config: Any = PreTrainedConfig.from_pretrained(folder)
        if not getattr(config, "use_lam_conditioning", False):
            raise UserError(
                f"{folder} is a {kind} that acts by what it sees alone; give a lam_diffusion or lam_act "
                "trained with use_lam_conditioning=true."
            )
        config.device = device
        config.n_action_steps = 1  # a chunk would be acted out blind to what the guide says next
        self._policy: Any = get_policy_class(kind).from_pretrained(folder, config=config).eval().to(device)
        overrides = {"device_processor": {"device": device}}
        self._before, self._after = make_pre_post_processors(
            config, pretrained_path=str(folder), preprocessor_overrides=overrides
        )
        self._device, self._key = device, str(config.lam_tokens_key)
        self.tokens = "vectors" if config.lam_use_vq_tokens else "continuous"
        self.lam_weights, self.token_size = str(config.lam_weights), int(config.token_dim)
        self.gap_s, self.fps = float(config.lam_frame_gap_s), float(config.lam_fps)
        self.without_guide = config.lam_dropout > 0
        self._shapes = {key: f.shape for key, f in config.image_features.items()}
        self.cameras = tuple(self._shapes)
        state = config.robot_state_feature
        self.state_size = state.shape[0] if state else 0
        self.actions = ActionSpace(kind="continuous", size=config.action_feature.shape[0])

    def reset(self) -> None:
        """Forget the observations and the actions still to be taken."""
        for part in (self._policy, self._before, self._after):
            part.reset()

    def prepare(
        self, observation: dict[str, Any], latent_action: Float32[Tensor, "o f"] | None
    ) -> dict[str, Any]:
        """Return the preprocessed batch of one, with the tokens in it."""
        from lerobot.policies.utils import prepare_observation_for_inference

        seen = {key: self._sized(picture(observation, key), shape) for key, shape in self._shapes.items()}
        if self.state_size:
            seen[STATE] = _state(observation, self.state_size)
        if latent_action is not None:
            seen[self._key] = latent_action[0].numpy(force=True)
        device, task = torch.device(self._device), str(observation.get("task", ""))
        return cast("dict[str, Any]", self._before(prepare_observation_for_inference(seen, device, task)))

    def _sized(self, frame: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        _, height, width = shape
        if frame.shape[:2] == (height, width):
            return frame
        if height != width or frame.shape[0] != frame.shape[1]:
            raise UserError(
                f"the policy looks at pictures of {width}x{height} pixels and the camera gives "
                f"{frame.shape[1]}x{frame.shape[0]}; set the camera to that size."
            )
        return resize(frame[None], height)[0]

    @torch.inference_mode()
    def act(self, batch: dict[str, Any]) -> np.ndarray:
        """Return the action in the robot's units."""
        return np.asarray(self._after(self._policy.select_action(batch))[0].float().numpy(force=True))


def _state(observation: dict[str, Any], size: int) -> Float32[np.ndarray, " s"]:
    state = observation.get(STATE)
    if state is None or state.shape != (size,):
        got = "none" if state is None else f"{len(state)} numbers"
        raise UserError(
            f"the policy wants a robot state of {size} numbers and got {got}; give the robot or environment "
            "that it was trained for."
        )
    return np.asarray(state, np.float32)
