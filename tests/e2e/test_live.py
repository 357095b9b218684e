"""`latentact imitate --live`: a policy follows a video that is played, in simulation and on a robot."""

import json

import numpy as np
import pytest
import test_imitate
from test_imitate import robot_file

from conftest import ok, refused
from latentact.errors import UserError
from latentact.guidance import capture as capture_module
from latentact.guidance import live as live_module
from latentact.guidance.capture import Capture, Frame, VideoSource, open_source
from latentact.guidance.extractor import LatentActionExtractor, video_frames
from latentact.guidance.guide import Guide
from latentact.policies.contract import Policy
from latentact.robots import connection
from latentact.robots import control as control_module
from latentact.stages import imitate

made = test_imitate.made
FPS = 10.0


class Clock:
    """Time that passes only while somebody waits."""

    now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Played(Capture):
    """A capture in virtual time: frame k of a video comes after k periods, unless `schedule` changes that."""

    schedule = staticmethod(dict)  # {k: period}, None: never
    lost_at = None

    def __init__(self, source, max_frames=0):
        self.source, self.dropped, self.coming, self.clock = source, 0, None, capture_module.time

    def take(self, timeout):
        if self.coming is None:
            start, when = self.clock.now, self.schedule()
            times = [(k, when.get(k, k), p) for k, p in enumerate(video_frames(self.source.name, FPS))]
            self.coming = [
                Frame(number=k, time=start + t / FPS, pixels=p) for k, t, p in times if t is not None
            ]
        if not self.coming:
            return None
        until = self.clock.now + timeout
        if self.coming[0].time > until:
            self.clock.now = max(until, self.clock.now + 1e-9)
            return []
        if self.coming[0].number == self.lost_at:
            raise self._lost("unplugged")
        self.clock.now = max(self.clock.now, self.coming[0].time)
        ready = [frame for frame in self.coming if frame.time <= self.clock.now]
        del self.coming[: len(ready)]
        self.source.captured += len(ready)
        return ready

    def close(self):
        pass


@pytest.fixture
def played(monkeypatch):
    """Virtual time and a fresh `Played`."""
    clock, kind = Clock(), type("Played", (Played,), {})
    for module in (capture_module, live_module, control_module, connection):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(imitate, "Capture", kind)
    return kind


def live(root, policy, out, *more):
    given = ("--lam-model-path", root / "lam", "--policy-path", root / policy, "--output-dir", out)
    return ("imitate", "--live", root / "demo.mp4", *given, *more)


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize(("policy", "delay"), [("ground", 0.0), ("guided", 0.4)])
def test_live_is_as_good_as_the_video(made, tmp_path, played, policy, delay):
    """With no frame lost, the same latent actions, in the same steps."""
    a, b = tmp_path / "a", tmp_path / "b"
    done = ok(*live(made, policy, a))
    ok("imitate", *test_imitate.flags(made, policy=policy), "--output-dir", b, "--no-render")
    found, expected = metrics_of(a), metrics_of(b)
    assert (found["steps"], found["ended"]) == (15, "the guide ended")
    assert [found[k] for k in ("return", "largest_reward")] == pytest.approx(
        [expected[k] for k in ("return", "largest_reward")], rel=1e-3
    )
    assert found["agreement"]["steps"] == pytest.approx(expected["agreement"]["steps"], abs=1e-3)
    guides = Guide.load(a), Guide.load(b)
    for name in ("vectors", "continuous", "still"):
        np.testing.assert_allclose(*(getattr(guide, name) for guide in guides), atol=1e-6)
    assert guides[0].provenance == (f"live {made / 'demo.mp4'}, 0 frames dropped",)
    numbers = found["live"]
    assert (numbers["captured"], numbers["dropped"], numbers["delay_s"]) == (16, 0, delay)
    assert (numbers["stale_steps"], numbers["skipped_steps"], numbers["late_steps"]) == (0, 0, 0)
    for stage in ("capture_to_latent", "latent_to_action", "capture_to_action"):
        assert numbers["latency_ms"][stage]["max"] == pytest.approx(0, abs=1e-3)
    assert "capture to action: 0 ms median, 0 ms p95; of 16 frames 0 dropped, 0 stale steps" in done.stdout
    page = (a / "report.html").read_text()
    assert "<td class=n>16</td>" in page
    assert ("up to 0.4 s ahead and follows as much later" in page) == (policy == "guided")


def test_a_real_thread_plays_the_video(made, tmp_path):
    ok(*live(made, "ground", tmp_path), "--max-frames", "6", "--max-age", "60", "--no-render")
    metrics = metrics_of(tmp_path)
    assert metrics["ended"] == "the guide ended"
    assert (metrics["live"]["captured"], metrics["guide"]["latent_actions"]) == (6, 5)
    assert metrics["steps"] + metrics["live"]["skipped_steps"] >= 5
    assert metrics["live"]["latency_ms"]["capture_to_action"]["max"] > 0


def test_control_faster_than_the_camera_holds_each_latent_action(made, tmp_path, played):
    ok(*live(made, "guided", tmp_path), "--fps", "20", "--no-render")
    metrics = metrics_of(tmp_path)
    assert (metrics["steps"], metrics["live"]["skipped_steps"]) == (30, 0)
    assert metrics["live"]["delay_s"] == 0.4  # 8 of 20 steps per second


