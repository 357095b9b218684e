"""The network that every policy shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latentact.errors import UserError, require_between


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Settings of the network that every policy shares, so that comparisons compare what was learned from."""

    RENAMED: ClassVar = {"frames": "n_obs_steps", "chunk": "chunk_size", "execute": "n_action_steps"}

    backbone: str = "impala"
    """impala (LAPO's policy) or patch (cheap patch network)."""
    impala_scale: int = 4
    """impala: multiplier of the channels (16, 32, 32)."""
    patch: int = 8
    """patch: side of a patch in pixels."""
    channels: tuple[int, ...] = (64, 96)
    """patch: channels; two residual blocks each."""
    halve: bool = False
    """patch: whether each further level halves the resolution."""
    n_obs_steps: int = 1
    """Observed frames, latest last."""
    use_state: bool = False
    """Whether the network sees the robot state."""
    chunk_size: int = 1
    """Targets predicted at once."""
    n_action_steps: int = 1
    """Targets executed before the policy looks again."""

    def __post_init__(self) -> None:
        """Refuse values that no network can be built from."""
        if self.backbone not in ("impala", "patch"):
            raise UserError(f"network.backbone is {self.backbone!r}; wanted impala or patch.")
        for name, high in (
            ("impala_scale", 256),
            ("patch", 1 << 14),
            ("n_obs_steps", 256),
            ("chunk_size", 1 << 14),
        ):
            require_between(f"network.{name}", getattr(self, name), 1, high)
        require_between(
            "network.n_action_steps (at most network.chunk_size)", self.n_action_steps, 1, self.chunk_size
        )
