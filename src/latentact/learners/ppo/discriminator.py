"""The discriminator of GAIL (Ho and Ermon, arXiv 1606.03476), and the reward that PPO gets from it.

D is the probability that a step is the expert's, from a logit. (In the paper D is the generator's.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Shaped
from torch import Tensor, nn

from latentact.policies.contract import Policy
from latentact.policies.network import STATE_LIMIT
from latentact.types import ActionSpace

RewardKind = Literal["gail", "airl", "neg"]


def imitation_reward(logit: Float[Tensor, "*b"], kind: RewardKind) -> Float[Tensor, "*b"]:
    """Return the reward of steps from the logit of D.

    gail: -log(1 - D), at least 0, rewards every further step. neg: log D, at most 0, rewards ending.
    airl: log D - log(1 - D), the logit itself (Fu et al., arXiv 1710.11248), has both signs.
    """
    if kind == "gail":
        return F.softplus(logit)
    return logit if kind == "airl" else -F.softplus(-logit)


class Discriminator(nn.Module):
    """Layers of tanh from a normalized state and an action to the logit of D.

    Args:
        size: length of a step, state and encoded action.
        hidden: widths of the layers.
        lr: learning rate of Adam.
        penalty: weight of the squared distance of its gradient's norm from 1.
    """

    def __init__(self, size: int, hidden: Sequence[int], lr: float, penalty: float) -> None:
        super().__init__()
        widths = [size, *hidden]
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
        self.network = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self.penalty = penalty
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr)

    def forward(self, steps: Float[Tensor, "b f"]) -> Float[Tensor, " b"]:
        """Return the logit of D."""
        return self.network(steps).squeeze(1)

    def update(self, expert: Float[Tensor, "b f"], own: Float[Tensor, "b f"]) -> float:
        """Take one step of Adam on equally many expert and policy steps; return the accuracy before it."""
        theirs, ours = self(expert), self(own)
        loss = F.softplus(-theirs).mean() + F.softplus(ours).mean()
        if self.penalty:
            mix = torch.rand(len(expert), 1)
            between = (mix * expert + (1 - mix) * own).requires_grad_()
            (gradient,) = torch.autograd.grad(self(between).sum(), between, create_graph=True)
            loss = loss + self.penalty * (gradient.norm(dim=1) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return ((theirs > 0).float().mean() + (ours < 0).float().mean()).item() / 2


def normalize_states(policy: Policy, states: Float32[np.ndarray, "n s"]) -> Float32[np.ndarray, "n s"]:
    """Return states as the network of a policy of `backbone=state` gets them: normalized and limited."""
    return policy.normal_state(torch.from_numpy(states)).clamp(-STATE_LIMIT, STATE_LIMIT).numpy()


def encode_steps(
    states: Float32[np.ndarray, "n s"],
    actions: Shaped[np.ndarray, "n *a"],
    over: Shaped[np.ndarray, " n"],
    space: ActionSpace,
) -> Float32[np.ndarray, "n f"]:
    """Return steps as the discriminator gets them: state, then action.

    Args:
        states: states of `normalize_states`.
        actions: class indices, or normalized actions.
        over: whether a step was after the end of its episode; its action is then hidden.
        space: robot action space.
    """
    encoded = np.eye(space.size, dtype=np.float32)[actions] if space.discrete else actions
    encoded = np.where(over[:, None], 0, encoded)
    return np.concatenate([states, encoded], axis=1).astype(np.float32)
