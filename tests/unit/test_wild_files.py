"""Trees of files as people have them: links, cycles, odd names, other endings, images beside the table."""

import os
import shutil
import sys

import numpy as np
import pytest

from latentact.data.digest import Memo
from latentact.data.files import files_below
from latentact.data.format import open_source
from latentact.errors import UserError
from wild import (
    EPISODE,
    TOP,
    encoded,
    image_cell,
    lerobot,
    lerobot_frames,
    numbered,
    numbers,
    store,
    write_video,
)

ROWS = [*range(8), *range(20, 26)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with a.mp4 and b.mp4, numbered from 0 and from 30."""
    root = tmp_path_factory.mktemp("clips")
    write_video(root / "a.mp4", 3)
    write_video(root / "b.mp4", 3, start=30)
    return root


def source_of(path, tmp_path):
    return open_source(path, "", Memo(tmp_path / "memo", path))


def move_and_link(folder, disk):
    disk.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, disk)
    folder.symlink_to(disk)


# --- folders of videos (F26, F32)


def test_linked_folders_are_entered(tmp_path, clips):
    (tmp_path / "only").mkdir()
    (tmp_path / "only/task1").symlink_to(clips)
    assert store(tmp_path / "only").episode_ids == ("task1/a.mp4", "task1/b.mp4")
    write_video(tmp_path / "both/c.mp4", 3, start=60)
    (tmp_path / "both/task1").symlink_to(clips)
    (tmp_path / "both/d.mp4").symlink_to(clips / "b.mp4")
    read = store(tmp_path / "both")
    assert read.episode_ids == ("c.mp4", "d.mp4", "task1/a.mp4", "task1/b.mp4")
    assert numbers(read.frames[read.starts]) == [60, 30, 0, 30]


def test_a_link_to_a_dataset_is_the_dataset(tmp_path, clips):
    (tmp_path / "link").symlink_to(clips)
    (tmp_path / "again").symlink_to("link")
    assert store(tmp_path / "again").episode_ids == ("a.mp4", "b.mp4")
    (tmp_path / "one.mp4").symlink_to(clips / "b.mp4")
    assert numbers(store(tmp_path / "one.mp4").frames) == [30, 31, 32]


def test_cycles_end_and_are_named(tmp_path, clips):
    shutil.copytree(clips, tmp_path / "v/x")
    (tmp_path / "v/x/up").symlink_to("..")
    (tmp_path / "v/self").symlink_to(".")
    (tmp_path / "v/loop").symlink_to("loop")
    source = source_of(tmp_path / "v", tmp_path)
    assert [episode.name for episode in source.episodes] == ["x/a.mp4", "x/b.mp4"]
    cycle = "a link to a parent folder"
    assert source.skipped == {"x/up": cycle, "self": cycle, "loop": "a dangling link"}


def test_one_folder_by_two_names_counts_twice(tmp_path, clips):
    shutil.copytree(clips, tmp_path / "v/x")
    (tmp_path / "v/y").symlink_to("x")
    assert store(tmp_path / "v").episode_ids == ("x/a.mp4", "x/b.mp4", "y/a.mp4", "y/b.mp4")


def test_what_is_left_out_is_listed_with_a_reason(tmp_path, clips):
    root = shutil.copytree(clips, tmp_path / "v")
    (root / "gone.mp4").symlink_to(root / "nowhere.mp4")
    (root / "readme.txt").write_text("x")
    (root / "noending").write_text("x")
    shutil.copytree(clips, root / ".cache")
    shutil.copy(clips / "a.mp4", root / "._a.mp4")
    os.mkfifo(root / "pipe.mp4")
    source = source_of(root, tmp_path)
    assert [episode.name for episode in source.episodes] == ["a.mp4", "b.mp4"]
    assert source.skipped == {
        "gone.mp4": "a dangling link",
        "readme.txt": "unsupported suffix '.txt'",
        "noending": "unsupported suffix ''",
        ".cache/a.mp4": "hidden",
        ".cache/b.mp4": "hidden",
        "._a.mp4": "hidden",
        "pipe.mp4": "not a regular file",
    }
    assert not source.unreadable


@pytest.mark.parametrize("suffix", [".m4v", ".MP4", ".Mov", ".ts", ".mts", ".m2ts", ".3gp", ".mkv"])
def test_every_ending_of_a_video_is_read(tmp_path, clips, suffix):
    container = {".ts": "ts", ".mts": "ts", ".m2ts": "ts", ".mkv": "mkv"}.get(suffix, "mp4")
    path = write_video(tmp_path / f"made.{container}", 3)
    (tmp_path / "v").mkdir()
    path.rename(tmp_path / "v" / f"x{suffix}")
    assert store(tmp_path / "v").episode_ids == (f"x{suffix}",)


def test_a_file_with_the_ending_of_another_container_is_read(tmp_path):
    path = write_video(tmp_path / "a.mkv", 3)
    path.rename(tmp_path / "a.mp4")
    assert numbers(store(tmp_path).frames) == [0, 1, 2]


NAMES = [
    "видео 1.mp4",
    "动作.mp4",
    "e\u0301.mp4",
    "a b'c\"d$(x);&.mp4",
    "%03d.mp4",
    "http:x.mp4",
    "file:a.mp4",
    "-i.mp4",
    "new\nline.mp4",
    "tab\t.mp4",
    "x" * 240 + ".mp4",
    "concat:a|b.mp4",
    "🤖.mp4",
    "[a]*?.mp4",
    "a..mp4",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_any_kind_are_read(tmp_path, clips, name):
    (tmp_path / "v").mkdir()
    shutil.copy(clips / "b.mp4", tmp_path / "v" / name)
    read = store(tmp_path / "v")
    assert read.episode_ids == (name,)
    assert numbers(read.frames) == [30, 31, 32]
    assert numbers(store(tmp_path / "v" / name).frames) == [30, 31, 32]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("name", [b"caf\xe9.mp4", b"\xff\xfe.mp4", b"f\xe9lder/a.mp4"])
def test_names_that_are_not_utf8_are_read(tmp_path, clips, name):
    file = os.fsencode(tmp_path) + b"/v/" + name
    os.makedirs(os.path.dirname(file))
    shutil.copy(clips / "b.mp4", file)
    read = store(tmp_path / "v")
    assert read.episode_ids == (name.decode("utf-8", "backslashreplace"),)
    assert numbers(read.frames) == [30, 31, 32]
    folder = tmp_path / os.fsdecode(b"d\xe9")
    (tmp_path / "v").rename(folder)
    assert numbers(store(folder).frames) == [30, 31, 32]


@pytest.mark.parametrize("name", ["видео", "a b", "d\u00e9", "[x]*", "x" * 200])
def test_datasets_in_folders_of_any_name(tmp_path, name):
    root = lerobot(tmp_path / name / "data", 3)
    assert numbers(store(root).frames) == ROWS


def test_deep_folders_are_entered(tmp_path, clips):
    deep = tmp_path.joinpath("v", *"abcdefghijklmnopqrstuvwxyz")
    shutil.copytree(clips, deep)
    assert store(tmp_path / "v").num_episodes == 2


def test_empty_files_and_sound_are_counted_as_unreadable(tmp_path, clips):
    root = shutil.copytree(clips, tmp_path / "v")
    (root / "0.mp4").write_bytes(b"")
    (root / "c.mkv").write_bytes(b"")
    read = store(root)
    assert read.episode_ids == ("a.mp4", "b.mp4")
    assert sorted(read.unreadable) == ["0.mp4", "c.mkv"]
    with pytest.raises(UserError, match=r"2 unreadable: 0.mp4"):
        store(root, strict=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root opens everything")
def test_a_folder_that_cannot_be_opened_is_named(tmp_path, clips):
    root = shutil.copytree(clips, tmp_path / "v")
    (root / "locked").mkdir(mode=0)
    assert "locked" in source_of(root, tmp_path).skipped


def test_files_below_lists_everything_without_endings(tmp_path, clips):
    root = shutil.copytree(clips, tmp_path / "v")
    (root / ".hidden").write_text("x")
    assert [file.name for file in files_below(root)[0]] == [".hidden", "a.mp4", "b.mp4"]
    assert files_below(root / "a.mp4") == ([root / "a.mp4"], {})


def test_npz_files_are_found_by_the_same_rules(tmp_path):
    (tmp_path / "disk").mkdir()
    obs = np.stack([numbered(i) for i in range(3)])
    np.savez(tmp_path / "disk/a.npz", obs=obs)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x").symlink_to(tmp_path / "disk")
    (tmp_path / "d/.b.npz").write_text("x")
    (tmp_path / "d/c.npz").symlink_to("nowhere.npz")
    source = source_of(tmp_path / "d", tmp_path)
    assert [episode.name for episode in source.episodes] == ["x/a.npz #0"]
    assert source.skipped == {".b.npz": "hidden", "c.npz": "a dangling link"}


# --- links inside LeRobot datasets (F02)


@pytest.mark.parametrize(
    "folder", [f"videos/{TOP}", "videos", "meta/episodes", "meta", "data", "data/chunk-000"]
)
def test_linked_folders_of_a_dataset_are_entered(tmp_path, folder):
    root = lerobot(tmp_path / "d", 3)
    move_and_link(root / folder, tmp_path / "disk" / "moved")
    assert numbers(store(root).frames) == ROWS


@pytest.mark.parametrize("version", [2, 3])
def test_the_layout_of_the_hubs_cache_is_read(tmp_path, version):
    pytest.importorskip("lerobot")
    root = lerobot(tmp_path / "d", version)
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    blobs.mkdir(parents=True)
    for place, file in enumerate(sorted(path for path in root.rglob("*") if path.is_file())):
        shutil.copy(file, blobs / f"blob{place}")
        link = snapshot / file.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f"blob{place}", link.parent))
    assert numbers(store(snapshot).frames) == ROWS
    if version == 3:
        assert numbers(lerobot_frames(snapshot, tmp_path)) == ROWS


def test_a_dangling_video_leaves_its_episodes_out_by_number(tmp_path, caplog):
    root = lerobot(tmp_path / "d", 2, lengths=(3, 3))
    (file,) = root.rglob("episode_000000.mp4")
    file.unlink()
    file.symlink_to("nowhere.mp4")
    assert numbers(store(root).frames) == [20, 21, 22]
    assert "2 episodes are listed; using the 1 whose files are present" in caplog.text


# --- images beside the table (F20)


def beside(root, e, i):
    return f"images/{TOP}/episode_{e:06d}/frame_{i:06d}.png"


def write_images(root, numbers_of):
    for (e, i), n in numbers_of.items():
        file = root / beside(root, e, i)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(numbered(n)))


def paths_only(tmp_path):
    return lerobot(
        tmp_path / "d", 2, lengths=(3, 2), cell=lambda e, i: {"bytes": None, "path": beside(None, e, i)}
    )


def test_images_beside_the_table_are_read(tmp_path):
    root = paths_only(tmp_path)
    write_images(root, {(e, i): EPISODE * e + i for e, n in enumerate((3, 2)) for i in range(n)})
    assert numbers(store(root).frames) == [0, 1, 2, 20, 21]


def test_images_that_are_not_there_are_one_sentence_and_found_once_they_are(tmp_path):
    root = paths_only(tmp_path)
    with pytest.raises(
        UserError, match=r"its image of row 0 is the file images/.*, which is not in the dataset"
    ):
        store(root)
    write_images(root, {(0, i): i for i in range(3)})
    read = store(root)
    assert numbers(read.frames) == [0, 1, 2]
    assert list(read.unreadable) == ["episode 1 in data/chunk-000/episode_000001.parquet"]
    write_images(root, {(1, i): 20 + i for i in range(2)})
    assert numbers(store(root).frames) == [0, 1, 2, 20, 21]


def test_images_beside_the_table_that_change_are_read_again(tmp_path):
    root = paths_only(tmp_path)
    write_images(root, {(e, i): 0 for e, n in enumerate((3, 2)) for i in range(n)})
    assert numbers(store(root).frames) == [0] * 5
    write_images(root, {(1, 1): 77})
    assert numbers(store(root).frames) == [0, 0, 0, 0, 77]


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "../secret.png", "images/../../secret.png", "", "x\0y", "images"]
)
def test_paths_that_lead_out_of_the_dataset_are_not_followed(tmp_path, path):
    (tmp_path / "secret.png").write_bytes(encoded(numbered(1)))
    root = lerobot(tmp_path / "d", 2, lengths=(2,), cell=lambda e, i: {"bytes": None, "path": path})
    (root / "images").mkdir()
    with pytest.raises(UserError, match="its image of row 0 is"):
        store(root)


def test_images_in_the_table_are_used_whatever_their_path_says(tmp_path):
    cell = lambda e, i: {**image_cell(e, i), "path": "/nowhere/x.png"}  # noqa: E731
    assert numbers(store(lerobot(tmp_path / "d", 2, cell=cell)).frames) == ROWS


def test_a_folder_of_nothing_but_skipped_files_names_them(tmp_path, clips):
    folder = tmp_path / "d"
    folder.mkdir()
    shutil.copy(clips / "a.mp4", folder / ".a.mp4")
    with pytest.raises(
        UserError, match=r"no data that can be read \(1 files skipped, such as .a.mp4: hidden\)"
    ):
        source_of(folder, tmp_path)
    (folder / ".a.mp4").rename(folder / "a.txt")
    with pytest.raises(UserError, match=r"such as a.txt: unsupported suffix '.txt'"):
        source_of(folder, tmp_path)


@pytest.mark.parametrize("name", ["a.mp4", "a.npz", "a"])
def test_a_pipe_is_no_data(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match="holds no data that can be read"):
            source_of(path, tmp_path)
