"""Settings of `lam_diffusion` and `lam_act`: those of the host policy, and the source of the LAM tokens.

The host receives the tokens as environment state, an input that both policies have: `env_state_feature` gives
its width, from which the host derives the size of its networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.utils.constants import OBS_STATE

from latentact.data.time_base import gaps_agree
from latentact.errors import UserError
from latentact.io.atomic import read_json

if TYPE_CHECKING:
    from latentact.labeling.frozen import FrozenLam

Host: Any = object
"""Placeholder for the host, the next base class of a config; with LeRobot's base class here, its defaults
would override the host's."""

LAM_FRAMES = "observation.lam_frames"
"""Batch key of the camera's raw uint8 frames, which the preprocessor sets aside for the LAM."""
LAM_STATES = "observation.lam_states"
"""Batch key of the raw robot states, which the preprocessor sets aside for a LAM that uses them."""
LAM_VALID = "observation.lam_valid"
"""Column that is false where a row has no LAM token because the episode ends within the frame gap."""
PROVENANCE = "lam_tokens.json"
"""File in a dataset's `meta` that records which LAM produced the tokens."""


@dataclass
class LamPolicyConfig(Host):
    """Settings that both policies add to those of the host."""

    use_lam_conditioning: bool = True
    """Whether the policy is conditioned on LAM tokens; if not, it equals the host bit for bit."""
    use_precomputed_lam_tokens: bool = True
    """Whether training reads tokens from the dataset; else the frozen LAM computes them from the images."""
    lam_tokens_key: str = "observation.lam_tokens"
    """Column and batch key of the tokens, k * d values per row."""
    lam_model_path: str = ""
    """Folder or hub id of the LAM; required if tokens are not precomputed."""
    lam_camera_key: str = ""
    """Camera of the LAM's frames; empty: the only camera."""
    lam_num_learned_tokens: int = 2
    """k: tokens per transition."""
    lam_action_latent_dim: int = 32
    """d: dimensions per token."""
    lam_temporal_aggregation: Literal["latest", "concat"] = "latest"
    """latest: tokens of the current transition; concat: tokens of every observation step."""
    lam_use_vq_tokens: bool = False
    """Whether tokens are taken after the LAM's quantizer, if it has one, or before."""
    lam_projection_dim: int = 32
    """Width of the projection of the tokens, the input of the host."""
    lam_dropout: float = 0.0
    """Fraction of training samples whose guide is hidden; above 0 the policy also works without a guide."""
    lam_frame_gap: int = 0
    """Rows between the two frames of a transition computed on the fly; 0: the LAM's own frame gap."""
    lam_frame_gap_s: float = 0.0
    """Seconds that a token spans; set when the LAM is known."""
    lam_fps: float = 0.0
    """Rows per second of the training data; set when the dataset is known."""
    lam_weights: str = ""
    """Weights hash of the LAM that the policy was trained with; set, then verified, when the LAM is known."""

    def __post_init__(self) -> None:
        """Validate the configuration.

        Raises:
            UserError: a setting cannot be used.
        """
        super().__post_init__()
        for name in ("lam_num_learned_tokens", "lam_action_latent_dim", "lam_projection_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.lam_dropout < 1:
            raise UserError(f"lam_dropout must be at least 0 and less than 1, got {self.lam_dropout}.")
        if self.lam_temporal_aggregation not in ("latest", "concat"):
            raise UserError(
                f"lam_temporal_aggregation must be latest or concat, got {self.lam_temporal_aggregation!r}."
            )
        if self.lam_frame_gap < 0:
            raise UserError(f"lam_frame_gap must be at least 0, got {self.lam_frame_gap}.")
        if not self.lam_tokens_key.startswith("observation."):
            raise UserError(
                f"lam_tokens_key must begin with 'observation.', got {self.lam_tokens_key!r}. Rename the "
                "column: LeRobot passes only such columns to a policy."
            )
        if self.lam_on_the_fly and not self.lam_model_path:
            raise UserError(
                "lam_model_path must be given where use_precomputed_lam_tokens is false, got none. Give the "
                "folder or hub id of the LAM, or precompute the tokens."
            )

    @property
    def lam_on_the_fly(self) -> bool:
        """Whether the policy's own frozen LAM computes the tokens."""
        return self.use_lam_conditioning and not self.use_precomputed_lam_tokens

    @property
    def token_dim(self) -> int:
        """Values per transition, k * d."""
        return self.lam_num_learned_tokens * self.lam_action_latent_dim

    @property
    def lam_transitions(self) -> int:
        """Transitions whose tokens condition one prediction.

        A window of n observations holds n transitions of the dataset's column, which start at its rows, but
        only n - 1 between its frames. ACT's single observation gets the preceding frame as input of the LAM.
        """
        if self.lam_temporal_aggregation == "latest":
            return 1
        return self.n_obs_steps if self.use_precomputed_lam_tokens else max(self.n_obs_steps - 1, 1)

    @property
    def conditioning_dim(self) -> int:
        """Input width of the projection."""
        return self.lam_transitions * self.token_dim

    @property
    def real_env_state_feature(self) -> PolicyFeature | None:
        """Environment state of the data itself, without tokens."""
        return super().env_state_feature

    @property
    def env_state_feature(self) -> PolicyFeature | None:
        """Environment state of the host: projected tokens, then the data's own environment state."""
        real = self.real_env_state_feature
        if not self.use_lam_conditioning:
            return real
        return PolicyFeature(
            type=FeatureType.ENV, shape=(self.lam_projection_dim + (real.shape[0] if real else 0),)
        )

    @property
    def lam_camera(self) -> str:
        """Key of the camera of the LAM's frames.

        Raises:
            UserError: the camera does not exist, or there are several and none is chosen.
        """
        there = [*self.image_features]
        if self.lam_camera_key in there:
            return self.lam_camera_key
        if len(there) == 1 and not self.lam_camera_key:
            return there[0]
        raise UserError(f"lam_camera_key must be one of {', '.join(there)}, got {self.lam_camera_key!r}.")

    @cached_property
    def lam(self) -> FrozenLam:
        """The frozen LAM, loaded on first use; not part of the policy's modules or files.

        Raises:
            UserError: the LAM is missing, has a different size, or is not the one that the policy was trained
                with.
        """
        from latentact.labeling.frozen import FrozenLam

        lam = FrozenLam(self.lam_model_path)
        self.check_tokens(vars(lam.spec), f"the LAM {self.lam_model_path}")
        return lam

    @property
    def lam_delta_indices(self) -> list[int]:
        """Rows, relative to the current one, of the LAM's frames."""
        return self.lam.offsets(self.lam_transitions, self.lam_frame_gap or self.lam.spec.frame_gap)

    @property
    def host_delta_indices(self) -> list[int] | None:
        """Rows of the host's observations; None: the current one, without a time axis."""
        return super().observation_delta_indices

    @property
    def observation_delta_indices(self) -> Any:
        """Rows of the host's observations and, on the fly, of the LAM's frames."""
        host = self.host_delta_indices
        return sorted({*(host or [0]), *self.lam_delta_indices}) if self.lam_on_the_fly else host

    def check_tokens(self, spec: dict[str, Any], source: str, tokens_kind: str = "") -> None:
        """Check that tokens fit the settings, and record the LAM that produced them.

        Args:
            spec: fields of a `LatentActionSpec`.
            source: name of the dataset or LAM, for messages.
            tokens_kind: "vq" after the quantizer, "continuous" before it; empty: both are available.

        Raises:
            UserError: the tokens do not fit.
        """
        k, d = spec["tokens"], spec["token_dim"]
        if (k, d) != (self.lam_num_learned_tokens, self.lam_action_latent_dim):
            raise UserError(
                f"{source} must have {self.lam_num_learned_tokens} tokens of {self.lam_action_latent_dim} "
                f"values, got {k} of {d}. Set lam_num_learned_tokens={k} and "
                f"lam_action_latent_dim={d}."
            )
        if tokens_kind and (tokens_kind == "vq") != self.lam_use_vq_tokens:
            mine, theirs = (str(vq).lower() for vq in (self.lam_use_vq_tokens, tokens_kind == "vq"))
            raise UserError(
                f"lam_use_vq_tokens must be {theirs} for {source}, got {mine}. "
                f"Set lam_use_vq_tokens={theirs}, or precompute the other kind."
            )
        if self.lam_weights and spec["weights"] != self.lam_weights:
            raise UserError(
                f"{source} must be of the LAM with weights {self.lam_weights}, got weights "
                f"{spec['weights']}. Give the LAM that the policy was trained with."
            )
        self.lam_weights = spec["weights"]
        self.lam_frame_gap_s = self.lam_frame_gap_s or spec["frame_gap_s"]

    def check_dataset(self, meta: Any) -> None:
        """Check that a dataset has the tokens, or that the LAM's frame gap fits its rate.

        Args:
            meta: LeRobot's `LeRobotDatasetMetadata`.

        Raises:
            UserError: the column is missing or does not fit, or the frame gap does not fit the rate.
        """
        self.lam_fps = float(meta.fps)
        if self.lam_on_the_fly:
            self._check_gap(meta.fps)
            self._check_state(meta)
            return
        if self.lam_tokens_key not in meta.features:
            raise UserError(
                f"the dataset {meta.repo_id} must have a column {self.lam_tokens_key!r}, got none. Add it "
                "with `latentact precompute`, or set use_precomputed_lam_tokens=false."
            )
        provenance = Path(meta.root) / "meta" / PROVENANCE
        if provenance.exists():
            values = read_json(provenance)
            self.check_tokens(values["spec"], f"the dataset {meta.repo_id}", values.get("tokens", ""))
        (width,) = meta.features[self.lam_tokens_key]["shape"]
        if width != self.token_dim:
            raise UserError(
                f"{self.lam_tokens_key} of {meta.repo_id} must have lam_num_learned_tokens * "
                f"lam_action_latent_dim = {self.token_dim} values per row, got {width}. Set both to those "
                "of the LAM."
            )

    def _check_state(self, meta: Any) -> None:
        from latentact.lams.contract import states_message

        state = meta.features.get(OBS_STATE)
        size = state["shape"][0] if state else 0
        if self.lam.state_size not in (0, size):
            raise UserError(states_message(self.lam.spec, self.lam.state_size, size, str(meta.repo_id)))

    def _check_gap(self, fps: float) -> None:
        spec = self.lam.spec
        gap = self.lam_frame_gap or spec.frame_gap
        if spec.frame_gap_s and not gaps_agree(gap / fps, spec.frame_gap_s):
            raise UserError(
                f"lam_frame_gap must span {spec.frame_gap_s:g} s, the frame gap of the LAM "
                f"{self.lam_model_path}, got {gap} row(s) at {fps:g} fps, {gap / fps:g} s. Set "
                f"lam_frame_gap={max(1, round(spec.frame_gap_s * fps))}."
            )


@PreTrainedConfig.register_subclass("lam_diffusion")
@dataclass
class LamDiffusionConfig(LamPolicyConfig, DiffusionConfig):
    """Diffusion Policy conditioned on LAM tokens."""


@PreTrainedConfig.register_subclass("lam_act")
@dataclass
class LamActConfig(LamPolicyConfig, ACTConfig):
    """ACT conditioned on LAM tokens."""
