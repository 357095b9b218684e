"""`latentact record`: keys in a window and in a terminal become a LeRobot dataset."""

import itertools
import json
import os
import pty
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_export import CAMERA, write_moves

from conftest import cli, contents, fork, ok, refused
from latentact.agents.agent import AgentSpec
from latentact.data.cache import DataConfig, open_store
from latentact.data.store import flagged_rows
from latentact.envs import input_devices
from latentact.envs.spec import make_env
from latentact.types import ActionSpace

pygame = pytest.importorskip("pygame")
pytest.importorskip("lerobot")
ENV = "babyai/PickupLoc"
TAKEOVER = ("executed_action", "intervention", "labeled")
CODES = {
    "right": pygame.K_RIGHT,
    "left": pygame.K_LEFT,
    "enter": pygame.K_RETURN,
    "backspace": pygame.K_BACKSPACE,
    "escape": pygame.K_ESCAPE,
    "+": pygame.K_PLUS,
    "-": pygame.K_MINUS,
}


def typed(keys):
    """Make the window see one more key at each look, as events; "[d" holds d and "]d" releases it."""
    script, own = iter([*keys, *[""] * 99]), input_devices.Window.poll

    def poll(window):
        key = next(script)  # an exhausted script is an error, not a person who thinks
        if key == "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if key:
            kinds = {"[": [pygame.KEYDOWN], "]": [pygame.KEYUP]}.get(key[0], [pygame.KEYDOWN, pygame.KEYUP])
            name = key[1:] if len(key) == 2 else key
            code = CODES.get(name) or pygame.key.key_code(name)
            for kind in kinds:
                pygame.event.post(pygame.event.Event(kind, key=code))
        return own(window)

    return poll


