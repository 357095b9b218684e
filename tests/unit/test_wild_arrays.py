"""Arrays of npz files: every layout in memory, and types and shapes that do not fit the frames."""

import numpy as np
import pytest

from latentact.data.check import check_data
from latentact.data.digest import Memo
from latentact.data.format import open_source
from latentact.errors import UserError
from wild import actions, numbered, numbers, store

N = 12
FRAMES = np.stack([numbered(i) for i in range(N)])
STATES = np.stack([np.arange(N) / 8, np.arange(N) / 4], 1)
GRIDS = np.random.default_rng(0).integers(0, 9, (N, 5, 5, 2), np.uint8)


def write(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{"obs": FRAMES, "fps": 10.0, **arrays})
    return path


def reason(tmp_path, **arrays):
    """Return why the file is unreadable; empty if it is read."""
    path = write(tmp_path / "a.npz", **arrays)
    source = open_source(path, "", Memo(tmp_path / "memo", path))
    check, _ = check_data(path, max_frames=0)
    assert check.unreadable == source.unreadable
    assert check.usable == (not source.unreadable)
    return source.unreadable.get("a.npz", "")


@pytest.mark.parametrize("resolution", [0, 24, 32])
@pytest.mark.parametrize("frames", [FRAMES, GRIDS], ids=["images", "grids"])
def test_fortran_order_is_read(tmp_path, frames, resolution):
    path = write(tmp_path / "f.npz", obs=np.asfortranarray(frames), states=np.asfortranarray(STATES))
    plain = store(write(tmp_path / "c.npz", obs=frames, states=STATES), resolution=resolution)
    read = store(path, resolution=resolution)
    np.testing.assert_array_equal(read.frames, plain.frames)
    np.testing.assert_array_equal(read.state, STATES)


@pytest.mark.parametrize(
    "view",
    [
        lambda f: f[:, ::-1, ::-1],
        lambda f: np.ascontiguousarray(f.swapaxes(1, 2)).swapaxes(1, 2),
        lambda f: np.repeat(f, 2, 2)[:, :, ::2],
        lambda f: np.broadcast_to(f[:, :, :, :1], f.shape),
    ],
    ids=["flipped", "transposed", "sliced", "broadcast"],
)
@pytest.mark.parametrize("resolution", [0, 24])
def test_any_view_of_an_array_enters_the_cache(tmp_path, monkeypatch, view, resolution):
    from latentact.data.formats.npz import NpzSource

    frames = view(FRAMES)
    frames.flags.writeable = False
    want = store(write(tmp_path / "c.npz", obs=np.ascontiguousarray(frames)), resolution=resolution).frames
    monkeypatch.setattr(NpzSource, "_read_obs", lambda self, file: frames)
    read = store(write(tmp_path / "v.npz", obs=frames, states=STATES), resolution=resolution)
    np.testing.assert_array_equal(read.frames, want)


