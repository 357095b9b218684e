"""A run folder notices that its inputs have changed since the run began."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY_LAM, TINY_POLICY, ok, refused, write_blocks
from latentact.data.cache import DataConfig
from latentact.data.mixture import MixturePart, TrainingDataConfig
from latentact.training.inputs import input_digests

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
    write_blocks(root / "blocks.npz", episodes=4)
    assert "is already finished" in ok(*commands["policy"]).stderr


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
    ok("label", "--lam", root / "other", "--data", root / "blocks.npz", "--out", root / "labels")
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
    (root / "lam/inputs.json").unlink()  # a run of an older release
    assert "is already finished" in ok(*commands["lam"]).stderr


def test_parts_of_a_mixture_are_inputs(tmp_path):
    paths = [write_blocks(tmp_path / f"{seed}.npz", 1, seed=seed) for seed in range(2)]

    class Stage:
        def __init__(self, data):
            self.data = data

    def digests(data):
        return input_digests(Stage(data))

    found = digests(TrainingDataConfig(mixture=tuple(MixturePart(path=str(path)) for path in paths)))
    assert [*found] == [*map(str, paths)]
    assert len({*found.values()}) == 2
    assert found[str(paths[0])] == digests(DataConfig(path=str(paths[0]), resolution=16))[str(paths[0])]
