"""Real-world timestamps: the frame of each row, and the time between frames."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentact.data.cache import DataConfig
from latentact.data.decode.video import decode, probe
from latentact.data.formats.video_folder import VideoFolderSource
from latentact.data.stream import FrameStream
from latentact.data.time_base import frame_rate, lookup_tolerance
from latentact.data.windows import Clips
from latentact.errors import UserError
from wild import (
    EPISODE,
    STATE,
    TOP,
    change_tables,
    image_cell,
    lerobot,
    lerobot_frames,
    numbered,
    numbers,
    store,
    without_first_rows,
    write_video,
)

pytest.importorskip("lerobot")
ROWS = [*range(8), *range(20, 26)]
"""Numbers that the frames of `lerobot()` carry, row by row."""


def same_as_lerobot(root, cache, camera=TOP):
    """Check that row i of ours is row i of LeRobot's; returns the numbers of the frames."""
    ours, theirs = store(root, camera=camera).frames, lerobot_frames(root, cache, camera)
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 3  # chroma: bicubic here, bilinear there
    return numbers(ours)


# --- rows of LeRobot datasets


@pytest.mark.parametrize("count", [1, 3])
def test_rows_whose_first_ones_were_edited_away_show_lerobots_frames(tmp_path, count):
    root = without_first_rows(lerobot(tmp_path / "d", 3), count)
    assert same_as_lerobot(root, tmp_path) == [*range(count, 8), *range(20 + count, 26)]


def test_version_2_rows_look_into_the_video_by_their_timestamp(tmp_path):
    late = lerobot(
        tmp_path / "d", 2, times=lambda e, n: 0.5 + np.arange(n) / 10, video_frames=lambda e, n: 15
    )
    read = store(late)
    assert numbers(read.frames) == [*range(5, 13), *range(25, 31)]
    assert read.timestamps[[0, 1, 8]] == pytest.approx([0.0, 0.1, 0.0])


CLOCKS = {
    "float64": lambda e, n: pa.array(np.arange(n) / 10),
    "jitter_far_below_a_frame": lambda e, n: np.arange(n) / 10 + 4e-5 * (-1.0) ** np.arange(n),
    "nested_in_lists": lambda e, n: pa.array([[i / 10] for i in range(n)], pa.list_(pa.float32())),
}


@pytest.mark.parametrize("kind", CLOCKS)
def test_clocks_that_lerobot_reads_show_its_frames(tmp_path, kind):
    if kind == "nested_in_lists":  # LeRobot reads numbers only
        assert numbers(store(lerobot(tmp_path / "d", 2, times=CLOCKS[kind])).frames) == ROWS
        return
    root = lerobot(tmp_path / "d", 3, times=CLOCKS[kind])
    assert same_as_lerobot(root, tmp_path) == ROWS


def test_several_tables_videos_and_cameras_show_lerobots_frames(tmp_path):
    root = lerobot(tmp_path / "d", 3, lengths=(5, 1, 7), cameras=(TOP, f"{TOP}_2"), split=True)
    for camera in (TOP, f"{TOP}_2"):
        assert same_as_lerobot(root, tmp_path, camera) == [*range(5), 20, *range(40, 47)]


def test_a_slower_table_than_its_video_shows_lerobots_frames(tmp_path):
    root = lerobot(
        tmp_path / "d",
        2,
        fps=5,
        lengths=(6,),
        video={"millis": [*range(0, 1500, 100)]},
        video_frames=lambda *_: 15,
    )
    assert numbers(store(root).frames) == [0, 2, 4, 6, 8, 10]


def test_matroska_that_rounds_to_milliseconds_keeps_its_frames(tmp_path):
    template = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    root = lerobot(tmp_path / "d", 3, fps=30, lengths=(9,), info={"video_path": template})
    (video,) = root.rglob("*.mp4")
    write_video(video.with_suffix(".mkv"), 9, fps=30)
    video.with_suffix(".mkv").rename(video)
    assert numbers(store(root).frames) == [*range(9)]  # LeRobot refuses: they are 0.3 ms off


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_jitter_below_a_quarter_of_a_frame_still_finds_its_frame(tmp_path, share):
    rng = np.random.default_rng(0)
    shift = {e: rng.uniform(0, share / 10, 8) for e in (0, 1)}
    root = lerobot(tmp_path / "d", 2, times=lambda e, n: np.arange(n) / 10 + shift[e][:n])
    assert numbers(store(root).frames) == ROWS


