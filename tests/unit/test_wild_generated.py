"""Generated inputs (tables, metadata, videos, folder trees), compared with LeRobot and FFmpeg."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentact.data.decode.video import decode, probe
from latentact.data.digest import Memo
from latentact.data.format import Unreadable, open_source
from latentact.errors import UserError
from wild import (
    ACTION,
    STATE,
    TOP,
    actions,
    ffmpeg_frames,
    floats,
    image_cell,
    lerobot,
    lerobot_frames,
    numbers,
    pyav_times,
    store,
    trim,
    turn,
    write_video,
)

SETTINGS = {
    "derandomize": True,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}


@contextmanager
def folder():
    """Yield a new folder for each example."""
    with tempfile.TemporaryDirectory(prefix="wild") as name:
        yield Path(name)


def outcome(find):
    """Return (what `find` returns, ""), or (None, its UserError); other exceptions propagate."""
    try:
        return find(), ""
    except UserError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 1200
    return None, message


# --- tables: clocks

CLOCKS = st.sampled_from(
    ["exact", "jitter", "late", "cut", "resets", "repeats", "wall", "millis", "nan", "slow", "fast"]
)
FLOATS = st.sampled_from([pa.float32(), pa.float64()])


def clock(kind, e, n, rng):
    t = np.arange(n) / 10
    return {
        "exact": t,
        "jitter": t + rng.uniform(-3e-5, 3e-5, n),
        "late": t + 0.2,
        "cut": t[::2],
        "resets": np.arange(n) % max(2, n - 1) / 10,
        "repeats": np.maximum(0, np.arange(n) - 1) / 10,
        "wall": 1.7e9 + t,
        "millis": 1000 * t,
        "nan": np.where(np.arange(n) == n - 1, np.nan, t),
        "slow": 2 * t,
        "fast": t / 2,
    }[kind]


@settings(max_examples=15, **SETTINGS)
@given(
    kinds=st.lists(CLOCKS, min_size=1, max_size=3),
    arrow=FLOATS,
    images=st.booleans(),
    split=st.booleans(),
    n=st.integers(1, 7),
    seed=st.integers(0, 9),
)
def test_whatever_lerobot_opens_is_read_as_it_shows_it(kinds, arrow, images, split, n, seed):
    pytest.importorskip("lerobot")
    rng = np.random.default_rng(seed)
    clocks = [clock(kind, e, n, rng) for e, kind in enumerate(kinds)]
    lengths = [len(each) for each in clocks]
    with folder() as path:
        root = lerobot(
            path / "d",
            3,
            lengths=lengths,
            split=split,
            times=lambda e, n: pa.array(clocks[e]).cast(arrow),
            cell=image_cell if images else None,
            video_frames=lambda *_: 9,
        )
        read, message = outcome(lambda: store(root))
        theirs = rows_of_lerobot(root, path, lengths)
        starts = np.cumsum(lengths) - lengths
        for e, kind in enumerate(kinds):
            name = f"episode {e}"
            if read is not None and name in read.episode_ids:
                place = read.episode_ids.index(name)
                ours = numbers(read.frames[read.starts[place] :][: read.lengths[place]])
                if theirs[e] is not None:
                    assert ours == theirs[e], kind
                assert read.source_rows[read.starts[place]] == starts[e]
                continue
            assert not images
            reason = message or next(why for label, why in read.unreadable.items() if label.startswith(name))
            assert "column timestamp" in reason
            assert "row" in reason
            assert kind not in ("exact", "jitter", "late", "cut"), reason


def rows_of_lerobot(root, cache, lengths):
    """Return the frame numbers of each episode as decoded by LeRobot; None if it fails."""
    from wild import lerobot_dataset

    found, row = [], 0
    with lerobot_dataset(root, cache) as read:
        for n in lengths:
            try:
                items = [read[i][TOP].numpy().transpose(1, 2, 0) * 255 for i in range(row, row + n)]
                found.append(numbers(items))
            except (ValueError, RuntimeError, AssertionError, IndexError, OSError):
                found.append(None)
            row += n
    return found


# --- tables: numbers

NUMBER = st.one_of(
    st.floats(-5, 5, width=32), st.sampled_from([None, float("nan"), float("inf"), -float("inf"), 0.0])
)
LISTS = st.sampled_from(
    [
        pa.list_(pa.float32()),
        pa.large_list(pa.float64()),
        pa.list_(pa.float32(), 2),
        pa.list_(pa.list_(pa.float32())),
    ]
)


@settings(max_examples=40, **SETTINGS)
@given(
    rows=st.lists(st.one_of(st.none(), st.tuples(NUMBER, NUMBER)), min_size=7, max_size=7),
    arrow=LISTS,
    version=st.sampled_from([2, 3]),
    name=st.sampled_from([STATE, ACTION]),
)
def test_numbers_stay_in_their_row_or_name_it(rows, arrow, version, name):
    nested = pa.types.is_list(arrow.value_type)

    def values(e, n):
        part = rows[:4] if e == 0 else rows[4:]
        cells = [None if row is None else [[*row]] if nested else [*row] for row in part]
        return pa.array(cells, arrow)

    want = np.array(
        [[np.nan, np.nan] if row is None else [np.nan if x is None else x for x in row] for row in rows]
    )
    good = np.isfinite(want).all(1)
    with folder() as path:
        root = lerobot(
            path / "d", version, lengths=(4, 3), cell=image_cell, columns={name: (floats(2), values)}
        )
        read = store(root, drop_nonfinite=True)
        assert read.usable.tolist() == good.tolist()
        strict, message = outcome(lambda: column_of(store(root), name))
        asked = good | (np.isin(np.arange(7), [3, 6]) if name == ACTION else False)
        if asked.all():
            np.testing.assert_array_equal(strict[good], want.astype(np.float32)[good])
        else:
            row = int(np.flatnonzero(~asked)[0])
            assert f"column {name}: {(~asked).sum()} rows are missing" in message
            assert f"row {row % 4} of episode {row // 4}" in message
        dropped = column_of(read, name)
        np.testing.assert_array_equal(dropped[good], want.astype(np.float32)[good])
        assert not read.transitions(1)[:-1][~(good[:-1] & good[1:])].any()


def column_of(read, name):
    return actions(read, range(read.num_episodes)) if name == ACTION else read.state


@settings(max_examples=25, **SETTINGS)
@given(
    values=st.lists(
        st.one_of(st.none(), st.integers(-3, 9), st.sampled_from([2**40, -(2**31)])), min_size=7, max_size=7
    ),
    version=st.sampled_from([2, 3]),
)
def test_classes_are_the_values_that_occur(values, version):
    feature = {"dtype": "int64", "shape": [1], "names": None}
    column = {ACTION: (feature, lambda e, n: pa.array(values[:4] if e == 0 else values[4:], pa.int64()))}
    with folder() as path:
        read = store(
            lerobot(path / "d", version, lengths=(4, 3), cell=image_cell, columns=column), drop_nonfinite=True
        )
        space, found = read.action_space, actions(read, [0, 1])
        known = space.values or tuple(range(space.size))
        for got, value in zip(found.tolist(), values, strict=True):
            assert (got == -1) if value is None else (known[got] == value)


# --- metadata

JSON = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(-3, 3), st.floats(allow_nan=False), st.text(max_size=6)),
        st.sampled_from([10**30, -1, "10", "", "videos/{x}.mp4", "{", "d/{episode_index}.parquet", [], {}]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


def places(value, above=()):
    """Yield the path of every value inside JSON."""
    if above:
        yield above
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*above, key))


def put(value, place, new):
    *above, last = place
    for key in above:
        value = value[key]
    if new is ...:
        del value[last]
    else:
        value[last] = new


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    return {v: lerobot(root / str(v), v, lengths=(3, 2), cell=image_cell) for v in (2, 3)}


@settings(max_examples=80, **SETTINGS)
@given(data=st.data(), version=st.sampled_from([2, 3]))
def test_info_with_any_value_anywhere_is_read_or_refused(good, data, version):
    root = good[version]
    file = root / "meta/info.json"
    text = file.read_text()
    info = json.loads(text)
    place = data.draw(st.sampled_from(sorted(places(info), key=str)))
    put(info, place, data.draw(st.one_of(st.just(...), JSON)))
    file.write_text(json.dumps(info))
    try:
        read, message = outcome(lambda: opened_whole(root))
        assert message or numbers(read) in ([0, 1, 2, 20, 21], [0, 1, 2])
    finally:
        file.write_text(text)


def opened_whole(root):
    """Read all columns of a dataset and return its frames, without a cache."""
    with tempfile.TemporaryDirectory() as cache:
        source = open_source(root, "", Memo(Path(cache), root))
        for name in (STATE, ACTION, "timestamp", "task_index"):
            source.column(name)
        [source.row_tasks(number) for number in range(len(source.episodes))]
        return [frame for number in range(len(source.episodes)) for _, frame in source.frames(number)]


@settings(max_examples=100, **SETTINGS)
@given(
    name=st.sampled_from(["meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl"]),
    data=st.data(),
)
def test_text_files_with_any_damage_are_read_or_refused(good, name, data):
    root = good[2]
    file = root / name
    before = file.read_bytes()
    begin = data.draw(st.integers(0, len(before)))
    end = data.draw(st.integers(begin, len(before)))
    new = data.draw(
        st.one_of(st.just(b""), st.binary(max_size=4), st.sampled_from([b"null", b"[", b'"', b"\n", b"3"]))
    )
    file.write_bytes(before[:begin] + new + before[end:])
    try:
        outcome(lambda: opened_whole(root))
    finally:
        file.write_bytes(before)


@settings(max_examples=60, **SETTINGS)
@given(data=st.data(), kind=st.sampled_from(["data", "meta/episodes", "meta/tasks.parquet"]))
def test_parquet_with_any_damage_is_read_or_refused(good, data, kind):
    root = good[3]
    place = root / kind
    (file,) = place.rglob("*.parquet") if place.is_dir() else [place]
    before = file.read_bytes()
    begin = data.draw(st.integers(0, len(before) - 1))
    size = data.draw(st.integers(1, 40))
    new = data.draw(st.sampled_from([b"", bytes(size)]))
    file.write_bytes(before[:begin] + new + before[begin + size :])
    try:
        outcome(lambda: opened_or_unreadable(root))
    finally:
        file.write_bytes(before)


def opened_or_unreadable(root):
    try:
        return opened_whole(root)
    except Unreadable as error:
        raise UserError(str(error)) from error


# --- videos

CONTAINERS = [
    ("a.mp4", "libx264", "yuv420p"),
    ("a.mov", "mpeg4", "yuv420p"),
    ("a.mkv", "ffv1", "yuv444p"),
    ("a.mkv", "ffv1", "yuv420p10le"),
    ("a.mkv", "mjpeg", "yuvj422p"),
    ("a.mp4", "libx264", "yuvj420p"),
    ("a.mkv", "libx264", "yuv444p"),
    ("a.mkv", "ffv1", "gray"),
    ("a.mkv", "ffv1", "bgra"),
]
RATES = st.one_of(
    st.none(),
    st.lists(st.integers(20, 400), min_size=4, max_size=9).map(lambda gaps: [0, *np.cumsum(gaps).tolist()]),
    st.integers(0, 900).map(lambda begin: [begin + 100 * i for i in range(6)]),
)
TURNS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (0, 1, 1, 0)]


@settings(max_examples=40, **SETTINGS)
@given(
    kind=st.sampled_from(CONTAINERS),
    millis=RATES,
    matrix=st.sampled_from([2, 1, 5, 7, 9]),
    span=st.sampled_from([0, 1, 2]),
    bframes=st.integers(0, 2),
    size=st.sampled_from([(32, 48), (34, 50), (48, 32)]),
    turned=st.sampled_from(TURNS),
    edit=st.one_of(st.none(), st.tuples(st.integers(100, 700), st.sampled_from([0.0, 0.1, 0.25]))),
)
def test_videos_are_shown_as_by_ffmpeg(kind, millis, matrix, span, bframes, size, turned, edit):
    name, codec, pix_fmt = kind
    count = 6 if millis is None else len(millis)
    full = span == 2 or pix_fmt.startswith("yuvj")
    color = (0, 0) if pix_fmt == "bgra" else (matrix, 2 if full else span)
    options = {"bf": str(bframes)} if codec in ("libx264", "mpeg4") else {}
    with folder() as path:
        file = write_video(
            path / "v" / name,
            count,
            codec=codec,
            pix_fmt=pix_fmt,
            millis=millis,
            color=color,
            options=options,
            size=size,
        )
        if name.endswith(("mp4", "mov")):
            turn(file, *turned)
            if edit:
                trim(file, keep_ms=edit[0], skip=edit[1])
        if not (shown := pyav_times(file)) or np.diff(shown).min(initial=0) < 0:
            with pytest.raises(UserError, match=r"it has no frames|timestamps go back"):
                store(path / "v")
            return
        times = [time for time, _ in decode(file)]
        ours = np.stack([frame for _, frame in decode(file)])
        assert times == pytest.approx(shown)
        assert probe(file).frames == len(times)
        theirs = ffmpeg_frames(file)
        if theirs is not None:
            assert ours.shape == theirs.shape
            assert np.abs(ours.astype(int) - theirs).max() <= 1
        read = store(path / "v")
        assert read.frame_times[0] == 0
        assert set(np.round(read.frame_times, 6)) <= set(np.round(np.array(times) - times[0], 6))
        for gap in (1, 2):
            rows = np.flatnonzero(read.transitions(gap))
            distance = read.frame_times[rows + gap] - read.frame_times[rows]
            assert (distance > 0).all()


@settings(max_examples=40, **SETTINGS)
@given(
    data=st.data(),
    kind=st.sampled_from([("a.mp4", "mpeg4"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.gif", "gif")]),
)
def test_videos_with_any_damage_are_read_or_unreadable(clips, data, kind):
    name, _ = kind
    content = clips[kind]
    with folder() as path:
        begin = data.draw(st.integers(0, len(content) - 1))
        size = data.draw(st.integers(1, 200))
        new = data.draw(st.sampled_from([b"", bytes(size), b"\xff" * size]))
        cut = data.draw(st.booleans())
        (path / "v").mkdir()
        (path / "v" / name).write_bytes(
            content[:begin] if cut else content[:begin] + new + content[begin + size :]
        )
        outcome(lambda: store(path / "v", resolution=32))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    found = {}
    for name, codec in (("a.mp4", "mpeg4"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.gif", "gif")):
        pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        found[name, codec] = write_video(root / name, 6, codec=codec, pix_fmt=pix_fmt).read_bytes()
    return found


# --- trees of files

PART = st.sampled_from(["a", "b", "x y", "é", ".h", "c"])
ENDING = st.sampled_from([".mp4", ".MP4", ".mkv", ".txt", "", ".m4v"])


@settings(max_examples=40, **SETTINGS)
@given(
    files=st.lists(st.tuples(st.lists(PART, max_size=3), PART, ENDING), min_size=1, max_size=6),
    links=st.lists(st.tuples(PART, st.lists(PART, max_size=2)), max_size=4),
)
def test_every_name_in_a_tree_is_read_or_has_a_reason(clips, files, links):
    content = clips["a.mp4", "mpeg4"]
    with folder() as path:
        root = path / "v"
        root.mkdir()
        for above, stem, ending in files:
            file = root.joinpath(*above, f"{stem}{ending}")
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            except (NotADirectoryError, FileExistsError, IsADirectoryError):
                continue
        for name, target in links:
            link = root / f"link {name}"
            if not link.is_symlink():
                link.symlink_to(root.joinpath(*target), target_is_directory=True)
        try:
            source = open_source(root, "", Memo(path / "memo", root))
        except UserError:
            source = None
        seen = set(walk(root))
        wanted = {
            name
            for name in seen
            if Path(name).suffix.lower() in (".mp4", ".m4v", ".mkv")
            and not any(part.startswith(".") for part in Path(name).parts)
        }
        if source is None:
            assert not wanted
            return
        read = {episode.name for episode in source.episodes}
        assert read == wanted
        assert seen - read <= set(source.skipped) | set(source.unreadable)
        assert all(source.skipped.values())


def walk(folder, above=()):
    """Yield the names of the files in a folder tree; follows links, but not to parent folders."""
    here = os.path.realpath(folder)
    if here in above:
        return
    for name in os.listdir(folder):
        inner = Path(folder) / name
        if inner.is_dir():
            for file in walk(inner, (*above, here)):
                yield f"{name}/{file}"
        elif inner.is_file():
            yield name


def test_what_is_made_can_be_opened(tmp_path):
    pytest.importorskip("lerobot")
    root = lerobot(tmp_path / "d", 3, lengths=(3, 2), cell=image_cell)
    assert numbers(lerobot_frames(root, tmp_path)) == [0, 1, 2, 20, 21]
    shutil.rmtree(root)
