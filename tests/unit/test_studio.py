"""What the studio's pages show and do, without a browser."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import ok, refused
from latentact.errors import UserError
from latentact.guidance.guide import Guide
from latentact.io.video_writer import write_video
from latentact.lams.models.laom import LaomConfig
from latentact.lams.models.lapo import LapoConfig
from latentact.quantizers.fsq import FsqConfig
from latentact.quantizers.none import WhitenedConfig
from latentact.stages import studio
from latentact.stages.studio import StudioConfig
from latentact.studio import drive, edit, look, meaning
from latentact.studio.live import TakeSource, live, open_live
from latentact.studio.meaning import Survey, galleries, local_survey, survey
from latentact.studio.pages import PALETTE, groups_html
from latentact.studio.workspace import find_env, find_lam, find_policy, imagine, in_thread
from toy_studio import SHAPE, save_lam, save_policy, write_pusht

ROOT = Path(__file__).parents[2]


def finished(work):
    """Return the result of a computation."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


@pytest.fixture(scope="module")
def lams(tmp_path_factory):
    root = tmp_path_factory.mktemp("studio")
    save_lam(root / "codes", LapoConfig(**SHAPE, bottleneck=FsqConfig(positions=1, levels=(3, 3))))
    config = LapoConfig(**SHAPE, bottleneck=WhitenedConfig(dim=4))
    spec = save_lam(root / "continuous", config, camera="observation.images.top").spec
    save_policy(root / "guided", spec)
    return root


@pytest.fixture
def work(lams, blocks, tmp_path):
    config = StudioConfig(run=str(lams / "codes"), data=str(blocks), out=str(tmp_path / "out"))
    return studio.open_workspace(config)


@pytest.fixture
def pusht(lams, tmp_path):
    """A workspace without data, but with a policy and an environment."""
    flags = {"policy": str(lams / "guided"), "env": "pusht", "out": str(tmp_path / "out")}
    return studio.open_workspace(StudioConfig(run=str(lams / "continuous"), **flags))


@pytest.fixture
def video(blocks, tmp_path):
    write_video(tmp_path / "a.mp4", np.load(blocks)["obs"][:12], 10)
    return tmp_path / "a.mp4"


def hand_made(actions, group, names):
    """Return a survey of transitions with these actions and groups."""
    actions, group = np.array(actions), np.array(group)
    n = len(group)
    return Survey(
        rows=np.arange(n),
        vectors=np.zeros((n, 1, 2), np.float32),
        episode=np.zeros(n, np.int64),
        gap=1,
        centers=np.array([[[0, 0]], [[1, 1]]], np.float32),
        codes=None,
        group=group,
        mean=np.zeros(2, np.float32),
        axes=np.zeros((3, 2), np.float32),
        actions=actions,
        known=np.ones(n, bool),
        action_names=names,
        probe=None,
        floor=0.0,
    )


# --- what does it mean


def test_words_of_discrete_actions_are_their_shares():
    found = hand_made([0] * 8 + [1, 2] + [2] * 4, [0] * 10 + [1] * 4, ("left", "right", "forward"))
    assert found.words(0) == "left 0.8, right 0.1, forward 0.1"
    assert found.words(1) == "forward 1.0"


def test_words_of_continuous_actions_are_means_in_standard_deviations():
    found = hand_made([[2.0, 1], [2, -1], [-2, 1], [-2, -1]], [0, 0, 1, 1], ("x", "y"))
    assert (found.words(0), found.words(1)) == ("+x 1.0", "-x 1.0")
    assert hand_made([[2.0, 1], [-2, -1]], [0, 0], ("x", "y")).words(0) == "no clear direction"


def test_words_need_labels():
    found = replace(hand_made([0, 1], [0, 1], ("a", "b")), actions=None)
    assert (found.words(0), found.trust) == ("", "")