NO_CLOCKS = {
    "resets": (lambda n: np.arange(n) % 4 / 10, "must increase, got 0 s in row 4 after 0.3"),
    "repeats": (lambda n: np.minimum(np.arange(n), 5) / 10, "must increase, got 0.5 s in row 6 after 0.5"),
    "backwards": (lambda n: np.arange(n)[::-1] / 10, "must increase, got 0.6"),
    "nan": (lambda n: np.where(np.arange(n) == 2, np.nan, np.arange(n) / 10), "finite, got nan in row 2"),
    "infinite": (
        lambda n: np.where(np.arange(n) == 3, np.inf, np.arange(n) / 10),
        "finite, got inf in row 3",
    ),
    "wall_clock": (lambda n: 1.7e9 + np.arange(n) / 10, "must increase, got 1.7e"),
    "wall_clock_in_float64": (lambda n: pa.array(1.7e9 + np.arange(n) / 10), "row 0: its video has no frame"),
    "milliseconds": (lambda n: np.arange(n) * 100.0, "row 1"),
    "nanoseconds": (lambda n: pa.array(np.arange(n) * 100_000_000), "row 1"),
    "row_numbers": (lambda n: np.arange(n), "row "),
    "zeros": (lambda n: np.zeros(n), "must increase, got 0 s in row 1 after 0"),
    "null": (lambda n: pa.array([i / 10 if i else None for i in range(n)]), "finite, got nan in row 0"),
    "frozen_then_on": (lambda n: np.maximum(0, np.arange(n) - 3) / 10, "must increase, got 0 s in row 1"),
    "half_a_frame_off": (lambda n: np.arange(n) / 10 + 0.05, "row 0"),
}


@pytest.mark.parametrize("kind", NO_CLOCKS)
@pytest.mark.parametrize("version", [2, 3])
def test_an_episode_whose_timestamps_are_no_clock_is_unreadable_by_name(tmp_path, kind, version):
    clock, words = NO_CLOCKS[kind]

    def times(e, n):
        good = np.arange(n) / 10
        return clock(n) if e == 1 else pa.array(good) if isinstance(clock(n), pa.Array) else good

    read = store(lerobot(tmp_path / "d", version, lengths=(8, 8, 6), times=times))
    assert numbers(read.frames) == [*range(8), *range(40, 46)]
    ((name, reason),) = read.unreadable.items()
    assert "episode 1" in name
    assert words in reason
    with pytest.raises(UserError, match="episode 1"):
        store(tmp_path / "d", strict=True)


@pytest.mark.parametrize("kind", sorted(NO_CLOCKS))
def test_nothing_is_left_where_no_episode_has_a_clock(tmp_path, kind):
    clock, _ = NO_CLOCKS[kind]
    root = lerobot(tmp_path / "d", 2, times=lambda e, n: clock(n), lengths=(8, 8))
    with pytest.raises(UserError, match="column timestamp"):
        store(root)


@pytest.mark.parametrize("kind", ["resets", "wall_clock", "milliseconds", "zeros", "nan", "row_numbers"])
@pytest.mark.parametrize("version", [2, 3])
def test_rows_with_images_are_read_whatever_their_clock_says(tmp_path, kind, version, caplog):
    root = lerobot(tmp_path / "d", version, cell=image_cell, times=lambda e, n: NO_CLOCKS[kind][0](n))
    with caplog.at_level(logging.WARNING):
        read = store(root)
    assert numbers(read.frames) == ROWS
    assert read.timestamps[:8] == pytest.approx(np.arange(8) / 10)
    assert "column timestamp" in caplog.text
    if version == 3:
        assert same_as_lerobot(root, tmp_path) == ROWS


def test_images_with_one_clock_per_session_start_at_zero(tmp_path, caplog):
    root = lerobot(tmp_path / "d", 3, cell=image_cell, times=lambda e, n: pa.array(1.7e9 + np.arange(n) / 10))
    with caplog.at_level(logging.WARNING):
        read = store(root)
    assert numbers(read.frames) == ROWS
    assert read.timestamps[:8] == pytest.approx(np.arange(8) / 10, abs=1e-5)
    assert not caplog.text


