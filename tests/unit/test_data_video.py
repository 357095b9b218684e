import math
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from latentact.data.decode.resize import resize
from latentact.data.decode.video import decode, probe
from latentact.data.format import Unreadable
from latentact.data.time_base import at_times


def write_video(path, shades, *, fps=10, millis=None, size=(64, 64), codec="libx264", pix_fmt="yuv420p"):
    """One plain frame per shade (0..255), at `fps` or at the given milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        if millis is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, shade in enumerate(shades):
            pixels = shade if isinstance(shade, np.ndarray) else np.full((*size, 3), shade, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)
            frame.pts = number if millis is None else millis[number]
            if millis is not None:
                frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(path, a, b, c, d):
    """Write the rotation (a b; c d) into the display matrix of an mp4's track header."""
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", *(v << 16 for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    path.write_bytes(data)


def shades(path, **span):
    return [(round(seconds, 3), round(float(frame.mean()))) for seconds, frame in decode(path, **span)]


KINDS = [
    ("a.mp4", "libx264", "yuv420p"),
    ("a.webm", "libvpx-vp9", "yuv420p"),
    ("a.mkv", "libx264", "yuv420p"),
    ("a.mov", "mpeg4", "yuv420p"),
    ("a.gif", "gif", "rgb8"),
    ("a.avi", "mpeg4", "yuv420p"),
]


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), KINDS)
def test_every_container_gives_its_frames_and_times(tmp_path, name, codec, pix_fmt):
    path = write_video(tmp_path / name, [0, 40, 80, 120, 160], codec=codec, pix_fmt=pix_fmt)
    info = probe(path)
    assert (info.frames, info.fps, info.rate.uneven) == (5, 10.0, False)
    seconds, frames = zip(*decode(path), strict=True)
    np.testing.assert_allclose(seconds, [0.0, 0.1, 0.2, 0.3, 0.4], atol=1e-3)
    for frame, shade in zip(frames, [0, 40, 80, 120, 160], strict=True):
        assert frame.shape == (64, 64, 3)
        assert frame.dtype == np.uint8
        assert abs(float(frame.mean()) - shade) < 4


def test_variable_frame_rate_keeps_its_times(tmp_path):
    path = write_video(tmp_path / "v.mp4", [0, 50, 100, 150, 200], millis=[0, 100, 150, 800, 1000])
    assert [s for s, _ in shades(path)] == [0.0, 0.1, 0.15, 0.8, 1.0]
    rate = probe(path).rate
    assert rate.uneven
    assert (rate.fps, rate.fastest) == (1.942, 15.385)  # nine tenths of the intervals, the shortest tenth


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [((0, 1, -1, 0), (0, -1)), ((0, -1, 1, 0), (-1, 0)), ((-1, 0, 0, -1), (-1, -1))],
    ids=["clockwise", "counterclockwise", "upside_down"],
)
def test_rotation_is_honored(tmp_path, matrix, corner):
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32, :32] = 255  # top left
    path = write_video(tmp_path / "r.mp4", [pixels] * 3, size=(64, 96))
    turn(path, *matrix)
    _, frame = next(decode(path))
    assert frame.shape == ((96, 64, 3) if matrix[0] == 0 else (64, 96, 3))
    bright = np.argwhere(frame[..., 0] > 128).mean(0) > np.array(frame.shape[:2]) / 2
    assert bright.tolist() == [corner[0] == -1, corner[1] == -1]


def test_a_span_is_decoded_from_its_first_frame_to_the_last_before_its_end(tmp_path):
    path = write_video(tmp_path / "s.mp4", range(0, 240, 4), fps=10)
    found = shades(path, start=2.95, stop=3.35)
    assert [s for s, _ in found] == [3.0, 3.1, 3.2, 3.3]
    assert all(abs(shade - want) < 4 for (_, shade), want in zip(found, [120, 124, 128, 132], strict=True))