def test_the_survey_has_a_group_per_code(work):
    found = finished(survey(work))
    assert found.codes is not None
    assert len(found.codes) == len(found.centers) == found.group.max() + 1
    assert (np.diff(np.bincount(found.group)) <= 0).all()
    np.testing.assert_array_equal(found.nearest(found.vectors), found.group)
    np.testing.assert_allclose(found.centers[found.group], found.vectors, atol=1e-6)
    spread = found.components(found.vectors)
    used = np.abs(found.axes).sum(1) > 0
    np.testing.assert_allclose(spread[:, used].std(0), 1, atol=1e-3)
    assert "accuracy" in found.trust
    html = groups_html(found, finished(galleries(work, found)))
    assert html.count("<h3>") == len(found.codes)
    assert "applied to other scenes" in html


def test_a_lam_without_codes_is_clustered(lams, blocks):
    work = studio.open_workspace(StudioConfig(run=str(lams / "continuous"), data=str(blocks)))
    found = finished(survey(work))
    assert (found.codes, len(found.centers)) == (None, meaning.CLUSTERS)


def test_a_lam_that_predicts_features_has_the_pages_but_no_predictions(blocks, tmp_path):
    config = LaomConfig(size=32, backbone="patch", channels=(8,), hidden=16, bottleneck=WhitenedConfig(dim=4))
    save_lam(tmp_path / "lam", config)
    work = studio.open_workspace(StudioConfig(run=str(tmp_path / "lam"), data=str(blocks)))
    found, take = finished(survey(work)), work.episode(0)
    page = finished(look.look(work, take, found))
    assert (page["predicted"], page["error"]) == (None, None)
    assert "applied to" not in groups_html(found, finished(galleries(work, found)))
    with pytest.raises(UserError, match="must predict frames"):
        finished(imagine(work, take.frames[0], take.guide))
    with pytest.raises(UserError, match="must predict frames"):
        drive.Driver(work, found, drive.BY[0], take.frames[0], 0)


def test_colors_are_the_same_in_both_languages():
    script = (ROOT / "src/latentact/studio/studio.js").read_text()
    assert json.loads(f"[{script.split('const PALETTE = [')[1].split(',\n  ];')[0]}]") == [*PALETTE]


# --- look


def test_look_shows_each_transition(work):
    take, found = work.episode(1), finished(survey(work))
    page = finished(look.look(work, take, found))
    n = len(take.guide)
    assert n == len(take.frames) - 1 == len(page["facts"]) == len(page["error"])
    assert page["predicted"]["n"] == n
    assert page["texts"] == [str(code) for code in take.guide.codes[:, 0]]
    change = np.square((take.frames[1:].astype(float) - take.frames[:-1]) / 255).mean((1, 2, 3))
    np.testing.assert_allclose(page["copy"], change, atol=1e-5)
    recorded = found.action_name(int(take.labels[2]))
    assert f"recorded action: {recorded}" in page["facts"][2]
    assert "Saliency of step 3" in finished(look.detail(work, take, found, 3))


def test_saliency_finds_the_cell_that_matters(work, monkeypatch):
    take = work.episode(0)

    def corner(frames, valid, states=None):
        return frames[:, -1, 4:8, 8:12].reshape(len(frames), 1, -1).astype(np.float32), None, None

    monkeypatch.setattr(work.lam, "encode_last", corner)
    response = finished(look.saliency(work, take, np.array([5])))[0]
    expected = np.zeros((8, 8))
    expected[1, 2] = 1
    np.testing.assert_array_equal(response, expected)


def test_imagined_frames_follow_the_guide(work, monkeypatch):
    """Forward dynamics that adds the latent action to the frame, at a gap of two frames."""

    def add(past, vectors):
        return past[:, -1] + vectors.sum((1, 2)).byte()[:, None, None, None]

    monkeypatch.setattr(work.model, "predict", add)
    take = work.episode(0)
    vectors = np.arange(1, 6, dtype=np.float32).reshape(5, 1, 1).repeat(2, 2) / 2
    guide = replace(take.guide, vectors=vectors, continuous=vectors, codes=None, fps=20.0)
    shown = finished(imagine(work, np.zeros((32, 32, 3), np.uint8), guide))
    assert shown[:, 0, 0, 0].tolist() == [0, 1, 1, 4, 4, 9]


