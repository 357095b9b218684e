import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from latentact.data.cache import DataConfig, open_store
from latentact.data.splits import choose_labeled, split_episodes
from latentact.data.time_base import frames_in_gap, gaps_agree, lam_frame_gap, rates_agree, require_gap
from latentact.data.windows import Clips
from latentact.errors import UserError
from latentact.lams.models.lapo import LapoConfig


def make_store(tmp_path, lengths, *, fps=10.0, actions=True):
    """Grids whose first cell is the episode and whose second is the step; action = row."""
    steps = np.concatenate([np.arange(n) for n in lengths])
    episodes = np.repeat(np.arange(len(lengths)), lengths)
    obs = np.zeros((len(steps), 5, 5, 2), np.uint8)
    obs[:, 0, 0, 0], obs[:, 0, 0, 1] = episodes, steps
    done = np.diff(episodes, append=-1) != 0
    extra = {"action": np.arange(len(steps))} if actions else {}
    np.savez(tmp_path / "e.npz", obs=obs, done=done, fps=fps, **extra)
    return open_store(DataConfig(path=str(tmp_path / "e.npz"), cache_dir=str(tmp_path / "cache")))


def what(clip):
    """(episode, step) of each frame of each window."""
    return clip.frames[:, :, :, 0, 0].tolist()


def test_windows_by_hand(tmp_path):
    clips = Clips(make_store(tmp_path, [5, 2, 4]), episodes=[0, 1, 2], frame_gap=2, context=1)
    assert clips.rows.tolist() == [0, 1, 2, 7, 8]  # episode 1 is too short
    clip = clips.__getitems__([0, 2, 4])
    assert clip.frames.shape == (3, 3, 2, 5, 5)
    assert what(clip) == [[[0, 0], [0, 0], [0, 2]], [[0, 0], [0, 2], [0, 4]], [[2, 0], [2, 1], [2, 3]]]
    assert clip.valid.tolist() == [[False, True, True], [True, True, True], [False, True, True]]
    assert clip.index.tolist() == [0, 2, 8]


def test_frames_are_channels_last_without_a_copy(tmp_path):
    clip = Clips(make_store(tmp_path, [9]), episodes=[0], frame_gap=1).__getitems__([0, 3])
    assert clip.frames.stride()[2:] == (1, 10, 2)
    assert clip.frames.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("seed", range(20))
def test_no_window_crosses_an_episode(tmp_path, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, rng.integers(1, 12)).tolist()
    gap, context, horizon = (int(v) for v in (rng.integers(1, 5), rng.integers(0, 4), rng.integers(1, 4)))
    store = make_store(tmp_path, lengths)
    chosen = rng.permutation(len(lengths))[: rng.integers(1, len(lengths) + 1)]
    starts = np.cumsum(lengths) - lengths
    want = [int(starts[e]) + i for e in np.sort(chosen) for i in range(max(0, lengths[e] - horizon * gap))]
    if not want:
        with pytest.raises(UserError, match="frames for a window"):
            Clips(store, episodes=chosen, frame_gap=gap, context=context, horizon=horizon)
        return
    clips = Clips(store, episodes=chosen, frame_gap=gap, context=context, horizon=horizon)
    assert clips.rows.tolist() == want
    assert len(clips) == len(want)
    clip = clips.__getitems__(list(range(len(clips))))
    for row, frames, valid in zip(clips.rows, what(clip), clip.valid.tolist(), strict=True):
        episode = int(store.episode[row])
        steps = [row - starts[episode] + offset * gap for offset in range(-context, horizon + 1)]
        assert [step for _, step in frames] == [max(0, step) for step in steps]
        assert {e for e, _ in frames} == {episode}
        assert valid == [step >= 0 for step in steps]


def test_a_row_without_a_future_is_refused(tmp_path):
    clips = Clips(make_store(tmp_path, [5, 5]), episodes=[0], frame_gap=1)
    assert what(clips.clip(np.array([7]))) == [[[1, 2], [1, 3]]]
    with pytest.raises(ValueError, match="past the end of its episode"):
        clips.clip(np.array([4]))


def test_actions_outside_labeled_episodes_are_hidden(tmp_path):
    store = make_store(tmp_path, [4, 4, 4])
    clip = Clips(store, episodes=[0, 1, 2], frame_gap=1, labeled=[1]).__getitems__(list(range(9)))
    assert clip.action is not None
    assert clip.labeled is not None
    assert clip.action[clip.labeled].tolist() == [4, 5, 6]
    assert clip.labeled.tolist() == [False] * 3 + [True] * 3 + [False] * 3
    none = Clips(store, episodes=[0, 1, 2], frame_gap=1).__getitems__(list(range(9)))
    assert none.labeled is not None
    assert not none.labeled.any()