@pytest.fixture(autouse=True)
def _window(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(input_devices.Window, "wait", lambda *_: None)


def record(monkeypatch, keys, out, *settings, env=ENV):
    monkeypatch.setattr(input_devices.Window, "poll", typed(keys))
    return ok("record", env, "--out", out, *settings)


def rows(folder):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/mine", root=folder, video_backend="pyav")
    table = dataset.hf_dataset
    episodes = np.array([int(e) for e in table["episode_index"]])
    return [
        {name: np.array([np.asarray(table[int(i)][name]) for i in np.flatnonzero(episodes == e)]).squeeze()
         for name in {"action", "next.success", "next.reward", *TAKEOVER} & {*dataset.features}}
        for e in range(dataset.num_episodes)
    ]  # fmt: skip


def test_twenty_episodes_of_which_three_fail_are_dropped(monkeypatch, tmp_path):
    """Attempts 4, 9 and 14 fail; one is recorded again, and one is undone."""
    keys, lengths = [], []
    for attempt in range(24):
        moves = ["w", "a", "d"][: 1 + attempt % 3]
        if attempt == 7:
            keys += ["d", "d", "left"]
        keys += [*moves, "backspace" if attempt in (4, 9, 14) else "enter"]
        if attempt == 11:
            keys += ["u"]
        elif attempt not in (4, 9, 14):
            lengths.append(len(moves) + 1)
    done = record(monkeypatch, keys, tmp_path / "mine", "--episodes", "20")
    assert "20 episodes" in done.stdout
    assert "4 dropped" in done.stdout
    episodes = rows(tmp_path / "mine")
    assert [len(episode["action"]) for episode in episodes] == lengths
    assert episodes[0]["action"].tolist() == [2, 6], "forward, then held still"
    assert episodes[2]["action"].tolist() == [2, 0, 1, 6]
    assert episodes[2]["next.success"].tolist() == [False, False, True, True]
    sidecar = json.loads((tmp_path / "mine/meta/record.json").read_text())
    assert (sidecar["env"], sidecar["dropped"], sidecar["only_successes"]) == (ENV, 4, True)
    assert not (tmp_path / "mine.partial").exists()


def test_frames_are_those_of_the_environment(monkeypatch, tmp_path):
    record(monkeypatch, ["d", "w", "w", "right"], tmp_path / "mine", "--episodes", "1", "--no-only-successes")
    env = make_env(ENV)
    frames = [env.reset(seed=0)[0]["pixels"], *(env.step(action)[0]["pixels"] for action in (1, 2, 2))]
    stored = open_store(DataConfig(path=str(tmp_path / "mine"), resolution=0))
    assert np.array_equal(np.array(stored.frames), np.stack(frames))


def test_escape_keeps_what_was_recorded(monkeypatch, tmp_path):
    record(monkeypatch, ["w", "enter", "d", "d", "escape"], tmp_path / "mine")
    (episode,) = rows(tmp_path / "mine")
    assert len(episode["action"]) == 2
    monkeypatch.setattr(input_devices.Window, "poll", typed(["w", "escape"]))
    assert "no episode was recorded" in refused("record", ENV, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def _killed(keys, arguments):
    input_devices.Window.poll, input_devices.Window.wait = typed(keys), lambda *_: None
    cli(*arguments)


@pytest.mark.slow
def test_a_killed_recording_is_resumed(monkeypatch, tmp_path):
    keys = ["w", "enter", "d", "w", "enter", "a", "backspace", "d", "d", "enter", "w", "w", "enter"]
    record(monkeypatch, keys, tmp_path / "whole", "--episodes", "4")
    arguments = ("record", ENV, "--out", str(tmp_path / "cut"), "--episodes", "4")
    process = fork(_killed, [*keys[:9], "KILL"], arguments)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    assert len([*(tmp_path / "cut.partial").glob("*.npz")]) == 2
    record(monkeypatch, keys[7:], tmp_path / "cut", "--episodes", "4")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    monkeypatch.setattr(input_devices.Window, "poll", typed(["escape"]))
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial/settings.json").write_text('{"env": "pusht"}')
    assert "unfinished recording with other settings" in refused("record", ENV, "--out", tmp_path / "other")


def test_held_keys_move_a_continuous_action(monkeypatch, tmp_path):
    """PushT takes positions on a screen of 512 pixels: a held key moves the target by 5 % of them a step."""
    moments = itertools.count()
    monkeypatch.setattr(input_devices.time, "monotonic", lambda: next(moments) * 0.1)  # one step a look
    keys = ["[d", "", "", "]d", "[w", "]w", "", "p", "", "", "p", "+", "", "right"]
    record(monkeypatch, keys, tmp_path / "mine", "--no-only-successes", "--episodes", "1", env="pusht")
    if hasattr(os, "sched_getscheduler"):
        assert os.sched_getscheduler(0) == os.SCHED_OTHER, "the encoder leaves a real-time process"
    (episode,) = rows(tmp_path / "mine")
    steps = np.diff(episode["action"], axis=0)[:5]
    moved = {tuple(np.round(step / 25.6, 2)) for step in steps}
    assert moved <= {(1.0, 0.0), (0.0, -1.0), (0.0, 0.0)}, moved
    assert (1.0, 0.0) in moved
    assert (0.0, -1.0) in moved
    assert len(episode["action"]) < len(keys), "no step while paused"


def test_a_terminal_shows_frames_and_takes_keys(monkeypatch, tmp_path, capfd):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r", newline="") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        os.write(ours, b"dw\x1b[C")  # right, forward, the right arrow
        done = ok("record", ENV, "--device", "terminal", "--out", tmp_path / "mine", "--episodes", "1",
                  "--no-only-successes")  # fmt: skip
        monkeypatch.undo()
    os.close(ours)
    assert "▀" in done.stdout
    assert "episode 1 of 1 | step 2" in done.stdout
    (episode,) = rows(tmp_path / "mine")
    assert episode["action"].tolist() == [1, 2, 6]


def test_what_cannot_be_used_is_one_sentence(monkeypatch, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "must have an interactive terminal" in refused("record", ENV, *out, "--device", "terminal")
    assert "a gamepad must be connected" in refused("record", ENV, *out, "--device", "gamepad")
    assert "--device must be keyboard, gamepad or terminal" in refused(
        "record", ENV, *out, "--device", "mouse"
    )
    assert "did you mean" in refused("record", "babyai/PickupLo", *out)
    monkeypatch.setenv("SDL_VIDEODRIVER", "x11")
    monkeypatch.delenv("DISPLAY", raising=False)
    pygame.display.quit()
    assert "a window needs a display" in refused("record", ENV, *out)
    (tmp_path / "out").mkdir()
    assert "must be a new folder, got an existing one" in refused("record", ENV, *out)


@pytest.mark.parametrize(("command", "driver"), [("record", None), ("rollout", "dummy")])
def test_only_record_leaves_sdl_its_real_windows(monkeypatch, command, driver):
    monkeypatch.setenv("SDL_VIDEODRIVER", "x11")  # restored after the test
    monkeypatch.delenv("SDL_VIDEODRIVER")
    assert cli(command, "--help").returncode == 0
    assert os.environ.get("SDL_VIDEODRIVER") == driver


class TurnsLeft:
    """An agent that always turns left."""

    spec = AgentSpec(action_space=ActionSpace(kind="discrete", size=7))

    def reset(self, num_envs):
        self.steps = 0

    def act(self, observation, latent=None):
        self.steps += 1
        return np.zeros(len(observation["task"]), np.int64)


def test_a_person_takes_over_a_policy(monkeypatch, tmp_path):
    moments = itertools.count()
    monkeypatch.setattr(input_devices.time, "monotonic", lambda: next(moments) * 1.0)  # a step a look
    monkeypatch.setattr("latentact.stages.record.load_agent", lambda where: TurnsLeft())
    keys = ["", "", "w", "", "d", "right"]
    settings = ("--no-only-successes", "--episodes", "1", "--policy", "runs/bc")
    record(monkeypatch, keys, tmp_path / "mine", *settings)
    (episode,) = rows(tmp_path / "mine")
    assert episode["action"].tolist()[:5] == [0, 0, 2, 0, 1]
    assert np.array_equal(episode["executed_action"], episode["action"])
    own = [False, False, True, False, True, False]
    assert episode["intervention"].tolist() == episode["labeled"].tolist() == own
    assert json.loads((tmp_path / "mine/meta/record.json").read_text())["policy"] == "runs/bc"


def relabel(monkeypatch, keys, data, out, *settings):
    monkeypatch.setattr(input_devices.Window, "poll", typed(keys))
    return ok("relabel", data, "--out", out, *settings)


def test_frames_are_labeled_afterwards(monkeypatch, tmp_path):
    keys = ["w", "w", "w", "right", "a", "a", "right"]
    record(monkeypatch, keys, tmp_path / "mine", "--no-only-successes", "--episodes", "2")
    # d; the executed action is kept; back to it and a instead; no label; d; end before the last one
    given = ["d", "enter", "left", "a", "right", "d", "escape"]
    done = relabel(monkeypatch, given, tmp_path / "mine", tmp_path / "mine_labeled")
    assert "3 labels, 3 different from the executed action" in done.stdout
    before, after = rows(tmp_path / "mine"), rows(tmp_path / "mine_labeled")
    assert [each["action"].tolist()[:-1] for each in before] == [[2, 2, 2], [0, 0]]
    for old, new in zip(before, after, strict=True):
        assert new["executed_action"].tolist() == old["action"].tolist()
    assert [each["labeled"].tolist() for each in after] == [[True, True, False, False], [True, False, False]]
    assert [each["action"].tolist()[:-1] for each in after] == [[1, 0, 2], [1, 0]]
    info = [json.loads((tmp_path / name / "meta/info.json").read_text()) for name in ("mine", "mine_labeled")]
    assert info[1]["features"]["action"] == info[0]["features"]["action"]
    store = open_store(DataConfig(path=str(tmp_path / "mine_labeled")))
    assert flagged_rows(store, "labeled").sum() == 3
    sidecar = json.loads((tmp_path / "mine_labeled/meta/relabel.json").read_text())
    assert (sidecar["labels"], sidecar["changed"]) == (3, 3)


def test_episodes_that_cannot_be_read_and_labels_of_before_are_kept(monkeypatch, tmp_path):
    moves = write_moves(tmp_path, episodes=3)
    before = rows(moves)
    (table,) = (moves / "data").glob("*/*.parquet")
    content = pq.read_table(table)
    images = content[CAMERA].to_pylist()
    images[len(before[0]["action"]) + 1]["bytes"] = b"no image"  # of the episode in the middle
    broken = content.set_column(content.schema.get_field_index(CAMERA), CAMERA, [images])
    pq.write_table(broken.cast(content.schema), table)
    relabel(monkeypatch, ["d", "enter", "escape"], moves, tmp_path / "once")
    relabel(monkeypatch, ["right", "d", "enter", "escape"], tmp_path / "once", tmp_path / "twice")
    found = pq.read_table(next((tmp_path / "twice/data").glob("*/*.parquet")))
    executed, labeled = (np.array(found[name].to_pylist()) for name in ("executed_action", "labeled"))
    assert np.array_equal(executed, np.concatenate([each["action"] for each in before]))
    assert np.flatnonzero(labeled).tolist() == [0, 1]
    unchanged = np.array(found["action"].to_pylist())[2:]
    assert np.array_equal(unchanged, executed[2:])


def test_labels_of_numbers_move_by_keys(monkeypatch, tmp_path):
    moves = write_moves(tmp_path, episodes=2)
    given = ["d", "d", "enter", "s", "enter", "escape"]
    relabel(monkeypatch, given, moves, tmp_path / "labeled", "--every", "4", "--step-size", "0.5")
    (before, after), _ = ((rows(moves)[i], rows(tmp_path / "labeled")[i]) for i in range(2))
    span = np.ptp(np.concatenate([each["action"] for each in rows(moves)]), axis=0)
    changed = after["action"] - before["action"]
    assert np.allclose(changed[0], [span[0], 0])
    assert np.allclose(changed[4], [0, -span[1] / 2])
    assert after["labeled"].tolist() == [row in (0, 4) for row in range(len(before["action"]))]


def _killed_while_labeling(keys, data, out):
    input_devices.Window.poll, input_devices.Window.wait = typed(keys), lambda *_: None
    cli("relabel", data, "--out", out)


@pytest.mark.slow
def test_a_killed_labeling_is_resumed(monkeypatch, tmp_path):
    keys = ["w", "w", "w", "right", "a", "a", "right"]
    record(monkeypatch, keys, tmp_path / "mine", "--no-only-successes", "--episodes", "2")
    given = ["d", "enter", "a", "d", "d"]
    relabel(monkeypatch, given, tmp_path / "mine", tmp_path / "whole")
    process = fork(_killed_while_labeling, [*given[:3], "KILL"], tmp_path / "mine", tmp_path / "cut")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    relabel(monkeypatch, given[3:], tmp_path / "mine", tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_what_cannot_be_labeled(monkeypatch, tmp_path):
    monkeypatch.setattr(input_devices.Window, "poll", typed(["escape"]))
    moves = write_moves(tmp_path, episodes=1)
    assert "no frame was labeled" in refused("relabel", moves, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "does not exist" in refused("relabel", tmp_path / "nowhere", "--out", tmp_path / "out")
    for command in (("relabel", moves), ("record", ENV)):
        assert "interactive terminal" in refused(*command, "--device", "terminal", "--out", tmp_path / "tty")
    assert not [*tmp_path.glob("tty*")]
    (tmp_path / "exists").mkdir()
    assert "must not exist yet" in refused("relabel", moves, "--out", tmp_path / "exists")
    (tmp_path / "videos").mkdir()
    assert "LeRobot v3 dataset" in refused("relabel", tmp_path / "videos", "--out", tmp_path / "out")
