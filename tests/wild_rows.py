"""Datasets that `precompute` writes, seen as LeRobot shows them."""

import numpy as np
import pytest
import torch

from conftest import cli
from latentact.lams.contract import load_lam
from wild import (
    TOP,
    lerobot_dataset,
    lerobot_frames,
    numbers,
)

pytest.importorskip("lerobot")
TOKENS, VALID = "observation.lam_tokens", "observation.lam_valid"
VIDEO = "observation.images.video"
ROWS = [*range(8), *range(20, 26)]
EITHER = pytest.mark.parametrize("version", [2, 3])


def precompute(data, lam, out, *more):
    return cli("precompute", "--dataset-root", data, "--lam-model-path", lam, "--output-dir", out, *more)


def written(data, lam, out, *more):
    done = precompute(data, lam, out, *more)
    assert done.returncode == 0, done.stderr
    return out


def refused(data, lam, out, *more):
    """Check that precompute refuses the data in one sentence and leaves nothing; returns the sentence."""
    before = sorted(out.parent.iterdir())
    done = precompute(data, lam, out, *more)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(out.parent.iterdir()) == before
    return done.stderr.splitlines()[-1]


def tokens_of(lam, frames, lengths, gap=2):
    """Return the tokens of frames by the model itself; zeros where the gap leaves the episode."""
    from latentact.data.decode.resize import resize

    model = load_lam(lam)
    found, row = np.zeros((len(frames), model.spec.tokens * model.spec.token_dim), np.float32), 0
    for n in lengths:
        small = torch.from_numpy(resize(np.array(frames[row : row + n]), 32, model.spec.resize))
        for first in range(min(gap, n - gap)):  # frames a gap apart, as the model looks at them
            with torch.inference_mode():
                part = model.encode(small[first::gap].permute(0, 3, 1, 2)[None]).continuous[0].flatten(1)
            found[row + first : row + n - gap : gap] = part.numpy()
        row += n
    return found


def opened(out, cache, camera=TOP):
    """Return the numbers of the frames that LeRobot shows of an output, and its tokens."""
    with lerobot_dataset(out, cache) as read:
        tokens = np.stack([np.asarray(row) for row in read.hf_dataset[TOKENS]])
    return numbers(lerobot_frames(out, cache, camera)), tokens
