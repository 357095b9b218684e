"""`latentact imitate`: a policy follows one video, in simulation and on the simulated robot."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
import yaml

from conftest import cli, ok, refused
from latentact.envs.spec import make_env
from latentact.guidance.extractor import LatentActionExtractor
from latentact.guidance.inference import Guide, LatentGuidedInference
from latentact.io.video_writer import write_video
from latentact.lams.models.lapo import LapoConfig
from latentact.policies.contract import Policy
from latentact.policies.decoder import DecoderConfig
from latentact.policies.guided import GuidedConfig
from latentact.policies.latent import LatentConfig
from latentact.policies.network import NetworkConfig
from latentact.policies.spec import PolicySpec, Target
from latentact.quantizers.none import WhitenedConfig
from latentact.robots import setup
from latentact.stages import check_guidance
from latentact.types import ActionSpace
from toy_lerobot import SMALL

SAFETY = {"limits": {"x": [0, 512], "y": [0, 512]}, "max_step": {"x": 25, "y": 25}, "stale_s": 5.0}
SEEN = {
    "observation.state": np.zeros(2, np.float32),
    "observation.images.top": np.zeros((64, 64, 3), np.uint8),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A LAM, a grounded and a guided policy for PushT, none of them trained, and a video of random moves."""
    root = tmp_path_factory.mktemp("imitate")
    lam = small_lam(root / "lam", seed=0)
    spec, pusht = lam.spec, ActionSpace(kind="continuous", size=2)
    network = NetworkConfig(backbone="patch", patch=4, channels=(16,), use_state=True)
    about = {"resolution": 32, "state_size": 2, "fps": 10.0, "camera": "observation.images.top"}
    target = Target(kind="continuous", size=4)
    latent = LatentConfig(network=network).build(PolicySpec(target=target, **about), spec)
    latent.save_pretrained(root / "latent")
    grounded = latent.ground(DecoderConfig(use_state=True), pusht)
    actions = np.array([[200.0, 200.0], [300.0, 300.0]], np.float32)
    assert grounded.decoder is not None
    grounded.decoder.set_action_stats(actions)
    grounded.save_pretrained(root / "ground")
    config = GuidedConfig(network=network)
    about |= {
        "target": Target(kind="continuous", size=2),
        "action_space": pusht,
        "guide": config.targets(spec, pusht).guide,
    }
    guided = config.build(PolicySpec(**about), spec)
    guided.set_action_stats(actions, None)
    guided.save_pretrained(root / "guided")
    env = make_env("pusht")
    frames = [env.reset(seed=0)[0]["pixels"]]
    moves = np.random.default_rng(0).uniform(100, 400, (15, 2)).astype(np.float32)
    frames += [env.step(move)[0]["pixels"] for move in moves]
    write_video(root / "demo.mp4", np.stack(frames), 10)
    ok("imitate", *flags(root, "extract_only"), "--output-dir", root / "latents")
    return root


def small_lam(folder, seed):
    torch.manual_seed(seed)
    bottleneck = WhitenedConfig(dim=4)
    config = LapoConfig(
        backbone="patch", size=32, patch=4, idm_channels=(8,), fdm_channels=(8,), bottleneck=bottleneck
    )
    model = config.build()
    model.spec = replace(model.spec, frame_gap_s=0.1, fps=10.0, camera="observation.images.top")
    model.save_pretrained(folder)
    return model


def flags(root, mode="simulation", policy="ground"):
    given = ("--mode", mode, "--lam-model-path", root / "lam", "--video-path", root / "demo.mp4")
    return given if mode == "extract_only" else (*given, "--policy-path", root / policy)


def robot_file(path, safety=SAFETY, **robot):
    settings = {"type": "pusht_sim", "calibration_dir": str(path.parent / "calibration"), **robot}
    path.write_text(yaml.safe_dump({"robot": settings, "safety": safety}))
    return path


def test_extract_only_writes_the_guide(made):
    guide = Guide.load(made / "latents")
    values = torch.load(made / "latents/latents.pt", weights_only=True)["latent_actions"]
    assert values.shape == (15, 1, 4)
    assert guide.timestamps[-1] == pytest.approx((len(guide) - 1) / 10)
    assert json.loads((made / "lam/spec.json").read_text())["weights"] == guide.spec.weights
    assert {path.name for path in (made / "latents").iterdir()} == {"latents.pt", "latents.safetensors"}


