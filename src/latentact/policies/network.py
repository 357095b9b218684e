"""The network that every policy shares."""

from __future__ import annotations

from dataclasses import dataclass

from latentact.errors import UserError, require_between


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Settings of the network that every policy shares, so that comparisons compare what was learned from."""

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
    frames: int = 1
    """Observed frames, latest last."""
    use_state: bool = False
    """Whether the network sees the robot state."""
    chunk: int = 1
    """Targets predicted at once."""
    execute: int = 1
    """Targets executed before the policy looks again."""

    def __post_init__(self) -> None:
        """Refuse values that no network can be built from."""
        if self.backbone not in ("impala", "patch"):
            raise UserError(f"network.backbone is {self.backbone!r}; wanted impala or patch.")
        for name, high in (("impala_scale", 256), ("patch", 1 << 14), ("frames", 256), ("chunk", 1 << 14)):
            require_between(f"network.{name}", getattr(self, name), 1, high)
        require_between("network.execute (at most network.chunk)", self.execute, 1, self.chunk)
