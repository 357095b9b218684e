"""Hidden actions are filled in by a teacher that is trained on the known ones."""

import numpy as np
import pytest
import torch

from latentact.stages.finetune import fill_actions
from latentact.training.action_head import ActionHead
from latentact.training.settings import TrainingConfig
from latentact.types import ActionSpace

TRAINING = TrainingConfig(
    steps=150, batch_size=16, lr=1e-2, warmup_steps=5, eval_every=0, device="cpu", precision="32-true"
)


def test_actions_that_follow_from_features_are_filled_in(tmp_path) -> None:
    rng = np.random.default_rng(0)
    rows = np.arange(5, 65)  # rows 0 to 4 are of an episode that is held out
    code = rng.integers(0, 3, 70)
    truth = np.array([4, 1, 2])[code]
    features = torch.eye(3)[torch.from_numpy(code[rows])]
    known = np.zeros(70, bool)
    known[5:25] = True
    given = np.where(known, truth, -1)
    given[24] = 0  # an action after the last frame, which its features do not tell
    actions = np.ma.array(given, mask=~known)
    space = ActionSpace(kind="discrete", size=5)
    filled = fill_actions(features, actions, rows, np.array([24]), space, TRAINING, tmp_path)
    assert filled[25:65].tolist() == truth[25:65].tolist()
    assert filled[5:25].tolist() == given[5:25].tolist()  # known actions stay
    assert (filled[[*range(5), *range(65, 70)]] == -1).all()  # rows that were not asked for stay


def test_the_latent_action_tells_what_many_features_do_not(tmp_path) -> None:
    rng = np.random.default_rng(0)
    truth, features = rng.integers(0, 2, 400), torch.from_numpy(rng.normal(size=(400, 256))).float()
    latent = torch.from_numpy(truth)[:, None] + 0.1 * torch.randn(400, 1)
    rows, known = np.arange(400), np.arange(400) < 20
    actions = np.ma.array(np.where(known, truth, -1), mask=~known)
    space = ActionSpace(kind="discrete", size=2)
    inputs, score = torch.cat([latent, features], dim=1), {}
    for latents in (0, 1):
        place = tmp_path / str(latents)
        filled = fill_actions(inputs, actions, rows, rows[:0], space, TRAINING, place, latents)
        score[latents] = (filled == truth)[~known].mean()
    assert score[1] > 0.97 > 0.8 > score[0]


def test_latent_actions_have_as_much_variance_as_all_other_features() -> None:
    inputs = torch.randn(1000, 70) * torch.linspace(0.5, 5, 70)
    head = ActionHead(inputs, torch.zeros(3, dtype=torch.int64), ActionSpace(kind="discrete", size=2), 6)
    variance = ((inputs - head.mean) / head.std).var(0)
    assert variance[:6].sum().item() == pytest.approx(variance[6:].sum().item(), rel=0.02)