def test_a_video_is_read_at_the_rate_of_the_lam(work, video):
    take = work.video(video, "mine.mp4")
    assert (len(take.frames), take.fps, take.episode) == (12, 10.0, None)
    assert len(local_survey(take.guide, 1).group) == 11


def test_a_broken_video_is_one_sentence_without_its_place(work, tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no video" * 99)
    with pytest.raises(UserError, match=r"^mine\.mp4 cannot be read") as error:
        work.video(tmp_path / "x.mp4", "mine.mp4")
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("number", [-1, 8, 10**9])
def test_unknown_episodes_are_refused(work, number):
    with pytest.raises(UserError, match="must be one of 8"):
        work.episode(number)


# --- edit


def test_operations_are_those_of_guides(work):
    a, b = (work.episode(i).guide for i in (0, 1))
    part = range(2, 5)
    expected = {
        "slice": a.slice(2, 5),
        "replace": a.replace(part, b),
        "scale": a.scale(0.5),
        "set code": a.set_code(part, 1),
        "time warp": a.time_warp(0.5),
        "smooth": a.smooth(3),
        "interpolate": a.interpolate(b, 0.5),
        "blend": Guide.blend([a, b], [0.5, 0.5]),
        "concat": a.concat(b, 2),
    }
    numbers = {"smooth": 3.0, "concat": 2.0}
    assert expected.keys() == edit.OPERATIONS.keys()
    for name, guide in expected.items():
        made = edit.apply(a, name, part, numbers.get(name, 0.5), "1", b)
        np.testing.assert_array_equal(made.continuous, guide.continuous)
        assert made.provenance == guide.provenance


@pytest.mark.parametrize(
    ("operation", "number", "code", "message"),
    [
        ("explode", 1, "", "must be one of"),
        ("concat", 1, "", "needs another guide"),
        ("smooth", 2.5, "", "must be whole"),
        ("scale", float("nan"), "", "must be finite"),
        ("set code", 0, "9", "must be one or 1 integers"),
        ("set code", 0, "-1", "must be whole numbers"),
        ("slice", 0, "", "must be a range"),
    ],
)
def test_bad_operations_are_one_sentence(work, operation, number, code, message):
    steps = range(5, 2) if operation == "slice" else range(1, 2)
    with pytest.raises(UserError, match=message):
        edit.apply(work.episode(0).guide, operation, steps, float(number), code, None)


def test_versions_can_be_undone_and_redone(work):
    first = edit.draft(work.episode(0))
    second = first.edited(first.guide.scale(0.5))
    assert second.moved(-1).guide is first.guide
    assert second.moved(-1).moved(1).guide is second.guide
    assert second.moved(1).current == 1
    branched = second.moved(-1).edited(first.guide.slice(0, 3))
    assert [len(guide) for guide in branched.versions] == [11, 3]


def test_saved_guides_are_listed_and_loaded(work):
    drawn = edit.draft(work.episode(0))
    drawn = replace(drawn, imagined=np.zeros((12, 32, 32, 3), np.uint8))
    files = edit.save(work, drawn, "my guide-1")
    assert [path.relative_to(work.out).as_posix() for path in files] == [
        "guides/my guide-1.safetensors",
        "videos/my guide-1.mp4",
    ]
    assert edit.saved(work) == ["my guide-1"]
    np.testing.assert_array_equal(edit.load(work, "my guide-1").codes, drawn.guide.codes)
    found = {path.name for path in work.out.rglob("*") if path.is_file()}
    assert found == {"my guide-1.safetensors", "my guide-1.mp4"}


@pytest.mark.parametrize("name", ["", "../x", "a/b", "/tmp/x", ".hidden", "x" * 61, "a\n", "ü"])
def test_names_that_leave_the_folder_are_refused(work, name):
    with pytest.raises(UserError, match="the name must be"):
        edit.save(work, edit.draft(work.episode(0)), name)
    with pytest.raises(UserError, match="no saved guide"):
        edit.load(work, name)
    assert not work.out.exists()


def test_links_out_of_the_folder_are_not_followed(work, tmp_path):
    work.episode(0).guide.save(tmp_path / "secret.safetensors")
    edit.guides_folder(work).mkdir(parents=True)
    (edit.guides_folder(work) / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(UserError, match="no saved guide"):
        edit.load(work, "link")


def test_a_policy_follows_the_guide(pusht, video):
    take = pusht.video(video, "a")
    rollout = finished(edit.follow(pusht, take.guide, seed=3))
    assert len(rollout.frames) == len(take.guide) + 1
    assert "11 steps, no success" in rollout.summary()
    drawn = replace(edit.draft(take), rollout=rollout, imagined=take.frames)
    assert edit.side_by_side(drawn).shape == (12, 32, 96, 3)
    assert [label for label, _ in edit.page(drawn, local_survey(take.guide, 1))["films"]] == [
        *("demonstration", "guide, imagined", "rollout of the policy")
    ]


def test_a_rollout_needs_a_policy(work):
    with pytest.raises(UserError, match="got no policy"):
        finished(edit.follow(work, work.episode(0).guide, 0))


def test_a_closed_computation_stops():
    steps, stopped = threading.Semaphore(0), threading.Event()

    def endless(step):
        try:
            while steps.acquire():
                step()
        finally:
            stopped.set()

    computation = in_thread("counting", 0, endless)
    steps.release(2)
    assert [next(computation).done, next(computation).done] == [1, 2]
    computation.close()
    steps.release()
    assert stopped.wait(10)


def test_errors_of_the_thread_are_raised():
    def fails(step):
        step()
        raise UserError("the reason")

    with pytest.raises(UserError, match="the reason"):
        finished(in_thread("failing", 0, fails))


# --- drive and live


def test_driving_steps_forward_dynamics(work, monkeypatch):
    monkeypatch.setattr(work.model, "predict", lambda past, vectors: past[:, -1] + 1)
    found = finished(survey(work))
    driver = drive.Driver(work, found, drive.BY[0], np.zeros((32, 32, 3), np.uint8), 0)
    driver.press(0)
    driver.press(len(found.centers) - 1)
    page = driver.page()
    assert (page["steps"], page["real"]) == (2, None)
    assert len(page["controls"]) == len(found.centers)
    assert driver._past[-1].max() == 2
    with pytest.raises(UserError, match="the button must be"):
        driver.press(99)


def test_robot_actions_are_buttons_too(work):
    found = finished(survey(work))
    buttons = drive.controls(found, drive.BY[1])
    assert [each.action for each in buttons] == [0, 1, 2, 3]
    assert all((each.vectors == found.centers[each.group]).all() for each in buttons)
    with pytest.raises(UserError, match="needs labeled transitions"):
        drive.controls(replace(found, actions=None), drive.BY[1])


def test_the_probe_decodes_what_it_was_fitted_on():
    rng = np.random.default_rng(0)
    found = hand_made(rng.integers(0, 2, 50), np.zeros(50, int), ("a", "b"))
    vectors = np.stack([found.actions * 2.0 - 1, rng.normal(size=50)], 1)[:, None].astype(np.float32)
    weights = drive.probe_weights(replace(found, vectors=vectors))
    scores = np.concatenate([vectors[:, 0], np.ones((50, 1))], axis=1) @ weights
    np.testing.assert_array_equal(scores.argmax(1), found.actions)


def test_driving_an_environment(pusht, video):
    """A guided policy is no decoder, and there are no labels: only forward dynamics moves."""
    found = local_survey(pusht.video(video, "a").guide, 1)
    driver = drive.Driver(pusht, found, drive.BY[0], None, 0)
    driver.press(0)
    assert "cannot be decoded" in driver.note
    driver.follow_reality()
    driver.close()


def test_driving_an_environment_by_labels(lams, tmp_path):
    write_pusht(tmp_path / "data.npz")
    flags = {"data": str(tmp_path / "data.npz"), "env": "pusht"}
    work = studio.open_workspace(StudioConfig(run=str(lams / "continuous"), **flags))
    found = finished(survey(work))
    for by, buttons in ((drive.BY[0], meaning.CLUSTERS), (drive.BY[1], 4)):
        driver = drive.Driver(work, found, by, None, 0)
        for i in range(buttons):
            driver.press(i)
        assert "robot action" in driver.page()["facts"]
        driver.close()


def test_live_streams_latent_actions(work):
    take = work.episode(0)
    pages = [*live(work, TakeSource(take), 0, 0.5)]
    assert "5 frames captured, 0 dropped" in pages[-1]
    assert "capture to latent" in pages[-1]


def test_the_camera_of_the_page_is_that_of_the_flag(work, video):
    with pytest.raises(UserError, match="there is no camera"):
        open_live(work, None, camera=True)
    with pytest.raises(UserError, match="no demonstration to play"):
        open_live(work, None, camera=False)
    *_, last = live(work, open_live(replace(work, live=str(video)), None, camera=True), 0, 0.4)
    assert "4 frames captured" in last


def test_live_policies_follow(pusht, video):
    take = pusht.video(video, "a")
    *_, last = live(pusht, TakeSource(take), 0, 5.0)
    assert "capture to action" in last
    with pytest.raises(UserError, match="seconds must be"):
        next(live(pusht, TakeSource(take), 0, float("nan")))


# --- what a run has


def test_the_lam_policy_and_environment_of_a_run_are_found(lams, tmp_path):
    for name in ("compare/seed0/idm/lam", "compare/seed0/latent/lam"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(lams / "codes")
    lam = save_lam(tmp_path / "b/lam", LapoConfig(**SHAPE, bottleneck=WhitenedConfig(dim=4)))
    save_policy(tmp_path / "b/guided", lam.spec)
    (tmp_path / "compare/config.yaml").write_text("env: pusht\n")
    assert find_lam(str(tmp_path)) == str(tmp_path / "b/lam")
    assert find_policy(str(tmp_path), find_lam(str(tmp_path))) == str(tmp_path / "b/guided")
    assert find_env(str(tmp_path)) == "pusht"
    assert find_lam(str(lams / "codes")) == str(lams / "codes")


def test_flags_are_checked(lams, blocks, tmp_path):
    lam = str(lams / "codes")
    assert "--token is required with --host 0.0.0.0" in refused("studio", lam, "--host", "0.0.0.0")
    assert "at least 8 letters and digits" in refused("studio", lam, "--token", "a b")
    assert "needs data" in refused("studio", lam, "--export", tmp_path / "site")
    assert "must be a folder" in refused("studio", lam, "--export", blocks)
    flags = ("studio", lam, "--data", blocks, "--export", tmp_path / "site")
    assert "no_policy" in refused(*flags, "--policy", tmp_path / "no_policy")
    assert "no_env" in refused(*flags, "--env", "no_env")
    assert "is not a published" in refused("studio", tmp_path, "--export", tmp_path / "site")


def test_a_missing_extra_is_one_sentence(lams, monkeypatch):
    monkeypatch.setattr(studio.importlib.util, "find_spec", lambda name: None)
    assert refused("studio", lams / "codes").endswith("pip install 'latentact[studio]'.")


def test_the_exported_page_is_one_small_file(lams, blocks, tmp_path):
    done = ok("studio", lams / "codes", "--data", blocks, "--export", tmp_path / "site")
    page = tmp_path / "site/index.html"
    assert [*page.parent.iterdir()] == [page]
    assert str(page) in done.stdout
    html = page.read_text()
    assert page.stat().st_size < 1_000_000
    assert "default-src 'none'" in html
    assert "http://" not in html
    assert "https://" not in html
