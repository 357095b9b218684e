"""Scene cuts of spliced clips with hard cuts, dissolves, fades and flashes; none inside a shot."""

import numpy as np
import pytest

from latentact.data.scenes import MARGIN, SceneCuts, find_cuts


def shot(rng, length):
    """A textured background, a moving block on it, and noise."""
    coarse = rng.integers(30, 220, (5, 5, 3))
    rows, columns = np.meshgrid(np.linspace(0, 3.99, 32), np.linspace(0, 3.99, 32), indexing="ij")
    r, c = rows.astype(int), columns.astype(int)
    a, b = (rows - r)[..., None], (columns - c)[..., None]
    ground = (coarse[r, c] * (1 - a) + coarse[r + 1, c] * a) * (1 - b)
    ground += (coarse[r, c + 1] * (1 - a) + coarse[r + 1, c + 1] * a) * b
    frames = np.tile(ground, (length, 1, 1, 1))
    place, speed, color = rng.uniform(3, 20, 2), rng.uniform(-1.2, 1.2, 2), rng.integers(0, 256, 3)
    for frame in frames:
        place += speed
        speed = np.where((place < 0) | (place > 24), -speed, speed)
        y, x = place.clip(0, 24).astype(int)
        frame[y : y + 8, x : x + 8] = color
    return frames


def splice(rng, kinds, flashes=True):
    """Join shots; return the video and (middle, half of the duration) of each change of scene."""
    video, changes = shot(rng, 60), []
    for kind in kinds:
        new, n = shot(rng, int(rng.integers(50, 80))), int(rng.integers(5, 16))
        if flashes and rng.random() < 0.5:
            begin = int(rng.integers(30, 40))
            new[begin : begin + int(rng.integers(1, 5))] += rng.uniform(60, 255)
        share = (np.arange(1, n + 1) / (n + 1))[:, None, None, None]
        if kind == "hard":
            changes.append((len(video), 0))
            video = np.concatenate([video, new])
        elif kind == "dissolve":
            changes.append((len(video) - n / 2, n / 2))
            video = np.concatenate([video[:-n], video[-n:] * (1 - share) + new[:n] * share, new[n:]])
        else:
            dark = 0 if kind == "fade to black" else 255
            changes.append((len(video), n))
            out, back = video[-n:] * (1 - share) + dark * share, new[:n] * share + dark * (1 - share)
            video = np.concatenate([video[:-n], out, back, new[n:]])
    video = video + rng.normal(0, 1.5, video.shape)
    return video.clip(0, 255).round().astype(np.uint8), changes


def matches(found, changes):
    """Return true positives, false positives and misses."""
    left = list(found)
    for middle, half in changes:
        near = [cut for cut in left if abs(cut - middle) <= half + 1]
        if near:
            left.remove(min(near, key=lambda cut: abs(cut - middle)))
    hits = len(found) - len(left)
    return hits, len(left), len(changes) - hits


def test_spliced_clips_with_fades_and_flashes():
    rng = np.random.default_rng(0)
    kinds = ["hard", "hard", "hard", "dissolve", "fade to black", "fade to white"]
    total = np.zeros(3)
    for _ in range(12):
        video, changes = splice(rng, rng.permutation(kinds))
        total += matches(find_cuts(video), changes)
    hits, false, missed = total
    f1 = 2 * hits / (2 * hits + false + missed)
    assert f1 >= 0.95, total


@pytest.mark.parametrize("seed", range(4))
def test_a_hard_cut_is_at_its_first_frame(seed):
    video, changes = splice(np.random.default_rng(seed), ["hard"] * 4, flashes=False)
    assert find_cuts(video).tolist() == [middle for middle, _ in changes]


def test_flashes_and_lights_are_no_cuts():
    rng = np.random.default_rng(1)
    for _ in range(10):
        video = shot(rng, 90)
        video[30:33] += 120  # a flash
        video[60:] = video[60:] * 0.6 + 20  # the light goes down
        assert find_cuts(video.clip(0, 255).astype(np.uint8)).tolist() == []


def test_a_short_or_constant_video_has_no_cut():
    assert find_cuts(np.zeros((0, 32, 32, 3), np.uint8)).tolist() == []
    assert find_cuts(np.zeros((1, 32, 32, 3), np.uint8)).tolist() == []
    assert find_cuts(np.full((300, 32, 32, 3), 7, np.uint8)).tolist() == []


def test_blocks_find_what_the_whole_finds(monkeypatch):
    monkeypatch.setattr("latentact.data.scenes._BLOCK", 150)
    video, _ = splice(np.random.default_rng(2), ["hard", "dissolve", "fade to black"] * 8)
    assert len(video) > 4 * (150 + 2 * MARGIN)
    cuts, place = SceneCuts(), 0
    for size in np.random.default_rng(0).integers(1, 60, 100):
        cuts.add(video[place : place + size])
        place += size
    assert place >= len(video)
    assert cuts.finish() == find_cuts(video).tolist()
