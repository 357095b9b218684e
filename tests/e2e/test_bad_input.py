"""Invalid input: exit code 2, a one-sentence message that says what to do, and no written files."""

import errno
import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import TINY_LAM, TINY_POLICY, cli, latentact, write_blocks
from latentact.io.video_writer import write_video

FRAMES = np.random.default_rng(0).integers(256, size=(20, 64, 64, 3), dtype=np.uint8)


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def sentence(done):
    """Return the error message after checking that it is the only error and has no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error:") for line in lines) == 1
    assert lines[-1].endswith((".", ")"))
    return lines[-1]


@pytest.fixture(scope="module")
def given(tmp_path_factory, blocks):
    """Valid and invalid inputs for a command line."""
    root = tmp_path_factory.mktemp("given")
    f = SimpleNamespace(root=root, blocks=blocks, marks=root / "marks")
    for name in ("empty", "texts", "mixed", "short", "hollow", "sizes", "marks"):
        (root / name).mkdir()
    (root / "texts/a.mp4").write_text("this is not a video")
    for name in ("a", "b", "z"):
        write_video(root / f"mixed/{name}.mp4", FRAMES, 10)
    whole = (root / "mixed/b.mp4").read_bytes()
    (root / "mixed/b.mp4").write_bytes(whole[: len(whole) // 2])
    write_video(root / "short/a.mp4", FRAMES[:3], 10)
    write_video(root / "short/b.mp4", FRAMES[:3], 10)
    begin = whole.index(b"mdat") + 4
    (root / "hollow/a.mp4").write_bytes(whole[:begin] + bytes(len(whole) - begin))
    write_video(root / "sizes/a.mp4", FRAMES, 10)
    write_video(root / "sizes/b.mp4", FRAMES[:, :48], 10)

    assert cli("train-lam", f"data.path={blocks}", *TINY_LAM, f"out={root}/lam").returncode == 0
    assert cli("label", "--lam", root / "lam", "--data", blocks, "--out", root / "labels").returncode == 0
    few = ("training.steps=2", f"labels={root}/labels")
    assert cli("train-policy", *TINY_POLICY, *few, f"out={root}/policy").returncode == 0

    torch.save({"weights": torch.zeros(1), "evil": Evil(root / "marks/pt")}, root / "evil.pt")
    for name in (
        "pickled",
        "truncated",
        "shapes",
        "missing",
        "extra",
        "not_json",
        "unknown",
        "no_weights",
        "no_spec",
    ):
        shutil.copytree(root / "lam", root / name)
    weights = root / "lam/model.safetensors"
    torch.save(Evil(root / "marks/weights"), root / "pickled/model.safetensors")
    (root / "truncated/model.safetensors").write_bytes(weights.read_bytes()[:-100])
    tensors = load_file(weights)
    first = min(tensors)
    save_file(tensors | {first: torch.zeros(7)}, root / "shapes/model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != first}, root / "missing/model.safetensors")
    save_file(tensors | {"stranger": torch.zeros(1)}, root / "extra/model.safetensors")
    (root / "not_json/config.json").write_text("{ this is not json")
    (root / "unknown/config.json").write_text('{"lam": {"kind": "lapoo"}}')
    (root / "no_weights/model.safetensors").unlink()
    (root / "no_spec/spec.json").write_text("[]")

    shutil.copytree(root / "labels", root / "cut_labels")
    tokens = root / "cut_labels/lam_tokens.safetensors"
    tokens.write_bytes(tokens.read_bytes()[:-100])
    changes = {
        "other_labels": {"weights": "1234"},
        "odd_labels": {"surprise": 1},
        "gap_labels": {"robot_actions": True, "frame_gap": 2},
    }
    for name, change in changes.items():
        shutil.copytree(root / "labels", root / name)
        manifest = json.loads((root / name / "manifest.json").read_text())
        manifest["spec"].update(change)
        (root / name / "manifest.json").write_text(json.dumps(manifest))
    write_blocks(root / "moved.npz")
    assert (
        cli("label", "--lam", root / "lam", "--data", root / "moved.npz", "--out", root / "stale").returncode
        == 0
    )
    write_blocks(root / "moved.npz", seed=1)
    pickled = {"obs": np.zeros((4, 32, 32, 3), np.uint8), "action": np.array([Evil(root / "marks/npz")] * 4)}
    np.savez(root / "evil.npz", **pickled)  # type: ignore[arg-type]
    return f


def lam(f, *settings, data="blocks"):
    path = f.blocks if data == "blocks" else f.root / data
    return ("train-lam", f"data.path={path}", *TINY_LAM, *settings)


def policy(*settings):
    return ("train-policy", *TINY_POLICY, *settings)


def compare(f, *settings):
    return ("compare", f"data.path={f.blocks}", "env=babyai/GoToLocal", "data.resolution=32", *settings)


CASES = {
    # data
    "missing path": (lambda f: lam(f, data="nowhere"), "nowhere does not exist"),
    "empty folder": (lambda f: lam(f, data="empty"), "holds no data that can be read"),
    "text named mp4": (lambda f: lam(f, data="texts"), "1 unreadable: a.mp4"),
    "truncated video, strict": (lambda f: lam(f, "data.strict=true", data="mixed"), "1 unreadable: b.mp4"),
    "videos shorter than the gap": (
        lambda f: lam(f, "frame_gap_s=1", data="short"),
        "at least 11 frames for a window (frame gap 10)",
    ),
    "gap below a frame": (
        lambda f: lam(f, "frame_gap_s=0.01"),
        "frame_gap_s must be near a whole number of frames",
    ),
    "unknown camera": (lambda f: lam(f, "data.camera=top"), "no camera 'top'"),
    "pickle inside an npz": (lambda f: lam(f, data="evil.npz"), "not a file of plain arrays"),
    "label: missing path": (
        lambda f: ("label", "--lam", f.root / "lam", "--data", f.root / "nowhere"),
        "nowhere does not exist",
    ),
    "label: text named mp4": (
        lambda f: ("label", "--lam", f.root / "lam", "--data", f.root / "texts"),
        "1 unreadable: a.mp4",
    ),
    "label: truncated video, strict": (
        lambda f: ("label", "--lam", f.root / "lam", "--data", f.root / "mixed", "--strict"),
        "1 unreadable: b.mp4",
    ),
    "label: nothing can be decoded": (
        lambda f: ("label", "--lam", f.root / "lam", "--data", f.root / "hollow"),
        "no episode is readable: 1 unreadable: a.mp4",
    ),
    "label: nothing can be decoded, strict": (
        lambda f: ("label", "--lam", f.root / "lam", "--data", f.root / "hollow", "--strict"),
        "1 unreadable: a.mp4",
    ),
    "precompute: nothing can be decoded": (
        lambda f: (
            *("precompute", "--lam-model-path", f.root / "lam", "--dataset-root", f.root / "hollow"),
            *("--output", "file"),
        ),
        "no episode is readable: 1 unreadable: a.mp4",
    ),
    "label: sizes that differ": (
        lambda f: ("label", "--lam", f.root / "lam", "--data", f.root / "sizes", "--resolution", "0"),
        "as those of earlier episodes",
    ),
    "label: rate that does not fit": (
        lambda f: ("label", "--lam", f.root / "lam", "--data", f.root / "mixed", "--target-fps", "3"),
        "the frame gap of the LAM lapo must be near a whole number",
    ),
    # settings
    "no data": (lambda f: ("train-lam",), "data.path is required"),
    "demo: k too large": (
        lambda f: ("demo", "--episodes", "5", "--k", "5"),
        "between 0 and 4, the number of training episodes",
    ),
    "settings that cannot be trained": (
        lambda f: ("train-lam", f"data.path={f.blocks}", "experiment=laom_debug", "lam.patch=0"),
        "lam=laom cannot be built or trained with these settings",
    ),
    "unknown lam": (lambda f: lam(f, "lam=lapoo"), "unknown lam 'lapoo'; did you mean 'lapo'?"),
    "unknown bottleneck": (
        lambda f: lam(f, "lam.bottleneck.kind=vqema"),
        "unknown bottleneck 'vqema'; did you mean 'vq_ema'?",
    ),
    "unknown experiment": (
        lambda f: lam(f, "experiment=babyia"),
        "unknown experiment 'babyia'; did you mean 'babyai'?",
    ),
    "unknown setting": (
        lambda f: lam(f, "training.step=3"),
        "unknown setting 'training.step'; did you mean 'training.steps'?",
    ),
    "unknown nested setting": (
        lambda f: lam(f, "lam.bottleneck.dims=3"),
        "did you mean 'lam.bottleneck.dim'?",
    ),
    "not a number": (lambda f: lam(f, "training.steps=many"), "'many'"),
    "not an override": (lambda f: lam(f, "hello"), "'hello' is not a setting"),
    "negative learning rate": (
        lambda f: lam(f, "training.lr=-1"),
        "training.lr must be between 0 and 100, got -1",
    ),
    "a learning rate of no number": (
        lambda f: lam(f, "training.lr=nan"),
        "training.lr must be a finite number, got nan",
    ),
    "a gap of no number": (
        lambda f: lam(f, "frame_gap_s=nan"),
        "frame_gap_s must be a finite number, got nan",
    ),
    "a gap of centuries": (lambda f: lam(f, "frame_gap_s=1e300"), "frame_gap_s must be between"),
    "a gap shorter than light": (
        lambda f: lam(f, "frame_gap_s=1e-300"),
        "frame_gap_s must be near a whole number of frames",
    ),
    "a learning rate of no use": (
        lambda f: lam(f, "training.lr=1e300"),
        "training.lr must be between",
    ),
    "a learning rate that diverges": (
        lambda f: lam(f, "training.lr=100", "lam.motion_weight=2e9", "training.steps=40"),
        "lower training.lr",
    ),
    "a model that no memory holds": (
        lambda f: lam(f, "lam.idm_channels=[65537,65537]"),
        "parameters to be trained in the memory of this machine",
    ),
    "label: a resolution of letters": (
        lambda f: ("label", "--lam", f.root / "lam", "--resolution", "X"),
        "--resolution must be a valid integer",
    ),
    "label: a resolution beyond memory": (
        lambda f: ("label", "--lam", f.root / "lam", "--resolution", 10**30),
        "--resolution must be between -1 and 4096",
    ),
    "label: an unknown flag": (lambda f: ("label", "--lam", f.root / "lam", "--size", "3"), "--size"),
    "label: a gap of no number": (
        lambda f: ("label", "--lam", f.root / "lam", "--data", f.blocks, "--frame-gap-s", "nan"),
        "--frame-gap-s must be between 0 and 1000000, got nan",
    ),
    "latents without numbers": (
        lambda f: lam(f, "lam.bottleneck.kind=none", "lam.bottleneck.dim=0"),
        "bottleneck.dim must be between 1 and 1048576, got 0",
    ),
    "levels of one value": (
        lambda f: lam(f, "lam.bottleneck.kind=fsq", "lam.bottleneck.levels=[1,1]"),
        "bottleneck.levels must be at least 2 per dim",
    ),
    "a pair of three": (
        lambda f: (
            "train-lam",
            f"data.path={f.blocks}",
            "lam=villa_x",
            "lam.random_crop_scale=[0.1,0.2,0.3]",
        ),
        "lam.random_crop_scale must be a list of 2 values, got [0.1, 0.2, 0.3]",
    ),
    "no such device": (
        lambda f: lam(f, "training.device=tpu"),
        "device must be cpu on this machine, got 'tpu'",
    ),
    "negative share": (
        lambda f: lam(f, "held_out=1.5"),
        "held_out must be at least 0 and less than 1, got 1.5",
    ),
    "unknown policy": (
        lambda f: policy("policy=bcc", "labels=x"),
        "unknown policy 'bcc'; did you mean 'bc'?",
    ),
    "nothing to learn from": (lambda f: policy(), "nothing to learn from"),
    "idm without labels": (
        lambda f: (*lam(f)[:2], "lam=idm", "lam.size=32", "data.resolution=32"),
        "labeled_episodes must be at least 1 for lam=idm",
    ),
    "unknown environment": (lambda f: compare(f, "env=babyai/GoToLokal"), "did you mean 'GoToLocal'?"),
    "unknown method": (lambda f: compare(f, "methods=[latent,gail]"), "got 'gail'"),
    "data of another environment": (lambda f: compare(f), "give demonstrations of that environment"),
    # k
    "k too large for train-lam": (
        lambda f: lam(f, "labeled_episodes=8"),
        "labeled episodes must be between 0 and 7, the number of training episodes, got 8",
    ),
    "k too large for bc": (
        lambda f: policy("policy=bc", f"data.path={f.blocks}", "data.resolution=32", "labeled_episodes=9"),
        "labeled episodes must be between 0 and 7, the number of training episodes, got 9",
    ),
    "k too large for ground": (
        lambda f: ("ground", f"policy={f.root}/policy", f"labels={f.root}/labels", "labeled_episodes=8"),
        "labeled episodes must be between 0 and 7, the number of training episodes, got 8",
    ),
    "no k for ground": (
        lambda f: ("ground", f"policy={f.root}/policy", f"labels={f.root}/labels", "labeled_episodes=0"),
        "labeled_episodes must be between 1 and 1000000000, got 0",
    ),
    "k of nothing for compare": (lambda f: compare(f, "ks=[0]"), "ks must be at least 1, got [0]"),
    "k without brackets": (
        lambda f: compare(f, "ks=5"),
        "ks must be a list, as in ks=[VALUE], got a single value",
    ),
    "no k for compare": (lambda f: compare(f, "ks=[]"), "methods and ks must have at least one value each"),
    "no method for compare": (
        lambda f: compare(f, "methods=[]"),
        "methods and ks must have at least one value each",
    ),
    "labels that nothing learns from": (
        lambda f: lam(f, "labeled_episodes=2"),
        "learns nothing from robot actions as configured, got",
    ),
    "a value with an equals sign": (
        lambda f: compare(f, "distract=background=0.5,shake=2"),
        "distractor shake must be between 0 and 1, got 2",
    ),
    "a value that cannot be read": (
        lambda f: compare(f, "distract=(a"),
        "'distract=(a' is not a setting; give KEY=VALUE",
    ),
    # checkpoints
    "lam: a pickle": (lambda f: ("label", "--lam", f.root / "evil.pt"), "it was not loaded"),
    "lam: a name too long": (lambda f: ("label", "--lam", "y" * 300), "File name too long"),
    "lam: missing": (lambda f: ("label", "--lam", f.root / "nowhere"), "nowhere does not exist"),
    "lam: empty folder": (lambda f: ("label", "--lam", f.root / "empty"), "holds no config.json"),
    "lam: pickled weights": (
        lambda f: ("label", "--lam", f.root / "pickled"),
        "not a complete safetensors file",
    ),
    "lam: truncated weights": (
        lambda f: ("label", "--lam", f.root / "truncated"),
        "not a complete safetensors file",
    ),
    "lam: no weights": (lambda f: ("label", "--lam", f.root / "no_weights"), "model.safetensors is missing"),
    "lam: wrong shapes": (lambda f: ("label", "--lam", f.root / "shapes"), "has a wrong shape for"),
    "lam: missing weights": (lambda f: ("label", "--lam", f.root / "missing"), "lacks"),
    "lam: extra weights": (lambda f: ("label", "--lam", f.root / "extra"), "has unknown 'stranger'"),
    "lam: config not json": (lambda f: ("label", "--lam", f.root / "not_json"), "cannot read"),
    "lam: unknown kind": (lambda f: ("label", "--lam", f.root / "unknown"), "did you mean 'lapo'?"),
    "lam: a policy": (lambda f: ("label", "--lam", f.root / "policy"), "must be a latent action model"),
    "lam: no spec": (
        lambda f: ("label", "--lam", f.root / "no_spec"),
        "spec.json: the content must be an object",
    ),
    "label: no such device": (
        lambda f: ("label", "--lam", f.root / "lam", "--device", "tpu"),
        "device must be cpu on this machine, got 'tpu'",
    ),
    "label: empty batches": (
        lambda f: ("label", "--lam", f.root / "lam", "--batch-size", "0"),
        "--batch-size must be between 1 and 65536, got 0",
    ),
    "policy: a LAM": (
        lambda f: ("ground", f"policy={f.root}/lam", f"labels={f.root}/labels"),
        "must be a policy",
    ),
    "policy: a pickle": (
        lambda f: ("rollout", "--policy", f.root / "evil.pt", "--env", "babyai/GoToLocal"),
        "pickles are never loaded",
    ),
    "policy: not grounded": (
        lambda f: ("rollout", "--policy", f.root / "policy", "--env", "babyai/GoToLocal"),
        "Ground it first",
    ),
    # labels
    "labels: missing": (lambda f: policy(f"labels={f.root}/nowhere"), "holds no latent labels"),
    "labels: truncated": (lambda f: policy(f"labels={f.root}/cut_labels"), "not a complete safetensors file"),
    "labels: strange": (
        lambda f: policy(f"labels={f.root}/odd_labels"),
        "manifest.json: spec.surprise is not a known field",
    ),
    "labels: data has changed": (lambda f: policy(f"labels={f.root}/stale"), "label it again"),
    "labels: of another LAM": (
        lambda f: ("ground", f"policy={f.root}/policy", f"labels={f.root}/other_labels"),
        "weights of the latent actions must be the same",
    ),
    "labels: latent ones for bc": (
        lambda f: policy("policy=bc", f"labels={f.root}/labels"),
        "labels must be robot actions for policy=bc",
    ),
    "labels: of an IDM over several frames for bc": (
        lambda f: policy("policy=bc", f"labels={f.root}/gap_labels"),
        "labels must have a frame gap of 1 for policy=bc, one robot action per step, got 2",
    ),
    "report: nothing there": (lambda f: ("report", f.root / "nowhere"), "nowhere"),
    "report: nothing to report": (lambda f: ("report", f.root / "empty"), "empty"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input(case, given, tmp_path, monkeypatch):
    make, words = case
    command = [*make(given)]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    out = tmp_path / "deep/out"
    if command[0] == "label":
        command += [] if "--data" in command else ["--data", given.blocks]
    if command[0] in ("label", "rollout"):
        command += ["--out", out]
    elif command[0] == "precompute":
        command += ["--output-dir", out]
    elif command[0] != "report":
        command += [f"out={out}"]
    assert words in sentence(cli(*command))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]
    assert not [*(tmp_path / "here").iterdir()]
    assert not [*(given.root / "empty").iterdir()]
    assert not [*given.marks.iterdir()], "a pickle was executed"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("label --lam {lam} --data {data} --out out --target-fps nan",
         "--target-fps must be between 0 and 1000000, got nan"),
        ("label --lam {lam} --data {data} --out out --resolution -7",
         "--resolution must be between -1 and 4096, got -7"),
        ("label --lam {lam} --data {data} --out ", "--out must not be empty"),
        ("cache --data {data} --target-fps inf", "--target-fps must be between 0 and 1000000, got inf"),
        ("cache --data {data} --resolution 32 --cache-dir /dev/null", "File exists"),
        ("imitate --mode extract_only --video-path a --lam-model-path b --output-dir c --fps nan",
         "--fps must be between 0 and 1000000, got nan"),
        ("imitate --mode robot --robot-config {robot} --video-path a --lam-model-path {lam} --policy-path b "
         "--output-dir c", "unknown robot type 'so102'"),
        ("collect pusht --out out --explore 1.5", "--explore must be between 0 and 1, got 1.5"),
        ("collect pusht --out out --resolution 100000",
         "--resolution must be between 0 and 4096, got 100000"),
        ("train-lam data.path={data} out=", "out must be a folder, got an empty path"),
        ("train-lam data.path={data} out=out training.devices=0",
         "training.devices must be between 1 and 1024, got 0"),
        ("ground policy={policy} labels={labels} labeled_episodes=2 decoder.hidden=[0] out=out",
         "decoder.hidden must be empty or widths of at least 1"),
        ("train-with-tokens --dataset-root {data} --output-dir out --learning-rate nan",
         "--learning-rate must be between 0 and 100, got nan"),
    ],
)  # fmt: skip
def test_values_that_no_command_takes(command, words, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = given.root
    robot = root / "robot.yaml"
    robot.write_text("robot: {type: so102}\n")
    names = {name: root / name for name in ("lam", "policy", "labels")}
    command = command.format(data=given.blocks, robot=robot, **names).split(" ")
    assert words in sentence(cli(*command))
    assert not [*tmp_path.iterdir()]


def test_a_cache_that_cannot_be_written(given, tmp_path):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "x.lock")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentact.data.cache.Path.touch", refuse)
        done = cli("cache", "--data", given.blocks, "--resolution", "24", "--cache-dir", tmp_path / "cache")
    assert "is not writable (Permission denied); set cache_dir" in sentence(done)


def test_a_place_below_a_file(given, tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "out"
    for command in (
        ("convert-lam", given.root / "lam", "--out", place),
        ("inspect", given.root / "lam", "--data", given.blocks, "--out", place),
        lam(given, f"out={place}"),
    ):
        assert "choose another path" in sentence(cli(*command))


def test_k_larger_than_the_episodes_in_compare(tmp_path):
    """Needs data of an environment: three tiny episodes of its observations with random actions."""
    path = tmp_path / "data.npz"
    rng = np.random.default_rng(0)
    action = np.append(rng.integers(7, size=29), 6)
    np.savez(path, obs=FRAMES[rng.integers(20, size=30)], action=action, done=np.arange(30) % 10 == 9)
    out = tmp_path / "out"
    setting = ("env=babyai/GoToLocal", "data.resolution=32", "ks=[1,5]", f"out={out}")
    assert "labeled episodes must be between 0 and 2, the number of training episodes, got 5" in sentence(
        cli("compare", f"data.path={path}", *setting)
    )
    assert not out.exists()


def test_truncated_video_is_skipped_by_name_and_counted(given, tmp_path):
    done = cli(*lam(given, "training.steps=2", data="mixed"), f"out={tmp_path}/lam")
    assert done.returncode == 0, done.stderr
    assert "skipped 1 unreadable: b.mp4" in done.stderr
    done = cli(
        "label", "--lam", tmp_path / "lam", "--data", given.root / "mixed", "--out", tmp_path / "labels"
    )
    assert "labeled 38 of 40 frames of 2 episodes" in done.stderr


def test_damaged_training_checkpoint(given, tmp_path):
    """Re-running after the checkpoint was damaged: a one-sentence error, and other files are kept."""
    command = lam(given, "training.steps=2", f"out={tmp_path}/lam")
    assert cli(*command).returncode == 0
    (tmp_path / "lam/lam.json").unlink()
    state = next((tmp_path / "lam/checkpoints").iterdir()) / "state.safetensors"
    torch.save(Evil(given.marks / "state"), state)
    assert "not a complete safetensors file" in sentence(cli(*command))
    assert not [*given.marks.iterdir()]


@pytest.mark.slow
def test_bad_input_in_a_real_process(given, tmp_path):
    make, words = CASES["lam: pickled weights"]
    command = [*make(given), "--data", given.blocks, "--out", tmp_path / "out"]
    done = latentact(*command, cwd=tmp_path)
    assert words in sentence(done)
    assert len(done.stderr.splitlines()) == 1
    assert not [*tmp_path.iterdir()]
    assert not [*given.marks.iterdir()]


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_full_disk_while_decoding(small_disk, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTACT_CACHE", str(small_disk / "cache"))
    data = write_blocks(tmp_path / "blocks.npz", episodes=40)
    done = cli("cache", "--data", data, "--resolution", "32")
    assert "free some space" in sentence(done)
    assert not [path for path in (small_disk / "cache").glob("*") if path.is_dir() and path.name != "memo"]
    monkeypatch.setenv("LATENTACT_CACHE", str(tmp_path / "cache"))  # as the message advises
    assert cli("cache", "--data", data, "--resolution", "32").returncode == 0


@pytest.mark.parametrize("free", [0, 200_000, 600_000, 900_000])
def test_full_disk_while_training(free, small_disk, given, tmp_path):
    """Whichever file fills the disk, the run reports it and resumes once space is free."""
    out = small_disk / "lam"
    command = lam(given, "training.steps=40", "lam.idm_channels=[32]", f"out={out}")
    ballast = small_disk / "ballast"
    try:
        ballast.write_bytes(bytes(2**20 - free))
    except OSError:
        assert not free
    found = sentence(cli(*command))
    assert "full" in found
    assert "free some space" in found
    assert not [*out.rglob("*.partial")]
    assert not (out / "lam.json").exists()
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert cli(*command).returncode == 0
    assert (out / "lam.json").exists()


@pytest.mark.parametrize("free", [0, 20_000])
def test_full_disk_while_labeling(free, small_disk, given, tmp_path):
    data = write_blocks(tmp_path / "blocks.npz", episodes=100)
    ballast, out = small_disk / "ballast", small_disk / "labels"
    try:
        ballast.write_bytes(bytes(2**20 - free))
    except OSError:
        assert not free
    command = ("label", "--lam", given.root / "lam", "--data", data, "--out", out)
    assert "full" in sentence(cli(*command))
    assert not out.exists()
    ballast.unlink()
    assert cli(*command).returncode == 0
    assert (out / "manifest.json").exists()
    assert not [path for path in small_disk.iterdir() if "partial" in path.name]


OWN = {
    "unknown setting": (
        "training: {stepps: 4}",
        "mine.yaml: unknown setting 'training.stepps'; did you mean",
    ),
    "name of the command line": ("data: {batch_size: 8}", "did you mean 'training.batch_size'?"),
    "type": ("training: {steps: many}", "mine.yaml: training.steps must be of type Integer, got 'many'"),
    "group": ("defaults: [override /model: laq]", "mine.yaml: unknown setting 'model'"),
    "value for a group": ("training: 3", "mine.yaml: expected KEY: VALUE"),
    "list": ("[a, b]", "mine.yaml: expected KEY: VALUE"),
    "no YAML": (
        "training:\n steps: 4\n   lr: 3",
        "got one that cannot be read: mapping values are not allowed",
    ),
}


@pytest.mark.parametrize(("text", "words"), OWN.values(), ids=OWN.keys())
def test_own_experiments_with_mistakes(text, words, tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment/mine.yaml"
    file.write_text(f"# @package _global_\n{text}\n")
    done = cli("train-lam", f"--config-dir={tmp_path}", "experiment=mine", "data.path=x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr


def test_an_experiment_without_its_first_line_is_refused(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("training: {steps: 4}\n")
    done = cli("train-lam", f"--config-dir={tmp_path}", "experiment=mine", "data.path=x")
    assert done.returncode == 2
    assert "must begin with the line `# @package _global_`" in done.stderr


def test_a_mistake_in_a_mixture_names_its_settings():
    done = cli("train-lam", "data.mixture=[{path: a, weights: 3}]")
    assert (
        "unknown setting 'weights'; did you mean 'weight'? Known: camera, fps, path, weight." in done.stderr
    )
