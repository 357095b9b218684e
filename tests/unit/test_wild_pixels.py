"""Real-world videos and images: colors, bit depth, orientation, streams, edit lists and damage."""

import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from latentact.data.decode.color import image_rgb
from latentact.data.decode.video import decode, probe, video_properties
from latentact.data.format import Unreadable
from latentact.errors import UserError
from wild import (
    HEIGHT,
    WIDTH,
    encoded,
    ffmpeg_frames,
    image_cell,
    lerobot,
    lerobot_frames,
    number,
    numbered,
    numbers,
    pyav_times,
    store,
    trim,
    turn,
    write_video,
)


def frames_of(path):
    return [frame for _, frame in decode(path)]


def same_as_ffmpeg(path, stream="0:v:0"):
    """Check frames and their number against FFmpeg's command line, else against PyAV; returns the frames."""
    ours, theirs = np.stack(frames_of(path)), ffmpeg_frames(path, stream)
    assert len(ours) == len(pyav_times(path)) == probe(path).frames
    if theirs is not None:
        assert ours.shape == theirs.shape
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    return ours


# --- color (F08)

BT601, BT709, SMPTE240M, FCC, BT2020, BT2020C = 5, 1, 7, 4, 9, 10
WEIGHTS = {0: (0.299, 0.114), 2: (0.299, 0.114), 6: (0.299, 0.114), BT601: (0.299, 0.114)}
WEIGHTS |= {BT709: (0.2126, 0.0722), SMPTE240M: (0.212, 0.087), FCC: (0.30, 0.11)}
WEIGHTS |= {BT2020: (0.2627, 0.0593), BT2020C: (0.2627, 0.0593)}
"""Red's and blue's share of the luma, by FFmpeg's number of the matrix."""


def painted(rgb, matrix, full, depth=8):
    """Return the planes [3, h, w] of one color by the matrix and the range that a stream names."""
    red, blue = WEIGHTS[matrix]
    r, g, b = (value / 255 for value in rgb)
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)
    top, unit = 2**depth - 1, 2 ** (depth - 8)
    y = luma * top if full else (16 + 219 * luma) * unit
    uv = [128 * unit + c * (top if full else 224 * unit) for c in chroma]
    planes = np.round([y, *uv]).astype(np.uint16 if depth > 8 else np.uint8)
    return np.repeat(planes, HEIGHT * WIDTH).reshape(3, HEIGHT, WIDTH)


def paint(path, rgb, matrix, full, depth=8):
    """Write three frames of one color without loss."""
    pix_fmt = "yuv444p" if depth == 8 else f"yuv444p{depth}le"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, 2 if full else 1
        for place in range(3):
            frame = av.VideoFrame(WIDTH, HEIGHT, pix_fmt)
            for plane, values in zip(frame.planes, painted(rgb, matrix, full, depth), strict=True):
                rows = np.zeros((HEIGHT, plane.line_size), np.uint8)
                data = np.ascontiguousarray(values).view(np.uint8)
                rows[:, : data.shape[1]] = data
                plane.update(rows.tobytes())
            frame.pts, frame.time_base = place, Fraction(1, 10)
            frame.colorspace, frame.color_range = matrix, 2 if full else 1
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [2, BT601, 6, BT709, SMPTE240M, FCC, BT2020, BT2020C])
@pytest.mark.parametrize("depth", [8, 10])
def test_a_color_is_what_the_matrix_and_range_of_the_stream_say(tmp_path, matrix, full, depth):
    for place, rgb in enumerate([(220, 30, 30), (20, 200, 60), (10, 40, 250), (255, 255, 255), (0, 0, 0)]):
        path = paint(tmp_path / f"{place}.mkv", rgb, matrix, full, depth)
        (frame, *_) = frames_of(path)
        assert np.abs(frame.astype(int) - rgb).max() <= (3 if depth == 8 else 2), (rgb, frame[0, 0])
    same_as_ffmpeg(path)


@pytest.mark.parametrize("height", [32, 576, 720])
def test_a_stream_that_names_no_matrix_is_bt601_at_any_size(tmp_path, height):
    path = write_video(tmp_path / "a.mp4", 2, size=(height, 64), codec="mpeg4")
    frame = same_as_ffmpeg(path)[0]
    assert np.abs(frame[-2, 2].astype(int) - (220, 30, 30)).max() < 12