def test_resampling_takes_the_nearest_frame_that_is_not_later():
    frames = [(0.0, "a"), (0.1, "b"), (0.15, "c"), (0.8, "d"), (1.0, "e")]
    quarters = [k / 4 for k in range(100)]
    # 0 -> a; 0.25, 0.5, 0.75 -> c, the last before 0.8; 1.0 -> e; 1.25 is after the last frame: not invented
    assert [(t, f) for t, _, f in at_times(frames, quarters)] == [
        (0.0, "a"),
        (0.15, "c"),
        (0.15, "c"),
        (0.15, "c"),
        (1.0, "e"),
    ]
    assert [n for _, n, _ in at_times(frames, quarters)] == [0, 2, 2, 2, 4]


def test_resampling_30_to_10_takes_every_third_frame_of_milliseconds():
    frames = [(round(k / 30, 3), k) for k in range(31)]  # as Matroska rounds them
    assert [n for _, n, _ in at_times(frames, (k / 10 for k in range(100)))] == list(range(0, 31, 3))
    assert [n for _, n, _ in at_times(frames[:30], (k / 10 for k in range(100)))] == list(range(0, 30, 3))


def test_resampling_upwards_repeats_frames_and_stops_at_the_last():
    frames = [(0.0, 0), (0.5, 1), (1.0, 2)]
    assert [n for _, n, _ in at_times(frames, (k / 4 for k in range(100)))] == [0, 0, 1, 1, 2]


def test_a_time_before_the_first_frame_is_rejected():
    with pytest.raises(Unreadable, match="first frame"):
        list(at_times([(0.5, "a")], [0.0]))


def test_text_and_truncated_files_are_unreadable_and_nothing_is_printed(tmp_path, capfd):
    text = tmp_path / "t.mp4"
    text.write_text("not a video\n" * 50)
    whole = write_video(tmp_path / "w.mkv", range(0, 250, 2)).read_bytes()
    flipped = tmp_path / "f.mp4"
    data = bytearray(
        write_video(
            flipped, np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8)
        ).read_bytes()
    )
    data[2000:6000] = bytes(4000)
    flipped.write_bytes(data)
    headless = tmp_path / "h.mp4"
    headless.write_bytes(write_video(tmp_path / "g.mp4", range(20)).read_bytes()[:700])
    capfd.readouterr()
    av.logging.restore_default_callback()  # as lerobot leaves it after writing a video
    for path in (text, headless):
        with pytest.raises(Unreadable):
            probe(path)
        with pytest.raises(Unreadable):
            list(decode(path))
    with pytest.raises(Unreadable):
        list(decode(flipped))
    assert whole
    assert capfd.readouterr() == ("", "")


def test_an_mp4_whose_index_comes_first_and_whose_data_is_cut_is_cut_short(tmp_path):
    path = tmp_path / "faststart.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height = stream.width = 64
        for pixels in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(Unreadable, match="truncated"):
        probe(path)


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")])
def test_matroska_that_ends_before_its_duration_is_cut_short(tmp_path, name, codec):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(40)]
    path = write_video(tmp_path / name, noise, codec=codec)
    assert probe(path).frames == 40
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(Unreadable, match=r"truncated: .* of 4\.0 seconds"):
        probe(path)


def test_resize_averages_and_leaves_the_right_size_alone():
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    frames[:, :2] = 200
    assert resize(frames, 4) is frames
    assert resize(frames, 0) is frames
    small = resize(frames, 1)
    assert small.shape == (2, 1, 1, 3)
    assert np.all(small == 100)  # the mean: antialiased
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    gray = resize(np.repeat(checks[None, :, :, None], 3, 3).astype(np.uint8), 16)
    assert np.all(np.abs(gray.astype(int) - 127) <= 1)  # no moire


def test_a_whole_span_is_the_default(tmp_path):
    path = write_video(tmp_path / "d.mp4", [0, 100])
    assert shades(path) == shades(path, start=-math.inf, stop=math.inf) == shades(path, start=-1.0, stop=9.0)