def test_late_frames_are_skipped_to_the_newest(made, tmp_path, played):
    """Frame 5 comes with frame 6, and 9, which two transitions need, never."""
    played.schedule = staticmethod(lambda: {5: 6, 9: None})
    ok(*live(made, "ground", tmp_path), "--no-render")
    metrics = metrics_of(tmp_path)
    assert metrics["live"]["skipped_steps"] == 1 + 2
    assert metrics["guide"]["latent_actions"] == 13
    assert metrics["steps"] == 15
    assert metrics["live"]["stale_steps"] == 1  # when 10 comes, the last latent action ended with 8


@pytest.mark.parametrize(("policy", "hidden"), [("ground", False), ("guided", True)])
def test_stale_frames_are_not_followed(made, tmp_path, played, monkeypatch, policy, hidden):
    """Frames 8 to 12 are missing, and with them the latent actions up to frame 14.

    The step at 8 periods repeats the last one (at most two periods old), those at 9 to 13 are stale.
    """
    played.schedule = staticmethod(lambda: dict.fromkeys(range(8, 13)))
    guides, own = [], Policy.actions
    monkeypatch.setattr(Policy, "actions", lambda s, b, c: guides.append(b.guide) or own(s, b, c))
    ok(*live(made, policy, tmp_path), "--no-render")
    found = metrics_of(tmp_path)["live"]
    assert found["stale_steps"] == 5
    assert sum(guide is None for guide in guides) == (5 if hidden else 0)


def test_a_lost_camera_ends_the_episode(made, tmp_path, played):
    played.lost_at = 8
    message = refused(*live(made, "guided", tmp_path / "out"))
    assert "was lost (unplugged), so control stopped." in message
    metrics = metrics_of(tmp_path / "out")
    assert metrics["ended"] == message.removeprefix("error: ")
    assert metrics["steps"] == 3  # from frame 5, the first with the offset of 4
    assert (tmp_path / "out/report.html").exists()
    played.lost_at = 1
    assert "unplugged" in refused(*live(made, "guided", tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def on_robot(tmp_path, **safety):
    file = robot_file(tmp_path / "robot.yaml", {**test_imitate.SAFETY, **safety}, seed=2)
    return ("--mode", "robot", "--robot-config", file)


def test_a_robot_follows_and_is_held_while_frames_are_stale(made, tmp_path, played):
    ok(*live(made, "ground", tmp_path / "a", *on_robot(tmp_path)))
    metrics = metrics_of(tmp_path / "a")
    assert (metrics["commands"], metrics["end"], metrics["disconnected"]) == (15, "guide_end", True)
    assert metrics["holds"] == {"no fresh latent action": 1}  # while there is one frame
    played.schedule = staticmethod(lambda: dict.fromkeys(range(8, 13)))
    ok(*live(made, "ground", tmp_path / "b", *on_robot(tmp_path)), "--no-render")
    metrics = metrics_of(tmp_path / "b")
    assert metrics["live"]["stale_steps"] == 5
    assert metrics["holds"] == {"no fresh latent action": 1 + 5}
    assert any("the newest ended 0.25 s ago" in event["message"] for event in metrics["events"])


def test_a_lost_camera_stops_the_robot(made, tmp_path, played):
    played.lost_at = 8
    message = refused(*live(made, "guided", tmp_path / "out", *on_robot(tmp_path), "--no-render"))
    metrics = metrics_of(tmp_path / "out")
    assert metrics["ended"] == message.removeprefix("error: ")
    assert (metrics["end"], metrics["disconnected"]) == ("error", True)
    assert 1 <= metrics["commands"] <= 4
    message = refused(*live(made, "guided", tmp_path / "no", *on_robot(tmp_path, stop_after_s=0.4)))
    assert "safety.stop_after_s must be more than the 0.5 s of video" in message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--guide", "g"), "exactly one of --video-path, --guide and --live"),
        (("--mode", "extract_only"), "--live must have --mode simulation or robot"),
        (("--time-base", "resample"), "--live must have --mode simulation or robot and --time-base hold"),
        (("--fps", "5"), "--time-base hold would skip some"),
        (("--max-age", "-1"), "--max-age must be"),
        (("--lam-model-path", ""), "--lam-model-path must be the LAM"),
    ],
)
def test_what_cannot_be_live_is_one_sentence(made, tmp_path, more, message):
    assert message in refused(*live(made, "ground", tmp_path / "out"), *more)
    assert not (tmp_path / "out").exists()
    given = ("--guide", made / "latents", "--policy-path", made / "ground", "--output-dir", tmp_path)
    assert "--max-age must be 0 without --live, got 1" in refused("imitate", *given, "--max-age", "1")


@pytest.fixture(scope="module")
def extractor(made):
    return LatentActionExtractor(made / "lam", 0, "cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gone.mp4", "gone.mp4 must be a video file, got no such file"),
        ("opencv:987", "the camera opencv:987 cannot be used: "),
        ("opencv:0,fps", "the camera must be TYPE:key=value,..., got 'fps'"),
        ("opencv:0,speed=3", "the camera opencv:0,speed=3 cannot be created: "),
        ("opencv", "opencv must be a video file"),
        ("opncv:0", "unknown camera type 'opncv'; did you mean 'opencv'"),
    ],
)
def test_what_is_no_camera_is_one_sentence(extractor, text, message):
    with pytest.raises(UserError, match=f"^{message}") as raised:
        open_source(text, extractor)
    assert "\n" not in str(raised.value)


def test_a_camera_in_simulation_needs_an_end(made, tmp_path, monkeypatch):
    source = VideoSource(str(made / "demo.mp4"), FPS)
    source.endless = True
    monkeypatch.setattr(imitate, "open_source", lambda *_: source)
    assert "a camera in simulation must have a limit" in refused(*live(made, "ground", tmp_path / "out"))