PIXELS = [
    *("yuv420p", "yuv422p", "yuv444p", "yuv411p", "yuv410p", "yuv440p", "yuva420p", "yuva444p"),
    *("yuv420p10le", "yuv422p12le", "yuv444p16le", "gray", "gray10le", "gray16le", "ya8", "bgra", "bgr0"),
    *("gbrp10le", "gbrp16le", "rgb48le"),
]


@pytest.mark.parametrize("pix_fmt", PIXELS)
@pytest.mark.parametrize("size", [(32, 48), (33, 47)], ids=["even", "odd"])
def test_every_pixel_format_is_shown_as_by_ffmpeg(tmp_path, pix_fmt, size):
    path = write_video(tmp_path / "a.mkv", 3, codec="ffv1", pix_fmt=pix_fmt, size=size)
    assert numbers(same_as_ffmpeg(path)) == [0, 1, 2]


KINDS = [
    ("a.mp4", "libx264", "yuv420p"),
    ("a.mp4", "libx264", "yuvj420p"),
    ("a.mov", "qtrle", "argb"),
    ("a.mov", "png", "rgba"),
    ("a.mkv", "libx264", "gray"),
    ("a.mkv", "mjpeg", "yuvj444p"),
    ("a.webm", "libvpx-vp9", "yuva420p"),
    ("a.webm", "libvpx", "yuv420p"),
    ("a.avi", "mpeg4", "yuv420p"),
    ("a.avi", "rawvideo", "bgr24"),
    ("a.avi", "huffyuv", "rgb24"),
    ("a.ts", "libx264", "yuv420p"),
    ("a.m2ts", "libx264", "yuv420p"),
    ("a.mpg", "mpeg2video", "yuv420p"),
    ("a.ts", "mpeg2video", "yuv420p"),
    ("a.flv", "flv", "yuv420p"),
    ("a.wmv", "wmv2", "yuv420p"),
    ("a.3gp", "mpeg4", "yuv420p"),
    ("a.gif", "gif", "rgb8"),
    ("a.gif", "gif", "gray"),
    ("a.apng", "apng", "rgba"),
    ("a.apng", "apng", "gray16be"),
]


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), KINDS)
def test_every_codec_and_container_is_shown_as_by_ffmpeg(tmp_path, name, codec, pix_fmt):
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg here has no {codec}")
    rate = 25 if codec in ("mpeg2video",) else 10
    path = write_video(tmp_path / "v" / name, 8, codec=codec, pix_fmt=pix_fmt, fps=rate)
    assert numbers(same_as_ffmpeg(path)) == [*range(8)]
    read = store(tmp_path / "v")
    assert numbers(read.frames) == [*range(8)]
    assert read.fps == pytest.approx(rate, rel=0.01)
    assert read.timestamps == pytest.approx(np.arange(8) / rate, abs=2e-3)


