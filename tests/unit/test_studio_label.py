"""The page Label: proposals, drafts, saved labels, and the dataset with them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from conftest import TINY_POLICY, contents, ok
from latentact.data.cache import DataConfig, open_store
from latentact.data.plan import read_plan
from latentact.errors import UserError
from latentact.lams.models.lapo import LapoConfig
from latentact.quantizers.fsq import FsqConfig
from latentact.stages import studio
from latentact.stages.studio import StudioConfig
from latentact.studio import label
from latentact.studio.meaning import survey
from toy_studio import SHAPE, save_lam, write_moving_block

CAMERA = "observation.images.top"


def finished(work):
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


@pytest.fixture(scope="module")
def root(tmp_path_factory, blocks):
    """A LAM, a LeRobot dataset of blocks, and a policy grounded on it."""
    root = tmp_path_factory.mktemp("label")
    save_lam(
        root / "lam", LapoConfig(**SHAPE, bottleneck=FsqConfig(positions=1, levels=(3, 3))), camera=CAMERA
    )
    write_moving_block(root, blocks, CAMERA)
    ok("label", "--lam", root / "lam", "--data", root / "data", "--out", root / "labels")
    short = ("training.steps=2", "training.eval_every=0")
    ok("train-policy", f"labels={root}/labels", *TINY_POLICY, *short, f"out={root}/policy")
    ok("ground", f"policy={root}/policy", f"labels={root}/labels", *short[:1], f"out={root}/ground")
    return root


@pytest.fixture
def work(root, tmp_path):
    flags = {"data": str(root / "data"), "policy": str(root / "ground"), "out": str(tmp_path / "out")}
    return studio.open_workspace(StudioConfig(run=str(root / "lam"), **flags))


def test_proposals_cover_latent_actions(work):
    given = finished(label.candidates(work, label.actions_of(work)))
    chosen = label.proposals(work, given, 3, "coverage")
    covered = [each for _, each in chosen]
    assert covered == sorted(covered)
    assert {number for number, _ in chosen} <= set(given.train.tolist())
    drawn = label.draft(work, label.actions_of(work), chosen[0][0])
    label.save(work, drawn.accept(range(len(drawn))))
    after = label.proposals(work, given, 3, "coverage")
    assert [number for number, _ in after][:2] == [number for number, _ in chosen][1:]
    with pytest.raises(UserError, match="the budget must be between 1 and 6"):
        label.proposals(work, given, 7, "coverage")
    with pytest.raises(UserError, match="the method must be one of"):
        label.proposals(work, given, 1, "best")


def test_labels_are_set_accepted_and_removed(work):
    actions = label.actions_of(work)
    drawn = label.draft(work, actions, 0)
    assert (len(drawn), drawn.given.any()) == (11, False)
    assert drawn.pseudo is not None
    assert set(np.unique(drawn.pseudo)) <= {0.0, 1, 2, 3}
    drawn = drawn.set(range(2, 5), actions.parse(actions.name(3))).accept(range(5, 7)).set(range(4, 5), None)
    assert np.flatnonzero(drawn.given).tolist() == [2, 3, 5, 6]
    assert drawn.values[2:4, 0].tolist() == [3, 3]
    assert drawn.values[5:7].tolist() == drawn.pseudo[5:7].tolist()
    for steps in (range(3, 3), range(0, 12), range(-1, 2)):
        with pytest.raises(UserError, match="the steps must be among 0 to 11"):
            drawn.set(steps, 0)
    with pytest.raises(UserError, match="the action must be one of"):
        actions.parse("jump")
    with pytest.raises(UserError, match="pseudo-labels need"):
        replace(drawn, pseudo=None).accept(range(1))


def test_numbers_are_typed():
    space = label.ActionSpace(kind="continuous", size=2)
    actions = label.Actions(space=space, names=(), agent=None)
    assert actions.parse("0.5, -1") == [0.5, -1.0]
    for typed in ("", "1", "1 2 3", "a b", "1 nan", "1 inf"):
        with pytest.raises(UserError, match="the action must be 2 numbers, such as"):
            actions.parse(typed)


def test_saved_labels_come_back_and_become_a_dataset(work, root):
    actions = label.actions_of(work)
    before = contents(root / "data")
    with pytest.raises(UserError, match="there are no saved labels"):
        label.write_copy(work)
    with pytest.raises(UserError, match="no step has a label"):
        label.save(work, label.draft(work, actions, 3))
    for number in (3, 1):
        drawn = label.draft(work, actions, number).set(range(11), 2)
        assert "11 of 11 steps" in label.save(work, drawn)
    label.save(work, label.draft(work, actions, 5).set(range(2, 4), 1))
    again = label.draft(work, actions, 5)
    assert np.flatnonzero(again.given).tolist() == [2, 3]
    assert label.page(again, actions, finished(survey(work)))["labeled"] == 2
    assert "3 episodes, 24 labels" in label.write_copy(work)
    assert contents(root / "data") == before
    copy = open_store(DataConfig(path=str(work.out / "labeled"), resolution=32))
    old = np.ma.getdata(work.store.actions(range(8)))
    new = np.ma.getdata(copy.actions(range(8)))
    assert new[copy.starts[3] :][:11].tolist() == [2] * 11
    changed = np.zeros(len(new), bool)
    for number, steps in ((3, range(11)), (1, range(11)), (5, range(2, 4))):
        changed[copy.starts[number] + np.array(steps)] = True
    assert np.array_equal(new[~changed], old[~changed])
    assert np.array_equal(copy.column("labeled").ravel(), changed)
    assert read_plan(work.out / "plan.json", copy).tolist() == [3, 1, 5]
    label.write_copy(work)  # again, with the labels so far


def test_ground_learns_from_what_was_labeled(work, root):
    actions = label.actions_of(work)
    for number in (3, 1):
        drawn = label.draft(work, actions, number)
        label.save(work, drawn.accept(range(len(drawn))))
    label.write_copy(work)
    out = work.out
    ok("label", "--lam", root / "lam", "--data", out / "labeled", "--out", out / "labels")
    given = (f"policy={root}/policy", f"labels={out}/labels", f"plan={out}/plan.json", "labeled_episodes=2")
    ok("ground", *given, "training.steps=2", "split_seed=1", f"out={out}/ground")
    assert json.loads((out / "ground/ground.json").read_text())["labeled_steps"] == 22


def test_damaged_labels_and_other_data_are_a_sentence(work, blocks, root, tmp_path):
    work.out.mkdir()
    for text, message in (("{", "is not JSON"), ("{}", "episodes is missing")):
        (work.out / "labels.json").write_text(text)
        with pytest.raises(UserError, match=message):
            label.draft(work, label.actions_of(work), 0)
    other = studio.open_workspace(
        StudioConfig(run=str(root / "lam"), data=str(blocks), out=str(tmp_path / "npz"))
    )
    actions = label.actions_of(other)
    drawn = label.draft(other, actions, 0)
    assert drawn.pseudo is None
    label.save(other, drawn.set(range(2), 1))
    with pytest.raises(UserError, match="a copy of a LeRobot v3 dataset"):
        label.write_copy(other)
    none = studio.open_workspace(StudioConfig(run=str(root / "lam")))
    with pytest.raises(UserError, match="this page needs data"):
        label.actions_of(replace(none, store=None))