@pytest.mark.parametrize(("policy", "env"), [("ground", "PushT-v0"), ("guided", "gym_pusht/PushT-v0")])
def test_simulation(made, tmp_path, policy, env):
    out = tmp_path / "out"
    done = ok(
        "imitate", *flags(made, policy=policy), "--env-name", env, "--output-dir", out, "--max-steps", "12"
    )
    assert "The rollout" in done.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["steps"], metrics["end"], metrics["ended"], metrics["success"]) == (
        12,
        "max_steps",
        "the maximum number of steps was reached",
        False,
    )
    assert (metrics["fps"], metrics["guide"]["fps"], metrics["config"]["seed"]) == (10, 10, 0)
    assert metrics["return"] >= 0
    assert len(metrics["agreement"]["steps"]) == 12
    assert np.mean(metrics["agreement"]["steps"]) == pytest.approx(metrics["agreement"]["mean"], abs=1e-4)
    with av.open(str(out / "imitation.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 13
    assert frames[0].shape[1] == 2 * frames[0].shape[0]
    page, _, scripts = (out / "report.html").read_text().partition("</footer>")
    assert "The rollout" in page
    assert "data:video/mp4" in page
    assert not re.search(r"(src|href)=\"https?:", page)
    assert "Plotly" in scripts


def test_the_guide_ends_the_rollout_and_frames_can_be_left_out(made, tmp_path):
    given = (*flags(made), "--output-dir", tmp_path)
    ok("imitate", *given, "--max-frames", "6", "--no-save-video")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["steps"], metrics["end"], metrics["ended"]) == (5, "guide_end", "the guide ended")
    assert not (tmp_path / "imitation.mp4").exists()
    assert '<img src="data:image/png' in (tmp_path / "report.html").read_text()
    ok("imitate", *given, "--max-frames", "6", "--no-render", "--fps", "20", "--control-time-s", "0.4")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["steps"], metrics["fps"]) == (8, 20)  # 0.4 s of 20 steps; the guide lasts 0.5 s
    assert '<img src="data:image/png' not in (tmp_path / "report.html").read_text()