def test_a_pixel_format_that_changes_inside_a_stream_is_followed(tmp_path):
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("png", rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "rgb24"
        for place in range(6):
            image = Image.fromarray(numbered(place)).convert("RGB" if place < 3 else "L")
            packet = av.Packet(encoded(image))
            packet.stream, packet.pts, packet.dts = stream, place, place
            packet.time_base, packet.is_keyframe = Fraction(1, 10), True
            out.mux(packet)
    frames = same_as_ffmpeg(path)
    assert numbers(frames) == [*range(6)]
    assert frames[4][HEIGHT // 2 + 2, 2].tolist() == [96, 96, 96]


# --- reordered frames (F11)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.avi", "mpeg4"), ("a.mkv", "mpeg4"), ("a.mp4", "libx264"), ("a.avi", "libx264"), ("a.ts", "libx264")],
)
def test_reordered_frames_come_in_the_order_in_which_they_are_shown(tmp_path, name, codec):
    options = {"bf": "2", "q:v": "2"} if codec == "mpeg4" else {"bf": "3", "g": "12"}
    path = write_video(tmp_path / name, 12, codec=codec, options=options)
    assert numbers(same_as_ffmpeg(path)) == [*range(12)]
    times = [seconds for seconds, _ in decode(path)]
    assert np.diff(times) == pytest.approx(np.full(11, 0.1), abs=2e-3)


# --- streams (F11)


def two_streams(path, dispositions, attached=False):
    """Write a video of two streams, numbered from 0 and from 100."""
    with av.open(str(path), "w") as out:
        streams = []
        for place in range(2):
            codec = "mjpeg" if attached and place else "libx264"
            stream = out.add_stream(codec, rate=10, options={"crf": "8"} if codec == "libx264" else {})
            stream.height, stream.width = HEIGHT, WIDTH
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = dispositions[place]
            streams.append(stream)
        for i in range(8):
            for place, stream in enumerate(streams):
                if i == 0 or not (attached and place):
                    frame = av.VideoFrame.from_ndarray(numbered(100 * place + i), format="rgb24")
                    out.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        for stream in streams:
            out.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "dispositions", "first"),
    [("a.mkv", (0, 1), 100), ("a.mkv", (1, 0), 0), ("a.mp4", (0, 1), 100), ("a.mov", (1, 0), 0)],
)
def test_of_two_streams_the_default_one_is_probed_and_decoded(tmp_path, name, dispositions, first):
    path = two_streams(tmp_path / name, dispositions)
    assert numbers(frames_of(path)) == [*range(first, first + 8)]
    assert probe(path).frames == 8
    assert video_properties(path).streams == 2
    with av.open(str(path)) as container:
        assert container.streams.best("video").index == first // 100


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_cover_art_is_not_the_video(tmp_path, name):
    path = two_streams(tmp_path / name, (1, 0x400), attached=True)
    assert numbers(frames_of(path)) == [*range(8)]
    assert probe(path).frames == 8


def add_sound(out, stream):
    for place in range(4):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 8000, place * 1024
        out.mux(stream.encode(frame))
    out.mux(stream.encode())


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov", "a.avi"])
def test_a_file_of_sound_alone_is_no_video(tmp_path, name):
    (tmp_path / "v").mkdir()
    codec = "aac" if name == "a.mp4" else "pcm_s16le"
    with av.open(str(tmp_path / "v" / name), "w") as out:
        add_sound(out, out.add_stream(codec, rate=8000, layout="mono"))
    write_video(tmp_path / "v/b.mp4")
    read = store(tmp_path / "v")
    assert read.episode_ids == ("b.mp4",)
    assert read.unreadable == {name: "it has no video stream"}


def test_sound_beside_the_video_changes_nothing(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        sound = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        stream = out.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        add_sound(out, sound)
        for i in range(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(i), format="rgb24")))
        out.mux(stream.encode())
    assert numbers(same_as_ffmpeg(path)) == [*range(8)]


# --- orientation (F13)

TURNS = {
    "upright": ((1, 0, 0, 1), lambda f: f),
    "quarter": ((0, 1, -1, 0), lambda f: np.rot90(f, -1)),
    "half": ((-1, 0, 0, -1), lambda f: np.rot90(f, 2)),
    "three_quarters": ((0, -1, 1, 0), np.rot90),
    "mirrored": ((-1, 0, 0, 1), lambda f: f[:, ::-1]),
    "upside_down": ((1, 0, 0, -1), lambda f: f[::-1]),
    "transposed": ((0, 1, 1, 0), lambda f: f.swapaxes(0, 1)),
    "transversed": ((0, -1, -1, 0), lambda f: np.rot90(f, 2).swapaxes(0, 1)),
}


@pytest.mark.parametrize("kind", TURNS)
@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_the_display_matrix_turns_and_mirrors(tmp_path, kind, name):
    matrix, shown = TURNS[kind]
    plain = write_video(tmp_path / f"plain_{name}", 3)
    stored = frames_of(plain)
    path = turn(plain, *matrix)
    assert video_properties(path).orientation == matrix
    for frame, before in zip(same_as_ffmpeg(path), stored, strict=True):
        np.testing.assert_array_equal(frame, shown(before))


