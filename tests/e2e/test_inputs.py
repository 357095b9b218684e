"""A run folder notices that its inputs have changed since the run began."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from conftest import TINY_LAM, TINY_POLICY, ok, refused, write_blocks
from latentact.data.cache import DataConfig
from latentact.data.latents import TOKENS_KEY
from latentact.data.mixture import MixturePart, TrainingDataConfig
from latentact.stages.ground_online import OnlineConfig
from latentact.training.inputs import input_digests
from wild import TOP, floats, lerobot, write_video

SHORT = ("training.steps=2", "training.eval_every=0", "held_out=0.25")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder of a dataset, a LAM, labels, a policy and a grounded policy, and the command of each."""
    root = tmp_path_factory.mktemp("inputs")
    data = write_blocks(root / "blocks.npz", episodes=4)
    commands = {
        "lam": ("train-lam", f"data.path={data}", *TINY_LAM, *SHORT, f"out={root}/lam"),
        "labels": ("label", "--lam", root / "lam", "--data", data, "--out", root / "labels"),
        "policy": ("train-policy", f"labels={root}/labels", *TINY_POLICY, *SHORT, f"out={root}/policy"),
        "ground": (
            *("ground", f"policy={root}/policy", f"labels={root}/labels", "labeled_episodes=2"),
            *(*SHORT, f"out={root}/ground"),
        ),
    }
    for command in commands.values():
        ok(*command)
    return root, commands


def remake(path: Path, source: Path) -> None:
    """Replace a file or folder by another one, as if it had been made again."""
    if path.is_dir():
        shutil.rmtree(path)
        shutil.copytree(source, path)
    else:
        shutil.copyfile(source, path)


@pytest.fixture
def kept(chain, tmp_path):
    """What `chain` returns, restored after the test."""
    copy = tmp_path / "kept"
    shutil.copytree(chain[0], copy)
    yield chain
    for path in copy.iterdir():
        remake(chain[0] / path.name, path)


def test_frames_that_have_changed(kept):
    root, commands = kept
    before = (root / "lam/model.safetensors").read_bytes()
    write_blocks(root / "blocks.npz", episodes=4, seed=1)
    for name in ("lam", "policy"):
        message = f"blocks.npz has changed since the run in {root}/{name} began; choose another out="
        assert message in refused(*commands[name])
    shutil.rmtree(root / "lam/checkpoints")
    (root / "lam/lam.json").unlink()  # a run that has not ended does not resume either
    assert "has changed since the run" in refused(*commands["lam"])
    assert (root / "lam/model.safetensors").read_bytes() == before
    assert f"blocks.npz has changed since {root}/labels was written" in refused(*commands["labels"])
    write_blocks(root / "blocks.npz", episodes=4)
    for name in ("labels", "policy"):
        assert "is already finished" in ok(*commands[name]).stderr


def test_actions_that_have_changed(kept):
    root, commands = kept
    with np.load(root / "blocks.npz") as file:
        arrays = {**file}
    np.savez(root / "blocks.npz", **arrays | {"action": 3 - arrays["action"]})
    assert "blocks.npz has changed since the run" in refused(*commands["ground"])


def test_labels_of_another_lam(kept):
    root, commands = kept
    ok(*commands["lam"][:-1], "training.seed=1", f"out={root}/other")
    shutil.rmtree(root / "labels")
    ok("label", "--lam", root / "other", *commands["labels"][3:])
    for name in ("policy", "ground"):
        assert "labels/lam_tokens.safetensors has changed since" in refused(*commands[name])
    shutil.rmtree(root / "other")


def test_another_policy(kept):
    root, commands = kept
    shutil.rmtree(root / "policy")
    ok(*commands["policy"], "training.seed=1")
    assert "policy/model.safetensors has changed since" in refused(*commands["ground"])


def test_what_is_gone_or_was_not_recorded_is_not_compared(kept):
    root, commands = kept
    (root / "blocks.npz").unlink()
    assert "is already finished" in ok(*commands["lam"]).stderr
    write_blocks(root / "blocks.npz", episodes=4, seed=1)
    (root / "lam/inputs.json").write_text("{")
    assert "inputs.json is damaged; delete it" in refused(*commands["lam"])
    (root / "lam/inputs.json").unlink()  # as in a run of an older release
    assert "is already finished" in ok(*commands["lam"]).stderr


def digests(**settings):
    return input_digests(SimpleNamespace(**settings))


def test_parts_of_a_mixture_are_inputs(tmp_path):
    paths = [write_blocks(tmp_path / f"{seed}.npz", 1, seed=seed) for seed in range(2)]
    found = digests(data=TrainingDataConfig(mixture=tuple(MixturePart(path=str(path)) for path in paths)))
    assert [*found] == [*map(str, paths)]
    assert len({*found.values()}) == 2
    assert [found[str(paths[0])]] == [*digests(data=DataConfig(path=str(paths[0]), resolution=16)).values()]


def test_settings_of_a_setting_are_inputs(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert [*digests(online=OnlineConfig(lam=str(tmp_path)))] == [str(tmp_path / "model.safetensors")]
    assert digests(policy=str(tmp_path / "nothing"), labels="owner/name", vla="/proc/1/mem") == {}


def test_shards_by_a_pattern(tmp_path):
    ok("shard", "--data", write_blocks(tmp_path / "blocks.npz", 2), "--out", tmp_path / "shards")
    assert len(digests(data=DataConfig(path=str(tmp_path / "shards/shard-{000000..000000}.tar")))) == 1


def test_every_camera_task_and_token_is_an_input(tmp_path):
    root, wrist, seen = tmp_path / "data", "observation.images.wrist", []

    def tokens(value):
        return {TOKENS_KEY: (floats(1), lambda episode, n: pa.array([[value]] * n, pa.list_(pa.float32())))}

    for settings in (
        {},
        {"columns": tokens(1.0)},
        {"columns": tokens(2.0)},
        {"texts": ("pull",), "tasks": lambda episode, n: ["pull"]},
    ):
        shutil.rmtree(root, ignore_errors=True)
        lerobot(root, 3, cameras=(TOP, wrist), **settings)
        seen.append(digests(dataset_root=str(root)))
    write_video(next(root.glob(f"videos/{wrist}/**/*.mp4")), 14, start=3, fps=10)
    seen.append(digests(dataset_root=str(root)))
    assert [[*each] for each in seen] == [[str(root)]] * 5
    assert len({each[str(root)] for each in seen}) == 5


def test_the_column_that_flags_rows_is_an_input(tmp_path):
    root, seen = tmp_path / "data", []
    for flag in (True, False):
        shutil.rmtree(root, ignore_errors=True)
        feature = {"dtype": "bool", "shape": [1], "names": None}
        lerobot(root, 3, columns={"good": (feature, lambda episode, n, flag=flag: [flag] * n)})
        seen += [*digests(data=str(root), only="good").values(), *digests(data=str(root)).values()]
    assert seen[1] == seen[3] not in (seen[0], seen[2])
    assert seen[0] != seen[2]
