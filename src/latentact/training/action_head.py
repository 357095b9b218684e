"""A small head from frozen features to robot actions, for few labels; used by self-training and `export`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from latentact.data.samples import LabeledBatch, PolicySamples
from latentact.data.store import FrameStore
from latentact.lams.contract import action_loss
from latentact.policies.contract import Policy
from latentact.types import ActionSpace


class ActionHead(nn.Module):
    """Robot actions from standardized features; dropout regularizes it on few labels.

    Args:
        features: features that give the standardization, ``[n, d]``.
        actions: actions of the labeled steps.
        space: robot action space.
        latents: number of leading features that are the latent action of the step; these together have as
            much variance as all others, of which there are many more.
    """

    mean: Tensor
    std: Tensor
    action_mean: Tensor
    action_std: Tensor

    def __init__(self, features: Tensor, actions: Tensor, space: ActionSpace, latents: int = 0) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("mean", features.mean(0))
        std, others = features.std(0) + 1e-3, features.shape[1] - latents
        if latents and others:
            std[:latents] *= math.sqrt(latents / others)
        self.register_buffer("std", std)
        mean, std = torch.tensor(0.0), torch.tensor(1.0)
        if not space.discrete:
            mean, std = actions.mean(0), actions.std(0).clamp(min=1e-4)
        self.register_buffer("action_mean", mean)
        self.register_buffer("action_std", std)
        self.net = nn.Sequential(
            nn.Linear(features.shape[1], 128),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, space.size),
        )

    def scores(self, features: Tensor) -> Tensor:
        """Return logits or normalized actions."""
        return self.net((features - self.mean) / self.std).float()

    def loss(self, batch: LabeledBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss over a batch, all of whose actions are labeled."""
        actions = batch.actions
        if not self.space.discrete:
            actions = (actions - self.action_mean) / self.action_std
        labeled = torch.ones(len(actions), dtype=torch.bool, device=actions.device)
        return action_loss(self.scores(batch.inputs), actions, labeled), {}

    def predict(self, features: Tensor) -> Tensor:
        """Return class probabilities, or actions in the robot's units."""
        scores = self.eval().scores(features)
        return scores.softmax(1) if self.space.discrete else scores * self.action_std + self.action_mean


def fit_head(
    features: Tensor, actions: Tensor, space: ActionSpace, steps: int, seed: int, unlabeled: Tensor
) -> ActionHead:
    """Train a head in memory and return it; for classes with one round of self-training.

    Args:
        features: features of the labeled steps, ``[n, d]``.
        actions: actions of the labeled steps.
        space: robot action space.
        steps: number of training steps.
        seed: seed of weights and batches.
        unlabeled: features of other steps, ``[m, d]``: they also contribute to the standardization, and for
            classes a second head learns from the half on which the first is most confident.
    """
    pool = torch.cat([features, unlabeled])
    head = _trained(ActionHead(pool, actions, space), features, actions, steps, seed)
    if not space.discrete or not len(unlabeled):
        return head
    with torch.no_grad():
        surest, guesses = head.predict(unlabeled).max(1)
    sure = surest >= surest.median()
    features, actions = torch.cat([features, unlabeled[sure]]), torch.cat([actions, guesses[sure]])
    return _trained(ActionHead(pool, actions, space), features, actions, steps, seed)


def _trained(head: ActionHead, features: Tensor, actions: Tensor, steps: int, seed: int) -> ActionHead:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in head.net:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        head.train()
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-2)
        for _ in range(steps):
            chosen = torch.randint(len(features), (64,))
            optimizer.zero_grad(set_to_none=True)
            head.loss(LabeledBatch(features[chosen], None, actions[chosen]))[0].backward()
            optimizer.step()
    return head.eval()


@torch.inference_mode()
def policy_features(policy: Policy, store: FrameStore, rows: np.ndarray) -> Tensor:
    """Return the policy's features of the observation at each row, ``[m, d]``."""
    unused = np.zeros((len(store.frames), 1), np.float32)
    samples = PolicySamples(
        store,
        target=unused,
        exists=np.ones(len(unused), bool),
        frames=policy.config.network.n_obs_steps,
        stride=policy.spec.stride,
        words=policy.spec.words,
    )
    parts = []
    for some in np.array_split(rows, -(-len(rows) // 512)):
        batch = samples.batch(some)
        parts.append(policy.eval().features(batch.frames, batch.state, batch.words).float())
    return torch.cat(parts).clone()