UNREADABLE = {
    "states_short": (
        {"states": STATES[:11]},
        "`states` must have one row for each of 12 frames, got [11, 2]",
    ),
    "states_long": ({"states": np.zeros((13, 2))}, "`states` must have one row .* got \\[13, 2\\]"),
    "states_scalar": ({"states": np.float32(1)}, "`states` must have one row .* got \\[\\]"),
    "states_transposed": ({"states": STATES.T}, "`states` must have one row .* got \\[2, 12\\]"),
    "states_text": ({"states": np.array(["a"] * N)}, "`states` must hold numbers, got <U1"),
    "states_complex": ({"states": STATES + 1j}, "`states` must hold numbers, got complex128"),
    "states_objects": ({"states": np.array([None] * N)}, "not a file of plain arrays"),
    "states_records": ({"states": np.zeros(N, [("x", "f4")])}, "`states` must hold numbers"),
    "action_complex": ({"action": np.arange(N) + 0j}, "`action` must hold numbers, got complex128"),
    "action_huge": (
        {"action": np.array([0] * 11 + [2**64 - 1], np.uint64)},
        "`action` must be at most 2\\*\\*63 - 1, got 18446744073709551615 in row 11",
    ),
    "action_dates": ({"ta": np.zeros(N, "M8[s]")}, "`ta` must hold numbers, got datetime64"),
    "action_text": ({"action": np.array(["left"] * N)}, "`action` must hold numbers, got <U4"),
    "action_short": ({"action": np.zeros(11, int)}, "`action` must have one row .* got \\[11\\]"),
    "action_vectors": ({"action": np.zeros((N, 3), int)}, "must have one class per frame, got \\[12, 3\\]"),
    "action_classes": (
        {"obs": np.zeros((5000, 2, 2, 1), np.uint8), "action": np.arange(5000)},
        "`action`: discrete actions must have at most 4096 classes, got 5000",
    ),
    "done_nan": ({"done": np.r_[0.0, np.nan, np.zeros(10)]}, "`done` must be 0 or 1, got nan in row 1"),
    "done_text": ({"done": np.array(["False"] * N)}, "`done` must hold numbers, got <U5"),
    "done_counter": ({"done": np.arange(N)}, "`done` must be 0 or 1, got 2 in row 2"),
    "done_short": ({"done": np.zeros(11, bool)}, "`done` must have one row .* got \\[11\\]"),
    "done_wide": ({"done": np.zeros((N, 2), bool)}, "`done` must have one flag per frame"),
    "fps_tiny": ({"fps": 1e-320}, "`fps` must be one number between 0.0001 and 1e\\+06, got 1e-320"),
    "fps_huge": ({"fps": 1e308}, "`fps` must be one number .* got 1e\\+308"),
    "fps_nan": ({"fps": np.nan}, "`fps` must be one number .* got nan"),
    "fps_text": ({"fps": "ten"}, "`fps` must be one number .* got 'ten'"),
    "fps_complex": ({"fps": 10 + 0j}, "`fps` must be one number"),
    "fps_many": ({"fps": np.full(N, 10.0)}, "`fps` must be one number .* got 'float64 \\[12\\]'"),
    "obs_channels_first": ({"obs": np.zeros((N, 4, 32, 32), np.uint8)}, "whose channels come first"),
    "obs_stack_first": ({"obs": np.zeros((N, 12, 64, 64), np.uint8)}, "whose channels come first"),
    "obs_scalar": ({"obs": np.uint8(1)}, "`obs` must be uint8 \\[n, h, w, c\\], got uint8 \\[\\]"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_arrays_that_do_not_fit_make_the_file_unreadable(tmp_path, kind):
    import re

    arrays, pattern = UNREADABLE[kind]
    got = reason(tmp_path, **arrays)
    assert re.search(pattern, got) or pattern in got, got


READ = {
    "states_one": ({"states": STATES[:, 0]}, STATES[:, :1]),
    "states_integers": ({"states": np.arange(N, dtype=np.int16)}, np.arange(N)[:, None]),
    "states_half": ({"states": STATES.astype(np.float16)}, STATES),
    "states_flags": ({"states": np.arange(N) % 2 == 0}, (np.arange(N) % 2 == 0)[:, None]),
    "states_images": ({"states": np.arange(N * 6.0).reshape(N, 2, 3)}, np.arange(N * 6.0).reshape(N, 6)),
}


@pytest.mark.parametrize("kind", READ)
def test_states_of_any_number_type_are_read(tmp_path, kind):
    arrays, want = READ[kind]
    assert reason(tmp_path, **arrays) == ""
    np.testing.assert_array_equal(store(tmp_path / "a.npz").state, want)


@pytest.mark.parametrize("array", ["states", "action"])
def test_numbers_beyond_float32_are_reported_by_row(tmp_path, array):
    values = STATES.copy()
    values[5, 1] = 1e300
    path = write(tmp_path / "a.npz", **{array: values})
    column = {"states": "observation.state", "action": "action"}[array]
    with pytest.raises(UserError, match=f"column {column}: 1 rows are missing, NaN or infinite, .* row 5 of"):
        _ = store(path).state if array == "states" else store(path).actions([0])
    read = store(path, drop_nonfinite=True)
    assert np.flatnonzero(~read.usable).tolist() == [5]
    check, _ = check_data(path, max_frames=0)
    assert check.columns[column] == {"shape": [2], "rows": N, "nonfinite": 1, "first": 5}


def test_other_arrays_are_columns_only_where_they_fit(tmp_path):
    more = {"reward": np.arange(N), "weights": np.zeros(3), "names": np.array(["a", "b"])}
    path = write(tmp_path / "a.npz", **more)
    source = open_source(path, "", Memo(tmp_path / "memo", path))
    assert source.column("reward").tolist() == [*range(N)]
    assert source.column("nothing") is None
    with pytest.raises(UserError, match="`weights` must have one row for each of 12 frames"):
        source.column("weights")


def test_frames_that_are_no_images_or_differ_in_shape_are_noted(tmp_path):
    write(tmp_path / "d/a.npz")
    write(tmp_path / "d/b.npz", obs=np.concatenate([FRAMES, FRAMES[..., :1]], -1))
    check, _ = check_data(tmp_path / "d", max_frames=0)
    assert "frames of 4 channels, such as in b.npz, are grids of features, not images" in check.warnings
    assert any(
        "frames differ in shape: [32, 48, 3] in a.npz, [32, 48, 4] in b.npz" in w for w in check.warnings
    )


def test_columns_that_some_files_lack_are_left_out_with_a_note(tmp_path):
    write(tmp_path / "d/a.npz", states=STATES, action=np.zeros((N, 2)))
    write(tmp_path / "d/b.npz", action=np.ones((N, 2)))
    source = open_source(tmp_path / "d", "", Memo(tmp_path / "memo", tmp_path / "d"))
    note = "column states is missing from 1 of 2 files, such as b.npz, and left out"
    assert source.notes == [note]
    assert source.column("observation.state") is None
    assert source.column("action").tolist() == [[0.0, 0.0]] * N + [[1.0, 1.0]] * N
    check, _ = check_data(tmp_path / "d", max_frames=0)
    assert note in check.warnings


@pytest.mark.parametrize(
    ("first", "second", "pattern"),
    [
        ({"states": STATES}, {"states": np.zeros((N, 3))}, r"`states` .* float \[n, 2\] in a.npz and .* 3\]"),
        ({"states": STATES}, {"states": np.zeros((N, 2), int)}, "got float .* and integer"),
        ({"action": np.zeros(N, int)}, {"action": np.zeros((N, 2))}, r"integer \[n\] in a.npz and float"),
    ],
)
def test_columns_that_differ_between_files_are_refused(tmp_path, first, second, pattern):
    write(tmp_path / "d/a.npz", **first)
    write(tmp_path / "d/b.npz", **second)
    with pytest.raises(UserError, match=pattern):
        open_source(tmp_path / "d", "", Memo(tmp_path / "memo", tmp_path / "d"))
    check, _ = check_data(tmp_path / "d", max_frames=0)
    assert not check.usable


def test_files_with_one_row_less_and_one_more_are_both_named(tmp_path):
    """Together their rows would add up, one step apart."""
    write(tmp_path / "d/a.npz", states=STATES[:11])
    write(tmp_path / "d/b.npz", states=np.zeros((13, 2)))
    write(tmp_path / "d/c.npz", states=STATES)
    read = store(tmp_path / "d")
    assert set(read.unreadable) == {"a.npz", "b.npz"}
    np.testing.assert_array_equal(read.state, STATES)


def batch(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, observations=FRAMES.reshape(3, 4, *FRAMES.shape[1:]), fps=10.0, **arrays)
    return path


def test_episodes_by_steps_are_read_in_order(tmp_path):
    action = np.arange(N).reshape(3, 4) % 5
    read = store(batch(tmp_path / "a.npz", states=STATES.reshape(3, 4, 2), action=action))
    assert numbers(read.frames) == [*range(N)]
    assert read.lengths.tolist() == [4, 4, 4]
    np.testing.assert_array_equal(read.state, STATES)
    assert np.ma.getdata(actions(read, [0, 1, 2])).ravel().tolist() == action.ravel().tolist()


@pytest.mark.parametrize(
    "arrays",
    [
        {"action": np.zeros((4, 3), int)},
        {"states": np.zeros((4, 3, 2))},
        {"states": np.zeros((3, 8))},
        {"done": np.zeros((4, 3), bool)},
    ],
)
def test_steps_by_episodes_are_refused(tmp_path, arrays):
    path = batch(tmp_path / "a.npz", **arrays)
    (reason,) = open_source(path, "", Memo(tmp_path / "memo", path)).unreadable.values()
    assert f"`{next(iter(arrays))}` must have the axes [3, 4] first" in reason


def streams(lengths):
    """Return frames of episodes of these lengths, each a slow block on a background of its own."""
    frames = []
    for episode, length in enumerate(lengths):
        background = np.random.default_rng(episode).integers(0, 256, (32, 32, 3), np.uint8)
        for step in range(length):
            frame = background.copy()
            frame[step : step + 8, :8] = 255
            frames.append(frame)
    return np.stack(frames)


@pytest.mark.parametrize("lengths", [(9, 7, 12, 5), (9, 7), (9,)])
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
def test_done_marks_the_last_frame_or_the_first(tmp_path, lengths, first):
    frames, ends = streams(lengths), np.cumsum(lengths)
    done = np.zeros(len(frames), bool)
    done[np.r_[0, ends[:-1]] if first else ends - 1] = True
    path = write(tmp_path / "d/0.npz", obs=frames, done=done, ta=np.arange(len(frames)) % 15, values=done / 2)
    source = open_source(path, "", Memo(tmp_path / "memo", path))
    assert [episode.frames for episode in source.episodes] == [*lengths]
    assert any("first frame" in note for note in source.notes) == first
    np.testing.assert_array_equal(source.column("values"), (done / 2).astype(np.float32))
    # A stream that the file's end cuts, in files of one convention.
    write(tmp_path / "d/1.npz", obs=frames[:-2], done=done[:-2], ta=np.arange(len(frames) - 2) % 15)
    read = store(tmp_path / "d")
    assert read.lengths.tolist() == [*lengths, *lengths[:-1], lengths[-1] - 2]


def test_frames_that_do_not_show_which_one_done_marks_are_noted(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    path = write(tmp_path / "a.npz", obs=noise, done=np.arange(40) % 10 == 9)
    source = open_source(path, "", Memo(tmp_path / "memo", path))
    assert [episode.frames for episode in source.episodes] == [10] * 4
    assert any("taken as the last frame" in note for note in source.notes)
