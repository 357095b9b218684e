"""Hidden actions are filled in by a teacher that is trained on the known ones."""

import numpy as np
import torch

from latentact.stages.finetune import fill_actions
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