def test_a_display_matrix_that_is_no_quarter_turn_is_unreadable(tmp_path):
    path = write_video(tmp_path / "v/a.mp4", 3)
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 44
    data[place : place + 36] = struct.pack(">9i", 46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    write_video(tmp_path / "v/b.mp4")
    assert "must be a multiple of 90 degrees" in store(tmp_path / "v").unreadable["a.mp4"]


# --- edit lists (F10, F39)


@pytest.mark.parametrize("bframes", [0, 3])
@pytest.mark.parametrize(
    ("keep_ms", "skip", "shown"),
    [(600, 0.0, range(6)), (900, 0.3, range(3, 12)), (400, 0.5, range(5, 9)), (100, 0.7, range(7, 8))],
    ids=["tail", "head", "both", "one"],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_frames_that_an_edit_list_hides_are_no_frames(tmp_path, name, bframes, keep_ms, skip, shown):
    path = write_video(tmp_path / "v" / name, 12, options={"bf": str(bframes), "g": "12"})
    assert numbers(same_as_ffmpeg(trim(path, keep_ms=keep_ms, skip=skip))) == [*shown]
    read = store(tmp_path / "v")
    assert numbers(read.frames) == [*shown]
    assert read.timestamps == pytest.approx(np.arange(len(shown)) / 10, abs=1e-3)
    assert not read.unreadable


def test_an_edit_list_in_a_lerobot_video_shows_lerobots_frames(tmp_path):
    pytest.importorskip("lerobot")
    root = lerobot(tmp_path / "d", 3, lengths=(6,), video_frames=lambda e, n: 12)
    (video,) = root.rglob("*.mp4")
    trim(video, keep_ms=800, skip=0.3)
    assert numbers(store(root).frames) == numbers(lerobot_frames(root, tmp_path)) == [*range(3, 9)]


def test_an_edit_list_cannot_hide_that_a_file_is_cut(tmp_path):
    noise = [np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8) for i in range(12)]
    path = write_video(tmp_path / "a.mp4", noise, container={"movflags": "faststart"}, codec="mpeg4")
    trim(path, keep_ms=1100, skip=0.1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(Unreadable, match="truncated"):
        probe(path)


# --- damage


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".gif", ".ts", ".apng", ".flv"])
@pytest.mark.parametrize(
    "content", [b"", b"\0" * 5000, b"<html>404</html>\n" * 50, b"version https://git-lfs\n"]
)
def test_files_that_are_no_video_are_unreadable(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(Unreadable) as error:
        probe(path)
    assert str(error.value)
    with pytest.raises(Unreadable):
        list(decode(path))


@pytest.mark.parametrize(
    ("name", "codec", "tag"),
    [("a.mp4", "libx264", b"avc1"), ("a.mkv", "libvpx", b"V_VP8"), ("a.avi", "mpeg4", b"FMP4")],
)
def test_a_codec_that_nobody_knows_is_unreadable(tmp_path, name, codec, tag):
    path = write_video(tmp_path / "v" / name, 3, codec=codec)
    assert tag in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(tag, b"QQQQQQ"[: len(tag)]))
    write_video(tmp_path / "v/b.mp4", 3)
    read = store(tmp_path / "v")
    assert read.episode_ids == ("b.mp4",)
    assert read.unreadable[name].startswith(("its codec is unknown", "it has no video stream"))


def test_timestamps_that_go_back_name_the_frame(tmp_path):
    path = write_video(tmp_path / "v/a.mkv", 6, codec="ffv1", pix_fmt="yuv444p")
    block = b"\x81" + (300).to_bytes(2, "big")  # track 1 at 300 ms
    data = path.read_bytes()
    assert data.count(block) == 1
    path.write_bytes(data.replace(block, b"\x81" + (100).to_bytes(2, "big")))
    with pytest.raises(
        UserError, match=r"timestamps must not decrease, got 0.100 s after 0.200 s at frame 3"
    ):
        store(tmp_path / "v")


# --- images in tables (F19)