@pytest.mark.parametrize(
    ("there", "words"), [(5, "row 5 of 8: it is at 0.5 s"), (1, "row 1 of 8: it is at 0.1 s")]
)
def test_a_video_shorter_than_its_table_is_unreadable(tmp_path, there, words):
    root = lerobot(tmp_path / "d", 2, lengths=(8, 8), video_frames=lambda e, n: n if e else there)
    read = store(root)
    assert numbers(read.frames) == [*range(20, 28)]
    ((name, reason),) = read.unreadable.items()
    assert "episode 0" in name
    assert words in reason


def test_a_video_longer_than_its_table_shows_its_first_frames(tmp_path):
    root = lerobot(tmp_path / "d", 3, video_frames=lambda e, n: n + 4, split=True)
    assert same_as_lerobot(root, tmp_path) == ROWS


def test_a_video_of_another_rate_than_its_table_is_unreadable(tmp_path):
    root = lerobot(tmp_path / "d", 2, lengths=(8,), video={"millis": [*range(0, 8 * 133, 133)]})
    with pytest.raises(UserError, match="row 1: its video has no frame at"):
        store(root)


def test_a_video_that_starts_late_is_looked_up_by_its_own_times(tmp_path):
    late = {"millis": [500 + 100 * i for i in range(8)]}
    root = lerobot(tmp_path / "d", 2, lengths=(8,), video=late, times=lambda e, n: 0.5 + np.arange(n) / 10)
    read = store(root)
    assert numbers(read.frames) == [*range(8)]
    assert read.timestamps[0] == 0.0


def test_episodes_of_one_row_are_read(tmp_path):
    root = lerobot(tmp_path / "d", 3, lengths=(1, 3, 1))
    assert same_as_lerobot(root, tmp_path) == [0, 20, 21, 22, 40]
    assert store(root).transitions(1).tolist() == [False, True, True, False, False]


def test_a_gap_of_rows_left_out_makes_no_transition(tmp_path):
    def skip(table):
        return table.filter(pa.array(~np.isin(table["frame_index"].to_numpy(), (3, 4))))

    root = change_tables(lerobot(tmp_path / "d", 2, lengths=(8, 8)), skip)
    read = store(root)
    assert numbers(read.frames)[:6] == [0, 1, 2, 5, 6, 7]
    assert read.transitions(1)[:6].tolist() == [True, True, False, True, True, False]


# --- plain videos


PHONE = np.cumsum([0, *[33] * 8, *[100] * 8])


def frame_numbers(read):
    return numbers(read.frames)


def test_a_video_of_variable_rate_is_resampled_to_the_rate_that_it_keeps_up(tmp_path, caplog):
    write_video(tmp_path / "v/phone.mp4", 17, fps=30, millis=PHONE.tolist())
    with caplog.at_level(logging.WARNING):
        read = store(tmp_path / "v")
    assert read.fps == pytest.approx(10)
    want = [int(np.flatnonzero(k / 10 * 1000 >= PHONE - 1)[-1]) for k in range(len(read.frames))]
    assert frame_numbers(read) == want
    assert "the frame rate varies (10 to 30.303 fps)" in caplog.text
    for gap in (1, 2, 4):
        valid = np.flatnonzero(read.transitions(gap))
        distance = read.frame_times[valid + gap] - read.frame_times[valid]
        assert np.all(np.abs(distance - gap / 10) <= np.maximum(0.25 * gap / 10, 0.051) + 0.002)


def test_frames_as_they_are_have_transitions_only_a_gap_apart(tmp_path):
    times = np.cumsum([0, *[100] * 20, 700, *[100] * 20])  # one pause: too rare to be the sustained rate
    write_video(tmp_path / "v/pause.mp4", len(times), millis=times.tolist())
    read = store(tmp_path / "v")
    assert read.fps == pytest.approx(10)
    rows = Clips(read, episodes=[0], frame_gap=1).rows
    distance = read.frame_times[rows + 1] - read.frame_times[rows]
    assert len(rows) >= 38
    assert distance.max() < 0.16


