"""The page Label: proposals, drafts, saved labels, and the dataset with them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from conftest import TINY_POLICY, contents, ok
from latentact.data.cache import DataConfig, open_store
from latentact.data.plan import read_plan
from latentact.data.splits import split_episodes
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
        with pytest.raises(UserError, match="the first step and the end must be between 0 and 11"):
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
    assert "0 of 11 steps" in label.save(work, label.draft(work, actions, 3))
    assert label.read_saved(work) == {}
    for number in (3, 1):
        drawn = label.draft(work, actions, number).set(range(11), 2)
        assert "11 of 11 steps" in label.save(work, drawn)
    label.save(work, label.draft(work, actions, 5).set(range(2, 4), 1))
    again = label.draft(work, actions, 5)
    assert np.flatnonzero(again.given).tolist() == [2, 3]
    assert label.page(again, actions, finished(survey(work)))["labeled"] == 2
    train, _ = split_episodes(work.store, held_out=0.1, seed=0)
    held_out = [number for number in (3, 1, 5) if number not in train]
    written = label.write_copy(work)
    assert "3 episodes, 24 labels" in written
    assert ("1 held-out episodes are not in the plan" in written) == bool(held_out)
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
    planned = read_plan(work.out / "labeled/plan.json", copy).tolist()
    assert planned == [number for number in (3, 1, 5) if number in train]
    label.write_copy(work)  # again, with the labels so far
    shutil.rmtree(work.out / "labeled/meta")
    with pytest.raises(UserError, match="must be new or an earlier copy, got something else"):
        label.write_copy(work)


def test_labels_of_other_steps_or_actions_are_refused(work):
    """As when the data was opened at another rate, or the file was changed by hand."""
    actions = label.actions_of(work)
    label.save(work, label.draft(work, actions, 1).set(range(11), 2))
    saved = json.loads((work.out / "labels.json").read_text())
    (entry,) = saved["episodes"].values()
    for wrong in ([2] * 20, [2] * 5, [9] * 11, [-1] * 11, [[1.0]] * 11, ["left"] * 11):
        entry["actions"] = wrong
        (work.out / "labels.json").write_text(json.dumps(saved))
        for read in (label.write_copy, lambda work: label.draft(work, actions, 1)):
            with pytest.raises(UserError, match=r"must have actions \(.*\) for the 11 steps|repair the file"):
                read(work)
    assert not (work.out / "labeled").exists()


def test_ground_learns_from_what_was_labeled(work, root):
    actions = label.actions_of(work)
    train, _ = split_episodes(work.store, held_out=0.1, seed=0)
    for number in train[:2]:
        drawn = label.draft(work, actions, int(number))
        label.save(work, drawn.accept(range(len(drawn))))
    label.write_copy(work)
    out = work.out
    ok("label", "--lam", root / "lam", "--data", out / "labeled", "--out", out / "labels")
    given = (
        f"policy={root}/policy",
        f"labels={out}/labels",
        f"plan={out}/labeled/plan.json",
        "labeled_episodes=2",
    )
    ok("ground", *given, "training.steps=2", f"out={out}/ground")
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
    with pytest.raises(UserError, match="must be a LeRobot v3 dataset with actions for a copy"):
        label.write_copy(other)
    none = studio.open_workspace(StudioConfig(run=str(root / "lam")))
    with pytest.raises(UserError, match="this page needs data"):
        label.actions_of(replace(none, store=None))