def test_every_8_bit_image_is_shown_as_pillow_does():
    base = Image.fromarray(numbered(5))
    for mode in ("L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "1"):
        image = base.convert(mode)
        frame = image_rgb(image)
        assert frame.dtype == np.uint8
        np.testing.assert_array_equal(frame, np.asarray(image.convert("RGB")))
        assert mode == "1" or number(frame) == 5  # two levels are dithered


IMAGES = {
    "png": {},
    "jpeg": {"quality": 95},
    "webp": {"lossless": True},
    "bmp": {},
    "tiff": {},
    "gif": {},
}


@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_of_image_file_shows_lerobots_frames(tmp_path, kind):
    pytest.importorskip("lerobot")

    def cell(e, i):
        return {"bytes": encoded(numbered(20 * e + i), kind, **IMAGES[kind]), "path": f"{i}.{kind}"}

    root = lerobot(tmp_path / "d", 3, cell=cell, lengths=(4,))
    ours = store(root).frames
    assert numbers(ours) == [0, 1, 2, 3]
    if kind != "gif":  # LeRobot shows palettes as one channel
        np.testing.assert_array_equal(ours, lerobot_frames(root, tmp_path))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_by_its_orientation_as_lerobot_does(tmp_path, orientation):
    pytest.importorskip("lerobot")
    exif = Image.Exif()
    exif[0x0112] = orientation

    def cell(e, i):
        return {"bytes": encoded(numbered(i), "jpeg", quality=95, exif=exif), "path": "a.jpg"}

    root = lerobot(tmp_path / "d", 3, cell=cell, lengths=(3,))
    assert store(root).frames.shape[1:3] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))
    np.testing.assert_array_equal(store(root).frames, lerobot_frames(root, tmp_path))


DEEP = {
    "float_tiff": lambda: encoded(Image.fromarray(np.full((HEIGHT, WIDTH), 0.5, np.float32)), "tiff"),
    "int32_tiff": lambda: encoded(Image.fromarray(np.full((HEIGHT, WIDTH), 70_000, np.int32)), "tiff"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_images_of_32_bits_are_refused_by_their_mode(tmp_path, kind):
    def cell(e, i):
        return {"bytes": DEEP[kind](), "path": None}

    root = lerobot(tmp_path / "d", 2, cell=cell, shape=(HEIGHT, WIDTH, 1))
    with pytest.raises(UserError, match="must have 8 or 16 bits per channel, got mode"):
        store(root)


def png_of_16_bits_per_channel():
    """Return a PNG of 16 bits per channel, which Pillow writes none of."""
    rows = np.full((HEIGHT, WIDTH, 3), [60_000, 30_000, 10]).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_16_bits_per_channel_are_what_lerobot_shows(tmp_path):
    pytest.importorskip("lerobot")
    data = png_of_16_bits_per_channel()
    root = lerobot(tmp_path / "d", 3, cell=lambda e, i: {"bytes": data, "path": "a.png"}, lengths=(2,))
    ours = store(root).frames
    np.testing.assert_array_equal(ours, lerobot_frames(root, tmp_path))
    assert np.abs(ours[0, 0, 0].astype(int) - (234, 117, 0)).max() <= 1


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (b"", "cannot be decoded|missing"),
        (b"hello", "cannot be decoded"),
        (encoded(numbered(1))[:120], "cannot be decoded"),
        (None, "image of row 2 is missing"),
    ],
    ids=["empty", "text", "cut", "null"],
)
def test_an_episode_with_a_broken_image_is_unreadable_by_name(tmp_path, broken, words):
    def cell(e, i):
        return {"bytes": broken, "path": None} if (e, i) == (0, 2) else image_cell(e, i)

    read = store(lerobot(tmp_path / "d", 2, cell=cell))
    assert numbers(read.frames) == [*range(20, 26)]
    ((name, reason),) = read.unreadable.items()
    assert "episode 0" in name
    assert any(each in reason for each in words.split("|"))


def test_a_depth_camera_counts_as_none(tmp_path):
    depth = {"dtype": "video", "shape": [HEIGHT, WIDTH, 1], "names": None}
    for place, about in enumerate(
        ({"info": {"is_depth_map": True}}, {"video_info": {"video.is_depth_map": True}})
    ):
        root = lerobot(
            tmp_path / str(place), 2, columns={"observation.images.depth": ({**depth, **about}, None)}
        )
        assert store(root).camera == "observation.images.top"


def test_wrong_numbers_are_noticed():
    assert number(numbered(7)) != number(numbered(8))
    with io.BytesIO(encoded(numbered(9))) as file, Image.open(file) as image:
        assert number(np.asarray(image)) == 9