def test_the_policy_acts_alone_after_the_guide(made, tmp_path):
    given = (*flags(made, policy="guided"), "--output-dir", tmp_path, "--max-frames", "6")
    ok("imitate", *given, "--extra-steps", "3")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["steps"], metrics["end"]) == (8, "guide_end")
    assert len(metrics["agreement"]["steps"]) == 5
    with av.open(str(tmp_path / "imitation.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 9
    live = ("imitate", "--live", made / "demo.mp4", "--lam-model-path", made / "lam")
    message = refused(*live, "--policy-path", made / "guided", "--output-dir", tmp_path, "--extra-steps", "3")
    assert "--extra-steps must be 0 with --live, got 3" in message


def test_saved_latents_do_as_well_as_the_video(made, tmp_path):
    common = ("imitate", "--policy-path", made / "ground", "--max-steps", "6", "--no-render", "--seed", "3")
    ok(*common, "--latents-path", made / "latents", "--output-dir", tmp_path / "a")
    lam = ("--lam-model-path", made / "lam")
    ok(*common, *lam, "--video-path", made / "demo.mp4", "--output-dir", tmp_path / "b")
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab")
    assert a["agreement"] is None
    assert b["agreement"]["measure"] == "cosine"
    assert [a[key] for key in ("return", "steps", "ended")] == [
        b[key] for key in ("return", "steps", "ended")
    ]


def test_the_decoder_alone_acts(made):
    """A grounded policy that follows a guide decodes the guide's latent action and the state."""

    inference = LatentGuidedInference(made / "ground", made / "latents")
    guide, policy = inference.guide, Policy.from_pretrained(made / "ground")
    state = np.array([100.0, 200.0], np.float32)
    for step in range(3):
        latent = torch.from_numpy(guide.continuous[step].reshape(1, 1, -1).copy())
        scores = policy.decoder(
            (latent - policy.mean) / policy.std, policy.normal_state(torch.from_numpy(state)[None])
        )
        expected = policy.decoder.unnormalize(scores)[0, 0].detach().numpy()
        np.testing.assert_allclose(
            inference.predict_action({"observation.state": state}), expected, rtol=1e-5
        )


def write_lerobot_policy(made, folder, kind):
    """Write a policy of the plugin that was not trained, whose chunks have four actions."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies import get_policy_class, make_policy_config, make_pre_post_processors
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()

    def feature(kind, *shape):
        return PolicyFeature(type=FeatureType[kind], shape=shape)

    torch.manual_seed(0)
    config = make_policy_config(
        kind,
        input_features={
            "observation.state": feature("STATE", 2),
            "observation.images.top": feature("VISUAL", 3, 64, 64),
            "observation.lam_tokens": feature("STATE", 4),
        },
        output_features={"action": feature("ACTION", 2)},
        lam_num_learned_tokens=1,
        lam_action_latent_dim=4,
        lam_weights=LatentActionExtractor(made / "lam", 0, "cpu").model.spec.weights,
        **SMALL[kind.removeprefix("lam_")],
        **{"pretrained_backbone_weights": None, "device": "cpu"},
    )
    stats = {
        key: {name: torch.full(size, value) for name, value in (("mean", 0.0), ("std", 1.0))}
        | {name: torch.full(size, value) for name, value in (("min", -1.0), ("max", 1.0))}
        for key, size in (
            *(("observation.state", (2,)), ("action", (2,))),
            ("observation.images.top", (3, 1, 1)),
        )
    }
    get_policy_class(kind)(config).save_pretrained(folder)
    for part in make_pre_post_processors(config, dataset_stats=stats):
        part.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["lam_act", "lam_diffusion"])
def test_a_lerobot_policy_follows(made, tmp_path, kind):
    write_lerobot_policy(made, tmp_path / "policy", kind)
    given = (*flags(made), "--policy-path", tmp_path / "policy", "--max-steps", "4", "--no-render")
    ok("imitate", *given, "--output-dir", tmp_path / "out")
    assert json.loads((tmp_path / "out/metrics.json").read_text())["steps"] == 4
    guide = Guide.load(made / "latents")
    inference = LatentGuidedInference(tmp_path / "policy", guide)
    batch = inference.prepare_batch(SEEN, inference.get_next_latent_action())
    np.testing.assert_array_equal(batch["observation.lam_tokens"][0, 0], guide.continuous[0].ravel())
    values = json.loads((tmp_path / "policy/config.json").read_text())
    for change, message in (
        ({"lam_weights": "other"}, "LAM of weights other"),
        ({"use_lam_conditioning": False}, "is not conditioned on latent actions"),
        ({"type": "lam_dream"}, "policy type 'lam_dream', which no installed package provides"),
    ):
        (tmp_path / "policy/config.json").write_text(json.dumps({**values, **change}))
        assert message in refused("imitate", *given, "--output-dir", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["lam_act", "lam_diffusion"])
def test_a_lerobot_policy_reads_its_guide_before_every_action(made, tmp_path, kind):
    write_lerobot_policy(made, tmp_path, kind)
    guide = Guide.load(made / "latents")
    changed = guide.continuous.copy()
    changed[2] += 10

    def act(guide):
        inference = LatentGuidedInference(tmp_path, guide)
        torch.manual_seed(0)  # diffusion begins from noise
        return [inference.predict_action(SEEN) for _ in range(4)]

    same = [
        np.allclose(*pair) for pair in zip(act(guide), act(replace(guide, continuous=changed)), strict=True)
    ]
    assert same[:3] == [True, True, False]


def test_the_simulated_robot_follows(made, tmp_path):
    file = robot_file(tmp_path / "robot.yaml", seed=2)
    given = (*flags(made, "robot"), "--robot-config", file, "--output-dir", tmp_path / "out")
    ok("imitate", *given, "--control-time-s", "0.8")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (metrics["commands"], metrics["end"], metrics["disconnected"]) == (8, "max_steps", True)
    assert metrics["ended"] == "the maximum number of steps was reached"
    assert metrics["without_limits"] == []
    assert set(metrics) >= {
        "missed_deadlines",
        "latest_s",
        "holds",
        "events",
        "clipped",
        "refused",
        "seconds",
    }
    assert len(metrics["agreement"]["steps"]) == 7
    page = (tmp_path / "out/report.html").read_text()
    assert "The robot was disconnected." in page
    assert (tmp_path / "out/imitation.mp4").exists()


@pytest.mark.parametrize("fault", ["block", "nan"])
def test_a_robot_that_fails_ends_with_one_sentence(made, tmp_path, fault, monkeypatch):
    quick = {**SAFETY, "stale_s": 0.3, "stop_after_s": 0.4}
    file = robot_file(tmp_path / "robot.yaml", safety=quick, fault=fault, fault_after=4)
    robots, own = [], setup.make_robot
    monkeypatch.setattr("latentact.stages.imitate.make_robot", lambda s: robots.append(own(s)) or robots[0])
    message = refused(
        "imitate",
        *flags(made, "robot"),
        "--robot-config",
        file,
        "--output-dir",
        tmp_path / "out",
        "--no-render",
    )
    assert "the robot pusht_sim was held still for" in message
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["commands"] <= 4
    assert metrics["ended"] == message.removeprefix("error: ")
    assert metrics["disconnected"]
    assert not robots[0].is_connected
    last = robots[0].sent[metrics["commands"] - 1 :]
    assert all(command == last[0] for command in last)
    assert (tmp_path / "out/report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "must be exactly one of --video-path, --guide and --live, got none"),
        (("--video-path", "a.mp4"), "--lam-model-path must be the LAM"),
        (("--latents-path", "{root}/latents"), "--policy-path must be a policy"),
        (("--latents-path", "{root}/lam", "--policy-path", "{root}/ground"), "is missing"),
        (("--latents-path", "{root}/latents", "--policy-path", "{root}/latent"), "Ground it first"),
        (("--latents-path", "{root}/latents", "--policy-path", "{root}/lam"), "must be a policy"),
        (
            ("--latents-path", "{root}/latents", "--policy-path", "{root}/ground", "--mode", "robot"),
            "--robot-config must be the YAML file",
        ),
        (
            ("--latents-path", "{root}/latents", "--policy-path", "{root}/ground", "--env-name", "PushTT-v0"),
            "unknown environment 'PushTT-v0'",
        ),
        (
            (
                *("--latents-path", "{root}/latents", "--policy-path", "{root}/ground"),
                *("--env-name", "babyai/GoToLocal"),
            ),
            "has a 2-D continuous action, but babyai/GoToLocal expects one of 7 discrete actions",
        ),
        (
            ("--latents-path", "{root}/latents", "--policy-path", "{root}/ground", "--fps", "5"),
            "--time-base hold would skip some",
        ),
        (("--mode", "dream", "--latents-path", "a"), "got 'dream'"),
    ],
)
def test_invalid_input_is_one_sentence(made, tmp_path, arguments, message):
    given = [str(argument).format(root=made) for argument in arguments]
    assert message in refused("imitate", *given, "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_guide_of_another_lam_is_refused(made, tmp_path):
    small_lam(tmp_path / "lam", seed=1)
    given = ("imitate", "--policy-path", made / "ground", "--output-dir", tmp_path / "out")
    video = ("--video-path", made / "demo.mp4", "--lam-model-path", tmp_path / "lam")
    assert "weights of the latent actions must be the same in the policy and the guide" in refused(
        *given, *video
    )
    saved = ("--latents-path", made / "latents", "--lam-model-path", tmp_path / "lam")
    assert "got other weights" in refused(*given, *saved)


@pytest.fixture(scope="module")
def guides(made):
    """A second guide, as one file, and its video; the first is the folder `latents`."""
    with av.open(str(made / "demo.mp4")) as video:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    write_video(made / "other.mp4", frames[::-1][:10], 10)
    extract = (*flags(made, "extract_only"), "--video-path", made / "other.mp4", "--blend", "0,1")
    ok("imitate", *extract, "--output-dir", made / "other")
    return made / "latents", made / "other/latents.safetensors"


def test_guides_are_edited_blended_and_joined(made, guides, tmp_path):
    a, b = map(Guide.load, guides)
    assert (len(a), len(b)) == (15, 9)
    out = tmp_path / "x.safetensors"
    done = ok("guide", "edit", guides[0], "--apply", "slice=2:8", "--apply", "scale=0.5", "--out", out)
    edited = Guide.load(out)
    np.testing.assert_array_equal(edited.continuous, a.slice(2, 8).scale(0.5).continuous)
    assert edited.provenance == (f"extract {made / 'demo.mp4'}", "slice 2:8", "scale 0.5")
    assert "6 latent actions (0.6 s) of lapo, 1 x 4 values over 0.1 s" in done.stdout
    ok("guide", "edit", out, "--apply", f"replace=0:2,{guides[1]}", "--apply", "time_warp=2", "--out", out)
    assert len(Guide.load(out)) == 7  # (6 - 2 + 9) / 2, rounded
    ok("guide", "blend", *guides, "--weights", "1,3", "--out", tmp_path / "folder")
    np.testing.assert_array_equal(
        Guide.load(tmp_path / "folder/latents.pt").vectors, Guide.blend([a, b], [1.0, 3.0]).vectors
    )
    found = json.loads(ok("guide", "concat", *guides, "--transition", "4", "--out", out, "--json").stdout)
    assert (found["path"], found["guides"][0]["latent_actions"]) == (str(out), 15 + 4 + 9)
    found = json.loads(ok("guide", "info", *guides, "--json").stdout)
    assert [guide["seconds"] for guide in found["guides"]] == [1.5, 0.9]


def test_imitate_follows_an_edited_guide_and_a_blend_of_videos(made, guides, tmp_path):
    out, act = tmp_path / "out", ("--policy-path", made / "ground", "--output-dir")
    ok("guide", "edit", guides[0], "--apply", "slice=0:5", "--out", tmp_path / "x.safetensors")
    ok("imitate", "--guide", tmp_path / "x.safetensors", *act, out, "--no-render")
    assert json.loads((out / "metrics.json").read_text())["steps"] == 5
    videos = ("--video-path", made / "demo.mp4", "--video-path", made / "other.mp4", "--blend", "0.5,0.5")
    ok("imitate", *videos, "--lam-model-path", made / "lam", *act, out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["steps"], metrics["guide"]["latent_actions"]) == (12, 12)
    assert metrics["guide"]["provenance"] == [
        f"blend 0.5 (extract {made / 'demo.mp4'}) + 0.5 (extract {made / 'other.mp4'})"
    ]
    assert Guide.load(out).provenance == tuple(metrics["guide"]["provenance"])
    with av.open(str(out / "imitation.mp4")) as video:
        frame = next(video.decode(video=0))
    assert frame.width == 3 * frame.height  # demonstration, demonstration, rollout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("guide", "shout", "{a}"), "ACTION must be info, edit, blend or concat, got 'shout'"),
        (("guide", "info"), "PATHS must name at least one guide"),
        (("guide", "info", "{a}", "--out", "{out}"), "--out must be empty for info"),
        (("guide", "edit", "{a}", "--out", "{out}"), "edit needs one guide and --apply"),
        (("guide", "edit", "{a}", "--apply", "flip=1", "--out", "{out}"), "unknown operation 'flip'"),
        (("guide", "edit", "{a}", "--apply", "slice=3", "--out", "{out}"), "slice must look like slice=3:40"),
        (("guide", "edit", "{a}", "--apply", "slice=0:99", "--out", "{out}"), "the 15 steps of the guide"),
        (("guide", "edit", "{a}", "--apply", "replace=0:1,no", "--out", "{out}"), "no is missing"),
        (("guide", "edit", "{a}", "--apply", "set-code=0:1,0", "--out", "{out}"), "needs a guide with codes"),
        (
            ("guide", "edit", "{a}", "--apply", "scale=1", "--out", "x.json"),
            "must be a file *.safetensors or",
        ),
        (("guide", "info", "{a}", "--weights", "1"), "--weights must be empty for info"),
        (("guide", "blend", "{a}", "--out", "{out}"), "blend needs at least two guides"),
        (("guide", "blend", "{a}", "{b}", "--weights", "1,x", "--out", "{out}"), "must be numbers such as"),
        (("guide", "blend", "{a}", "{b}", "--weights", "1", "--out", "{out}"), "got 1 for 2 guides"),
        (("guide", "concat", "{a}", "{lam}", "--out", "{out}"), "is missing"),
        (
            ("imitate", "--guide", "{a}", "--blend", "1,1", "--output-dir", "{out}"),
            "--blend must be one weight for each of several --video-path, got 1,1 for 0",
        ),
    ],
)
def test_invalid_edits_are_one_sentence(made, guides, tmp_path, arguments, message):
    places = {"a": guides[0], "b": guides[1], "lam": made / "lam", "out": tmp_path / "out"}
    assert message in refused(*(argument.format(**places) for argument in arguments))
    assert not (tmp_path / "out").exists()


def checking(root, out, policy="guided"):
    given = ("--policy-path", root / policy, "--lam-model-path", root / "lam", "--output-dir", out)
    return ("check-guidance", *given, "--demos", "2", "--seed", "500005")


def shorten(monkeypatch, steps=20):
    """Cut demonstrations to their first steps, which saves time."""
    own = check_guidance._demonstrations

    def cut(config):
        for seed, demo in own(config):
            yield (
                seed,
                replace(
                    demo,
                    pixels=demo.pixels[: steps + 1],
                    agent=demo.agent[: steps + 1],
                    block=demo.block[:steps],
                    coverage=demo.coverage[:steps],
                ),
            )

    monkeypatch.setattr(check_guidance, "_demonstrations", cut)


def test_check_guidance_reports_an_untrained_policy(made, tmp_path, monkeypatch):
    shorten(monkeypatch)
    done = ok(*checking(made, tmp_path / "out"), "--operations")
    result = json.loads((tmp_path / "out/guidance.json").read_text())
    assert "The policy ignores its guide" in result["verdict"]
    assert done.stdout.splitlines()[-1] == result["verdict"]
    names = [*result["conditions"], *result["operations"]]
    assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == names
    for name, found in result["operations"].items():
        assert f"{name:11s} {'pass' if found['passes'] else 'fail'}  {found['verdict']}" in done.stdout
        assert found["numbers"]["margin"]["mean"] == pytest.approx(
            np.mean([row[name]["margin"] for row in result["edited"] if row[name]])
        )
    assert result["operations"]["interpolate"]["passes"]
    assert result["operations"]["replace"]["numbers"]["before"]["mean"] == 0
    assert result["operations"]["interpolate"]["verdict"] in (tmp_path / "out/guidance.html").read_text()
    assert [*result["conditions"]] == ["matching", "wrong", "none"]
    rows = result["rows"]
    assert rows[0]["seed"] == 500005
    assert 500005 < rows[1]["seed"] < 500020
    for condition, found in result["conditions"].items():
        assert set(found) == {"agent", "block", "success", "coverage", "max_coverage"}
        for name, numbers in found.items():
            assert numbers["mean"] == pytest.approx(np.mean([row[condition][name] for row in rows]))
    assert result["ratio"] == pytest.approx(
        result["conditions"]["matching"]["agent"]["mean"] / result["conditions"]["wrong"]["agent"]["mean"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--env-name", "FrozenLake-v1"), "FrozenLake-v1 must have the agent's position in its state"),
        (
            ("--env-name", "babyai/GoToLocal"),
            "has a 2-D continuous action, but babyai/GoToLocal expects one of 7 discrete actions",
        ),
        (("--policy-path", "{root}/latent"), "Ground it first"),
        (("--lam-model-path", "{tmp}/other"), "weights of the latent actions must be the same"),
        (("--lam-model-path", "{tmp}/slow"), "the frame gap of the LAM"),
    ],
)
def test_check_guidance_refuses_before_it_demonstrates(made, tmp_path, arguments, message, monkeypatch):
    small_lam(tmp_path / "other", seed=1)
    shutil.copytree(made / "lam", tmp_path / "slow")
    spec = json.loads((made / "lam/spec.json").read_text())
    (tmp_path / "slow/spec.json").write_text(json.dumps({**spec, "frame_gap_s": 0.04, "fps": 25.0}))
    monkeypatch.setattr("latentact.stages.check_guidance._demonstrations", lambda _: pytest.fail("too late"))
    given = [str(argument).format(root=made, tmp=tmp_path) for argument in arguments]
    assert message in refused(*checking(made, tmp_path / "out"), *given)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_the_robot_safe(made, tmp_path, monkeypatch):
    robots, own = [], setup.make_robot

    def interrupting(settings):
        robot = own(settings)
        send = robot.send_action
        robots.append(robot)

        def act(action):
            if len(robot.sent) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return send(action)

        robot.send_action = act
        return robot

    monkeypatch.setattr("latentact.stages.imitate.make_robot", interrupting)
    file = robot_file(tmp_path / "robot.yaml")
    done = cli("imitate", *flags(made, "robot"), "--robot-config", file, "--output-dir", tmp_path / "out")
    assert done.returncode == 130, done.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (metrics["ended"], metrics["disconnected"]) == ("interrupted", True)
    assert 3 <= metrics["commands"] <= 4
    assert not robots[0].is_connected
    assert len(robots[0].sent) <= 5, "the command in flight, and to hold still"
