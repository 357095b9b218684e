"""`latentact precompute` through the command line: columns, files, kills, processes and refusals."""

import hashlib
import json
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TINY_LAM, contents, ok, ranks, refused, start
from latentact.data.cache import DataConfig, open_store
from latentact.data.latents import read_labels, read_token_file
from latentact.errors import UserError
from latentact.io.specs import load_spec
from latentact.lams.contract import load_lam

LENGTHS = (12, 20, 7)
ROWS, SIZE = sum(LENGTHS), 96
CAMERA = "observation.images.top"
TOKENS, CODES, VALID = "observation.lam_tokens", "observation.lam_codes", "observation.lam_valid"
VQ = (
    *TINY_LAM,
    "lam.bottleneck.kind=vq_ema",
    *(
        "lam.bottleneck.dim=16",
        "lam.bottleneck.codebooks=2",
        "lam.bottleneck.positions=2",
        "training.steps=5",
    ),
)


def pictures(episode, length, size=SIZE):
    frames = np.full((length, size, size, 3), 30, np.uint8)
    for i, frame in enumerate(frames):
        x = (7 * episode + 4 * i) % (size - 24)
        frame[x : x + 24, 20 + 5 * episode : 44 + 5 * episode] = (250, 200, 60)
    return frames


def write_v3(root, lengths=LENGTHS, size=SIZE):
    from latentact.data.lerobot.writer import EpisodeBuffer, RecordSpec, stage_episode, write_dataset
    from latentact.types import ActionSpace

    spec = RecordSpec(
        fps=10,
        camera=CAMERA,
        height=size,
        width=size,
        action_space=ActionSpace(kind="continuous", size=2),
        action_names=("x", "y"),
        state_names=("x", "y"),
        robot_type="toy",
    )
    staging, staged = root.with_name("staged"), []
    staging.mkdir(parents=True)
    for number, n in enumerate(lengths):
        numbers = np.arange(2 * n, dtype=np.float32).reshape(n, 2) + number
        episode = EpisodeBuffer(
            frames=pictures(number, n, size),
            state=numbers,
            action=-numbers,
            reward=np.zeros(n, np.float32),
            success=np.zeros(n, bool),
            task=f"task {number % 2}",
        )
        staged.append(staging / f"{number}.npz")
        stage_episode(staged[-1], spec, episode)
    write_dataset(root, spec, staged, sidecars={})
    shutil.rmtree(staging)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A LeRobot v3 dataset of three episodes as AV1 video, 10 fps."""
    return write_v3(tmp_path_factory.mktemp("v3") / "data")


@pytest.fixture(scope="module")
def lam(tmp_path_factory, blocks):
    """A LAM with codes: four tokens of four numbers, a gap of 0.1 s."""
    out = tmp_path_factory.mktemp("lam") / "lam"
    ok("train-lam", f"data.path={blocks}", *VQ, f"out={out}")
    return out


@pytest.fixture(scope="module")
def column(data, lam, tmp_path_factory):
    """The dataset with columns, batches of 8."""
    out = tmp_path_factory.mktemp("column") / "out"
    ok(*command(data, lam, out))
    return out


def command(data, lam, out, *more):
    where = ("--dataset-root", data, "--lam-model-path", lam, "--output-dir", out)
    return ("precompute", *where, "--batch-size", "8", *more)


def lerobot(root, **options):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("made/up", root=root, video_backend="pyav", **options)


def by_hand(lam, data, kind):
    """What the model says, a transition at a time."""
    model, store = load_lam(lam), open_store(DataConfig(path=str(data), resolution=32))
    found = np.zeros((len(store.frames), model.spec.tokens * model.spec.token_dim), np.float32)
    for first, length in zip(store.starts, store.lengths, strict=True):
        frames = torch.from_numpy(np.array(store.frames[first : first + length])).permute(0, 3, 1, 2)[None]
        with torch.inference_mode():
            vectors = getattr(model.encode(frames), kind)[0]
        found[first : first + length - 1] = vectors.flatten(1).numpy()
    return found


def test_the_column_is_what_the_model_says(data, lam, column):
    read = lerobot(column, delta_timestamps={TOKENS: [-0.1, 0.0], CAMERA: [0.0]})
    assert read.num_frames == ROWS
    wanted = by_hand(lam, data, "continuous")
    table = lerobot(column).hf_dataset
    tokens = np.stack([np.asarray(row) for row in table[TOKENS]])
    assert np.abs(tokens - wanted).max() < 1e-5
    assert np.abs(wanted).max() > 0.01
    ends = np.cumsum(LENGTHS) - 1
    valid = np.array([bool(value) for value in table[VALID]])
    assert np.flatnonzero(~valid).tolist() == ends.tolist()
    assert not tokens[ends].any()
    codes = np.stack([np.asarray(row) for row in table[CODES]])
    assert codes.shape == (ROWS, 4)
    item = read[13]
    assert torch.equal(item[TOKENS], torch.from_numpy(tokens[12:14]))
    assert item[CAMERA].shape == (3, SIZE, SIZE)
    assert read[12][f"{TOKENS}_is_pad"].tolist() == [True, False]
    assert read[12]["observation.state"].tolist() == [1.0, 2.0]


def test_videos_are_linked_and_the_rest_is_kept(data, column):
    video = next((column / "videos").rglob("*.mp4"))
    assert video.samefile(data / video.relative_to(column))
    info = json.loads((column / "meta/info.json").read_text())
    assert info["features"][TOKENS] == {"dtype": "float32", "shape": [16], "names": None}
    before = json.loads((data / "meta/info.json").read_text())
    assert {k: v for k, v in info["features"].items() if "lam" not in k} == before["features"]
    statistics = json.loads((column / "meta/stats.json").read_text())
    assert {k: v for k, v in statistics.items() if "lam" not in k} == json.loads(
        (data / "meta/stats.json").read_text()
    )


def test_statistics_are_lerobots(column, tmp_path):
    from lerobot.datasets.dataset_tools import recompute_stats

    shutil.copytree(column, tmp_path / "copy")
    ours = json.loads((column / "meta/stats.json").read_text())
    theirs = recompute_stats(lerobot(tmp_path / "copy")).meta.stats
    for key in (TOKENS, CODES, VALID):
        assert set(ours[key]) == set(theirs[key])
        assert len(ours[key]) == 10
        for kind, value in theirs[key].items():
            tolerance = (
                0.25 * np.ptp(theirs[key]["max"] - theirs[key]["min"]) + 0.2 if kind[0] == "q" else 1e-5
            )
            assert np.allclose(ours[key][kind], value, atol=tolerance), (key, kind)


def test_editing_tools_keep_the_column_and_its_statistics(column, tmp_path):
    from lerobot.datasets.dataset_tools import delete_episodes, merge_datasets, split_dataset

    read = lerobot(column)
    tokens = np.stack([np.asarray(row) for row in read.hf_dataset[TOKENS]])
    fewer = delete_episodes(read, [1], output_dir=tmp_path / "fewer", repo_id="made/fewer")
    kept = np.stack([np.asarray(row) for row in fewer.hf_dataset[TOKENS]])
    assert np.array_equal(kept, np.delete(tokens, np.s_[12:32], axis=0))
    assert set(fewer.meta.stats[TOKENS]) == set(read.meta.stats[TOKENS])
    assert np.allclose(fewer.meta.stats[TOKENS]["mean"], kept.mean(0), atol=1e-6)
    parts = split_dataset(read, {"a": [0, 1], "b": [2]}, output_dir=tmp_path / "split")
    assert np.allclose(parts["b"].meta.stats[TOKENS]["mean"], tokens[32:].mean(0), atol=1e-6)
    again = merge_datasets([parts["a"], parts["b"]], "made/merged", output_dir=tmp_path / "merged")
    assert np.allclose(again.meta.stats[TOKENS]["mean"], tokens.mean(0), atol=1e-6)
    assert np.array_equal(np.stack([np.asarray(row) for row in again.hf_dataset[TOKENS]]), tokens)


def test_files_hold_the_same_and_say_what_they_are(data, lam, column, tmp_path):
    done = ok(*command(data, lam, tmp_path / "out", "--output", "both", "--tokens", "vq"))
    assert "are cached" in done.stderr  # another kind of token computes nothing
    assert "encoding" not in done.stderr
    saved = torch.load(tmp_path / "out/lam_tokens.pt", weights_only=True)
    assert saved["latent_actions"].shape == (ROWS, 4, 4)
    assert saved["metadata"]["spec"]["model"] == "lapo"
    one, two = (
        read_token_file(tmp_path / "out" / name) for name in ("lam_tokens.pt", "lam_tokens.safetensors")
    )
    assert np.array_equal(one.tokens, two.tokens)
    assert one.metadata == two.metadata
    assert np.abs(one.tokens - by_hand(lam, data, "vectors")).max() < 1e-5
    assert one.tokens_kind == "vq"
    assert one.spec == load_spec(lam / "spec.json")
    assert one.episode_index.tolist() == [0] * 12 + [1] * 20 + [2] * 7
    assert one.frame_index.tolist() == [*range(12), *range(20), *range(7)]
    table = lerobot(tmp_path / "out").hf_dataset
    assert np.array_equal(np.stack([np.asarray(row) for row in table[TOKENS]]), one.tokens)
    sidecar = json.loads((tmp_path / "out/meta/lam_tokens.json").read_text())
    assert (
        sidecar["spec"]["weights"]
        == hashlib.blake2b((lam / "model.safetensors").read_bytes(), digest_size=16).hexdigest()
    )
    assert (sidecar["frame_gap_s"], sidecar["camera"], sidecar["precision"]) == (0.1, CAMERA, "fp32")


def test_label_uses_what_precompute_computed(data, lam, column, tmp_path):
    done = ok("label", "--lam", lam, "--data", data, "--out", tmp_path / "labels")
    assert "are cached" in done.stderr
    labels, _ = read_labels(tmp_path / "labels")
    tokens = np.stack([np.asarray(row) for row in lerobot(column).hf_dataset[TOKENS]])
    assert np.array_equal(labels.continuous.reshape(ROWS, -1), tokens)


def test_the_cache_shows_and_clears_tokens(data, lam, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTACT_CACHE", str(tmp_path / "cache"))
    ok(*command(data, lam, tmp_path / "out", "--output", "file"))
    (line, total) = ok("cache").stdout.splitlines()
    assert f"{ROWS} frames of 4x4 LAM tokens" in line  # no decoded frames were kept
    assert str(data) in line
    assert "1 entries" in total
    assert "removed" in ok("cache", "--clear", line.split()[0]).stdout
    assert "0 entries" in ok("cache").stdout


def test_half_floats_and_a_longer_gap(data, lam, tmp_path):
    ok(
        *command(
            data, lam, tmp_path / "out", "--dtype", "float16", "--frame-gap-s", "0.3", "--output", "both"
        )
    )
    assert (
        torch.load(tmp_path / "out/lam_tokens.pt", weights_only=True)["latent_actions"].dtype == torch.float16
    )
    file = read_token_file(tmp_path / "out")
    assert (file.spec.frame_gap, file.spec.frame_gap_s) == (3, pytest.approx(0.3))
    assert file.valid.sum() == ROWS - 3 * 3
    read = np.stack([np.asarray(row, np.float32) for row in lerobot(tmp_path / "out").hf_dataset[TOKENS]])
    assert np.array_equal(read, file.tokens)


def test_the_same_command_again_changes_nothing_and_overwrite_computes_again(data, lam, tmp_path):
    ok(*command(data, lam, tmp_path / "out", "--output", "file"))
    before = contents(tmp_path / "out")
    assert "already finished" in ok(*command(data, lam, tmp_path / "out", "--output", "file")).stderr
    assert "--overwrite" in refused(
        *command(data, lam, tmp_path / "out", "--output", "file", "--tokens", "vq")
    )
    assert contents(tmp_path / "out") == before
    done = ok(*command(data, lam, tmp_path / "out", "--output", "file", "--overwrite"))
    assert "encoding" in done.stderr
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_video_folder(lam, tmp_path):
    from latentact.data.lerobot.writer import _encode_video

    (tmp_path / "videos").mkdir()
    for number, length in enumerate(LENGTHS):
        _encode_video(tmp_path / f"videos/{number}.mp4", pictures(number, length), 10)
    ok(*command(tmp_path / "videos", lam, tmp_path / "out", "--output", "both"))
    read, file = (
        lerobot(tmp_path / "out", delta_timestamps={TOKENS: [0.0]}),
        read_token_file(tmp_path / "out"),
    )
    assert read.num_episodes == 3
    assert torch.equal(read[12][TOKENS][0], torch.from_numpy(file.tokens[12]))
    picture = read[31]["observation.images.video"]
    assert np.abs(picture.permute(1, 2, 0).numpy() * 255 - pictures(1, 20)[19]).mean() < 3
    assert next((tmp_path / "out/videos").rglob("*.mp4")).stat().st_nlink == 2


G1 = Path(__file__).parents[3] / "shared/data/g1_pick_bottle_lerobot_v21"


@pytest.mark.skipif(not G1.is_dir(), reason="the real recordings are not here")
@pytest.mark.slow
def test_a_real_dataset_of_version_2_with_missing_episodes(tmp_path):
    quick = (
        "lam.backbone=patch",
        "lam.size=32",
        "lam.patch=8",
        "lam.idm_channels=[8]",
        "lam.fdm_channels=[8]",
    )
    steps = ("training.steps=3", "training.batch_size=8", "training.eval_every=0", "probe_transitions=64")
    ok(
        *("train-lam", f"data.path={G1}", *TINY_LAM, *quick, *steps, "frame_gap_s=0.2"),
        f"out={tmp_path}/lam",
    )
    ok(*command(G1, tmp_path / "lam", tmp_path / "out", "--output", "both"))
    camera = "observation.images.cam_high"
    read = lerobot(tmp_path / "out", delta_timestamps={TOKENS: [-1 / 30, 0.0]})
    assert read.num_episodes == 4
    file = read_token_file(tmp_path / "out")
    assert read.num_frames == len(file.tokens)
    last = int(read.meta.episodes[2]["dataset_to_index"]) - 1
    item = read[last - 10]
    assert torch.equal(item[TOKENS][1], torch.from_numpy(file.tokens[last - 10]))
    assert item["observation.state"].shape == (26,)
    assert item[camera].shape == (3, 480, 640)
    assert set(read.meta.stats[camera]) == set(read.meta.stats[TOKENS])


def test_a_dataset_of_the_hub(data, lam, column, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options["repo_type"], options["revision"]))
        return str(data)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    out = tmp_path / "out"
    where = ("--dataset-repo-id", "somebody/toys", "--lam-model-path", lam, "--output-dir", out)
    ok("precompute", *where, "--batch-size", "8")
    assert asked == [("somebody/toys", "dataset", "v3.0")]
    ours, theirs = contents(out), contents(column)
    assert json.loads((out / "meta/lam_tokens.json").read_text())["dataset"] == "somebody/toys"
    del ours["meta/lam_tokens.json"], theirs["meta/lam_tokens.json"]
    assert ours == theirs


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--camera-key", "observation.images.tap"), "did you mean 'observation.images.top'?"),
        (("--tokens", "vqs"), "got 'vqs'."),
        (("--output", "columns"), "--output must be column, file or both, got 'columns'."),
        (("--dtype", "float8"), "--dtype must be float32 or float16, got 'float8'."),
        (("--batch-size", "0"), "--batch-size must be"),
        (("--frame-gap-s", "0.04"), "a frame every 0.1 s"),
        (("--device", "tpu"), "device must be cpu on this machine, got 'tpu'"),
    ],
)
def test_bad_flags_are_one_sentence(flags, words, data, lam, tmp_path):
    assert words in refused(*command(data, lam, tmp_path / "out", *flags))
    assert not [*tmp_path.iterdir()]


def test_bad_places_are_one_sentence(data, lam, tmp_path):
    out = tmp_path / "out"
    assert "does not exist" in refused(*command(tmp_path / "nothing", lam, out))
    assert "--dataset-root must be a folder or --dataset-repo-id a hub id" in refused(
        "precompute", "--lam-model-path", lam, "--output-dir", out
    )
    assert "must be outside of the dataset" in refused(*command(data, lam, data / "tokens"))
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    for more in ((), ("--overwrite",)):
        assert "must be new or hold LAM tokens" in refused(*command(data, lam, out, *more))
    assert (out / "mine.txt").exists()


def test_bad_token_files_are_one_sentence(data, lam, column, tmp_path):
    ok(*command(data, lam, tmp_path / "out", "--output", "file"))
    good = {
        name: (tmp_path / "out" / name).read_bytes() for name in ("lam_tokens.safetensors", "lam_tokens.pt")
    }
    for name, content in good.items():
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match="is not a complete"):
            read_token_file(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        read_token_file(tmp_path / "nowhere")
    ok("label", "--lam", lam, "--data", data, "--out", tmp_path / "labels")
    with pytest.raises(UserError, match="must describe its tokens, got no metadata"):
        read_token_file(tmp_path / "labels")
    file = read_token_file(tmp_path / "out")
    with pytest.raises(UserError, match=r"weights of the latent actions must be the same in .* got 'other'"):
        read_token_file(tmp_path / "out", spec=replace(file.spec, weights="other"))
    file.check_rows(file.episode_index, file.frame_index, "data")
    with pytest.raises(UserError, match=f"must have tokens for the {ROWS - 1} rows of data, got {ROWS}"):
        file.check_rows(file.episode_index[1:], file.frame_index[1:], "data")
    with pytest.raises(UserError, match="row 12 must be frame 12 of episode 0, got frame 0 of episode 1"):
        file.check_rows(np.repeat([0, 1], [13, 26]), np.r_[:13, :26], "data")
    saved = torch.load(tmp_path / "out/lam_tokens.pt", weights_only=True)
    torch.save({**saved, "latent_actions": saved["latent_actions"].double()}, tmp_path / "double.pt")
    with pytest.raises(UserError, match=r"'latent_actions' of float32 or float16 \[39, 4, 4\], got float64"):
        read_token_file(tmp_path / "double.pt")


def test_a_full_disk_leaves_nothing(data, lam, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        (disk / "ballast").write_bytes(bytes(50_000))
        assert "full" in refused(*command(data, lam, disk / "out"))
        assert [path.name for path in disk.iterdir()] == ["ballast"]
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        ok(*command(data, lam, disk / "out"))
        video = next((disk / "out/videos").rglob("*.mp4"))
        assert video.stat().st_nlink == 1  # no link leads to another disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_two_processes_write_what_one_writes(data, lam, column, tmp_path):
    shares = [
        start(
            *command(data, lam, tmp_path / "out"),
            log=tmp_path / f"log{rank['RANK']}",
            **rank,
            LATENTACT_CACHE=str(tmp_path / "cache"),
        )
        for rank in ranks(2)
    ]
    for number, share in enumerate(shares):
        share.join()
        log = (tmp_path / f"log{number}").read_text()
        assert share.exitcode == 0, log
        assert "encoding: " in log  # each had something to do
    assert contents(tmp_path / "out") == contents(column)
    assert not [*(tmp_path / "cache/tokens").glob("*.partial")]


@pytest.mark.slow
def test_ten_kills(lam, tmp_path):
    """Eight kills while parts are written, two while the dataset is."""
    data = write_v3(tmp_path / "data", lengths=(30,) * 60, size=32)
    ok(*command(data, lam, tmp_path / "whole", "--output", "both"))
    whole, parts = contents(tmp_path / "whole"), tmp_path / "cache/tokens"
    cut = command(data, lam, tmp_path / "cut", "--output", "both")
    random, kills, attempts = np.random.default_rng(0), 0, 0
    while kills < 10:
        attempts += 1
        assert attempts < 30
        process = start(*cut, LATENTACT_CACHE=str(tmp_path / "cache"))
        wanted = len([*parts.glob("*.partial/*.npz")]) + random.integers(1, 7)
        while process.is_alive():
            parted = len([*parts.glob("*.partial/*.npz")]) >= wanted
            if (parted and kills < 8) or [*tmp_path.glob(".cut.*.partial/*")]:
                break
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.01))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if (tmp_path / "cut").exists():
            assert contents(tmp_path / "cut") == whole
            shutil.rmtree(tmp_path / "cut")
            shutil.rmtree(parts)
    process = start(*cut, LATENTACT_CACHE=str(tmp_path / "cache"))
    process.join()
    assert process.exitcode == 0
    assert contents(tmp_path / "cut") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "cut", "data", "whole"]