def test_data_without_actions_has_none(tmp_path):
    clip = Clips(make_store(tmp_path, [4], actions=False), episodes=[0], frame_gap=1).__getitems__([0])
    assert clip.action is None
    assert clip.state is None


def test_a_loader_takes_a_batch_in_one_gather(tmp_path):
    clips = Clips(make_store(tmp_path, [10]), episodes=[0], frame_gap=1)
    loader = DataLoader(clips, batch_size=4, collate_fn=lambda clip: clip)
    assert [clip.index.tolist() for clip in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert what(clips[3]) == [[[0, 3], [0, 4]]]


def test_gap_in_seconds():
    assert [frames_in_gap(s, 10.0, "data", setting="gap") for s in (0.085, 0.1, 0.24, 0.26, 1.0)] == [
        1,
        1,
        2,
        3,
        10,
    ]
    for seconds, nearest in ((0.04, 0.1), (0.05, 0.1), (0.15, 0.2), (1e-300, 0.1)):
        with pytest.raises(UserError, match=rf"gap must be near a whole .* of data, .*Set it to {nearest}"):
            frames_in_gap(seconds, 10.0, "data", setting="gap")


def test_one_tolerance_for_gaps_and_one_for_rates():
    assert [gaps_agree(s, 0.4) for s in (0.29, 0.31, 0.49, 0.51)] == [False, True, True, False]
    assert [rates_agree(fps, 30.0) for fps in (29.97, 30.2, 29.6, 30.4)] == [True, True, False, False]


def test_the_frame_gap_of_a_lam_at_a_rate(caplog):
    spec = LapoConfig(backbone="patch", size=32).build().spec
    known = replace(spec, frame_gap=3, frame_gap_s=0.3)
    assert lam_frame_gap(replace(spec, frame_gap=3), 10.0, "data") == 3  # no seconds: frames
    assert lam_frame_gap(known, 0.0, "data") == 3  # no rate: frames
    assert lam_frame_gap(known, 30.0, "data") == 9
    assert lam_frame_gap(known, 10.0, "data", seconds=0.5) == 5
    assert not caplog.text
    assert lam_frame_gap(known, 8.0, "data") == 2
    assert "transitions of data span 0.25 s, although the frame gap of the LAM lapo is 0.3 s" in caplog.text
    with pytest.raises(
        UserError, match=r"the frame gap of the LAM lapo must be near .* got 0.3 s. Give --frame-gap-s 0.5"
    ):
        lam_frame_gap(known, 2.0, "data")
    with pytest.raises(UserError, match=r"--frame-gap-s must be near"):
        lam_frame_gap(known, 10.0, "data", seconds=0.04)
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--frame-gap-s must be at least 0 seconds and finite"):
            require_gap(seconds)


def test_split_is_seeded_disjoint_and_never_empty(tmp_path):
    store = make_store(tmp_path, [2] * 10)
    train, held_out = split_episodes(store, held_out=0.2, seed=3)
    assert (len(train), len(held_out)) == (8, 2)
    assert sorted([*train, *held_out]) == list(range(10))
    again = split_episodes(store, held_out=0.2, seed=3)
    assert (train.tolist(), held_out.tolist()) == (again[0].tolist(), again[1].tolist())
    others = [split_episodes(store, held_out=0.2, seed=s)[1].tolist() for s in range(5)]
    assert len({tuple(o) for o in others}) > 1
    assert [len(part) for part in split_episodes(store, held_out=0.0, seed=0)] == [9, 1]
    assert [len(part) for part in split_episodes(store, held_out=0.99, seed=0)] == [1, 9]
    with pytest.raises(UserError, match=r"held_out must be .*, got 1"):
        split_episodes(store, held_out=1.0, seed=0)


def test_a_single_episode_is_both_and_says_so(tmp_path, caplog):
    store = make_store(tmp_path, [5])
    with caplog.at_level(logging.WARNING):
        train, held_out = split_episodes(store, held_out=0.1, seed=0)
    assert (train.tolist(), held_out.tolist()) == ([0], [0])
    assert "one episode" in caplog.text


def test_labeled_episodes_are_nested():
    train = np.array([3, 5, 8, 9, 11, 20])
    for seed in range(5):
        chosen = [set(choose_labeled(train, k, seed).tolist()) for k in range(7)]
        assert [len(c) for c in chosen] == list(range(7))
        assert all(a <= b for a, b in itertools.pairwise(chosen))
    assert choose_labeled(train, None, 0).tolist() == train.tolist()
    with pytest.raises(
        UserError, match="labeled episodes must be between 0 and 6, the number of training episodes, got 7"
    ):
        choose_labeled(train, 7, 0)