@pytest.mark.parametrize(
    ("durations", "fps", "uneven"),
    [([100] * 6, 10.0, False), ([40, 40, 40, 200, 200, 200], 5.0, True), ([50] * 5 + [3000], 20.0, False)],
)
def test_images_of_an_animation_last_as_long_as_it_says(tmp_path, durations, fps, uneven):
    images = [Image.fromarray(numbered(i)) for i in range(6)]
    (tmp_path / "v").mkdir()
    images[0].save(tmp_path / "v/a.gif", save_all=True, append_images=images[1:], duration=durations, loop=0)
    info = probe(tmp_path / "v/a.gif")
    assert (info.frames, info.rate.uneven) == (6, uneven)
    read = store(tmp_path / "v")
    assert read.fps == pytest.approx(fps)
    starts = np.cumsum([0, *durations[:-1]]) / 1000
    assert frame_numbers(read) == [
        int(np.flatnonzero(k / fps + 1e-3 >= starts)[-1]) for k in range(len(read.frames))
    ]


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.mp4", "a.mov", "a.ts"])
def test_a_last_frame_that_stays_is_no_cut_file(tmp_path, name):
    codec = "libvpx-vp9" if name == "a.webm" else "libx264"
    write_video(tmp_path / name, 8, codec=codec, millis=[0, 100, 200, 300, 400, 500, 600, 2600])
    assert probe(tmp_path / name).frames == 8


def test_videos_of_several_rates_are_resampled_to_the_slowest(tmp_path):
    write_video(tmp_path / "v/a.mp4", 12, fps=20)
    write_video(tmp_path / "v/b.mp4", 6, fps=10, start=40)
    read = store(tmp_path / "v")
    assert read.fps == 10
    assert frame_numbers(read) == [0, 2, 4, 6, 8, 10, *range(40, 46)]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.gif"])
def test_a_video_of_one_frame_is_an_episode_of_one_row(tmp_path, name):
    codec, pix_fmt = ("gif", "rgb8") if name == "a.gif" else ("mpeg4", "yuv420p")
    write_video(tmp_path / "v" / name, 1, start=5, codec=codec, pix_fmt=pix_fmt)
    read = store(tmp_path / "v")
    assert frame_numbers(read) == [5]
    assert not read.transitions(1).any()
    with pytest.raises(UserError, match="at least 2 frames for a window"):
        Clips(read, episodes=[0], frame_gap=1)


def test_a_stream_without_container_has_the_rate_that_it_names(tmp_path):
    write_video(tmp_path / "raw.h264", 8, fps=10).rename(tmp_path / "raw.mp4")
    assert probe(tmp_path / "raw.mp4").rate.fps == 10
    assert [seconds for seconds, _ in decode(tmp_path / "raw.mp4")] == pytest.approx(np.arange(8) / 10)


def test_the_stream_and_the_store_agree_on_transitions(tmp_path):
    write_video(tmp_path / "v/phone.mp4", 17, fps=30, millis=PHONE.tolist())
    write_video(tmp_path / "v/z.mp4", 9, fps=10)
    config = DataConfig(path=str(tmp_path / "v"), resolution=32)
    stream = FrameStream(config)
    assert isinstance(stream.source, VideoFolderSource)
    found = []
    for number, chunks in stream.episodes([0, 1]):
        times, rows = [], []
        for chunk in chunks:
            times += chunk.times
            rows += chunk.frame_indices
        found.append(stream.transitions(number, times, rows, 2))
    assert np.concatenate(found).tolist() == store(tmp_path / "v", resolution=32).transitions(2).tolist()


def test_rates_by_hand():
    even = frame_rate(np.arange(20) / 10, 0.0)
    assert (even.fps, even.fastest, even.uneven) == (10.0, 10.0, False)
    rounded = frame_rate(np.round(np.arange(20) / 30, 3), 30.0)
    assert (rounded.fps, rounded.uneven) == (30.0, False)
    one = frame_rate(np.array([0.0]), 25.0)
    assert (one.fps, one.uneven) == (25.0, False)
    assert lookup_tolerance(np.array([0.0]), 10.0).tolist() == [0.025]


def test_held_out_episodes_that_are_too_short_are_named_so(tmp_path):
    read = store(lerobot(tmp_path / "d", 3, lengths=(6, 1), columns={STATE: (None, None)}))
    with pytest.raises(
        UserError,
        match=r"held-out episodes .* must have at least 3 frames .*, got 1 in .*. Use another split_seed",
    ):
        Clips(read, episodes=[1], frame_gap=2, held_out=True)


def test_frames_carry_their_number():
    assert EPISODE == 20
    assert numbers(numbered(n) for n in range(256)) == [*range(256)]
    assert pq.__name__ == "pyarrow.parquet"
