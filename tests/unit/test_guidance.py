"""The guide of a video, its time base by hand, and the pairs that are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentact.agents.agent import AgentSpec, LatentInput, select_image
from latentact.config import from_dict
from latentact.data.cache import DataConfig, open_store
from latentact.errors import UserError
from latentact.guidance import inference as guidance
from latentact.guidance.align import align_to_rate, latent_agreement, sample_tokens
from latentact.guidance.extractor import LatentActionExtractor
from latentact.guidance.guide import Guide
from latentact.guidance.inference import LatentGuidedInference
from latentact.io.specs import parse_spec
from latentact.io.video_writer import write_video
from latentact.lams.models.lapo import LapoConfig
from latentact.quantizers.quantizer import QUANTIZERS
from latentact.stages import label
from latentact.types import ActionSpace, LatentActionSpec

SPEC = LatentActionSpec(
    model="lapo",
    tokens=1,
    token_dim=2,
    codebook_size=None,
    frame_gap=1,
    frame_gap_s=0.1,
    fps=10.0,
    resolution=32,
    camera="",
    weights="abc",
)


def guide(vectors, fps=10.0, codes=None, **spec):
    values = np.asarray(vectors, np.float32)[:, None]
    size = 7 if codes is not None else None
    codes = None if codes is None else np.asarray(codes, np.int64)[:, None]
    return Guide(
        spec=replace(SPEC, codebook_size=size, **spec),
        fps=fps,
        vectors=values,
        continuous=values,
        codes=codes,
    )


LINE = [[float(i), -float(i)] for i in range(5)]


class Echo:
    """An agent whose actions are the tokens."""

    def __init__(self, fps=10.0, **changes):
        latent = LatentInput(**({"size": 2, "kind": "continuous", "gap_s": 0.1, "spec": SPEC} | changes))
        self.spec = AgentSpec(action_space=ActionSpace(kind="continuous", size=2), fps=fps, latent=latent)
        self.resets = 0

    def reset(self, num_envs):
        self.resets += num_envs

    def act(self, observation, latent=None):
        return np.full((1, 2), 9.0) if latent is None else latent[:, 0]


def small_lam(folder, kind="none", **spec):
    torch.manual_seed(0)
    bottleneck = from_dict(QUANTIZERS.get(kind), {"dim": 4, "positions": 2, "levels": (4, 4)})
    config = LapoConfig(
        backbone="patch", size=32, patch=4, idm_channels=(8,), fdm_channels=(8,), bottleneck=bottleneck
    )
    model = config.build()
    model.spec = replace(model.spec, **({"frame_gap_s": 0.1, "fps": 10.0} | spec))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lam(tmp_path_factory):
    return small_lam(tmp_path_factory.mktemp("lam") / "lam")


def images(count, size=32, seed=0):
    smooth = np.random.default_rng(seed).integers(256, size=(count, 4, 4, 3), dtype=np.uint8)
    return smooth.repeat(size // 4, 1).repeat(size // 4, 2)


# --- extraction


@pytest.mark.parametrize("gap", [1, 2])
def test_a_guide_is_what_labeling_says(blocks, tmp_path, gap):
    folder = small_lam(tmp_path / "lam", "fsq", frame_gap=gap, frame_gap_s=gap / 10)
    data = DataConfig(path=str(blocks), resolution=32)
    label.run(label.LabelConfig(lam=str(folder), data=data, out=str(tmp_path / "labels"), batch_size=7))
    found = load_file(tmp_path / "labels/lam_tokens.safetensors")
    store = open_store(data)
    first, count = store.starts[3], store.lengths[3]
    frames = np.asarray(store.frames[first : first + count])
    guide = LatentActionExtractor(folder, lam_resolution=0, device="cpu").extract_from_frames(frames)
    rows = slice(first, first + count - gap)
    assert len(guide) == count - gap
    np.testing.assert_array_equal(guide.codes, found["codes"][rows])
    np.testing.assert_allclose(guide.continuous, found["continuous"][rows], atol=1e-5)
    np.testing.assert_allclose(guide.vectors, found["vectors"][rows], atol=1e-5)
    assert (guide.spec.frame_gap, guide.spec.frame_gap_s, guide.fps) == (gap, gap / 10, 10.0)


def test_windows_change_nothing(lam, monkeypatch):
    extractor, frames = LatentActionExtractor(lam, 0, "cpu"), images(40)
    whole = extractor.extract_from_frames(frames)
    for batch in (1, 7, 39, 40):
        monkeypatch.setattr(guidance, "BATCH", batch)
        np.testing.assert_allclose(extractor.extract_from_frames(frames).vectors, whole.vectors, atol=1e-5)
    first = torch.from_numpy(frames).permute(0, 3, 1, 2)
    np.testing.assert_allclose(extractor.extract_from_frames(first).vectors, whole.vectors, atol=1e-5)


def test_only_a_window_of_frames_is_held(lam, monkeypatch):
    extractor, held = LatentActionExtractor(lam, 0, "cpu"), []
    own = extractor._window
    monkeypatch.setattr(
        extractor, "_window", lambda frames, *rest: held.append(len(frames)) or own(frames, *rest)
    )
    guide = extractor._encode((image for image in images(200)), 10.0)
    assert len(guide) == 199
    assert max(held) <= guidance.BATCH + 2  # and one of context, one ahead


def test_a_video_at_another_rate(lam, tmp_path):
    frames = images(20, 64)
    write_video(tmp_path / "demo.mp4", frames, 20)
    extractor = LatentActionExtractor(lam, lam_resolution=48, device="cpu")
    loaded = extractor.load_video(tmp_path / "demo.mp4")
    assert loaded.shape == (10, 48, 48, 3)  # the LAM's ten frames a second
    assert np.abs(loaded[3].astype(int) - extractor.load_video(tmp_path / "demo.mp4", 20.0)[6]).mean() < 1
    assert len(extractor.load_video(tmp_path / "demo.mp4", 20.0, 5)) == 5
    guide = extractor.extract_from_frames(extractor.load_video(tmp_path / "demo.mp4", 20.0))
    assert (guide.fps, guide.spec.frame_gap, len(guide)) == (20.0, 2, 18)
    np.testing.assert_allclose(guide.timestamps, np.arange(18) / 20)
    streamed = extractor.extract(tmp_path / "demo.mp4", 20.0)
    np.testing.assert_array_equal(streamed.vectors, guide.vectors)
    for arguments, message in (
        ((tmp_path / "demo.mp4", 40.0), "must have at least 40 frames per second, got 20"),
        (
            (tmp_path / "demo.mp4", 7.0),
            "frames of the demonstration, which has a frame every 0.142857 s, got 0.1 s",
        ),
        ((tmp_path / "none.mp4",), "must be a video file, got no such file"),
        ((tmp_path / "demo.mp4", 10.0, 1), "must have at least 2 frames, got 1"),
    ):
        with pytest.raises(UserError, match=message):
            extractor.extract(*arguments)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"text.mp4 cannot be read"):
        extractor.load_video(tmp_path / "text.mp4")
    with pytest.raises(UserError, match=r"frames must be uint8 \[t, h, w, 3\], got float64 \[3, 8, 8, 3\]"):
        extractor.extract_from_frames(np.zeros((3, 8, 8, 3)))


def test_a_lam_without_a_rate_gives_a_guide_that_cannot_be_followed(tmp_path):
    folder = small_lam(tmp_path / "lam", frame_gap_s=0.0, fps=0.0)
    guide = LatentActionExtractor(folder, 0, "cpu").extract_from_frames(images(4))
    assert np.isnan(guide.timestamps).all()
    with pytest.raises(UserError, match=r"the rate of the guide is unknown. Give --target-fps"):
        align_to_rate(guide, 10.0, "hold")
    known = LatentActionExtractor(folder, 0, "cpu").extract_from_frames(images(4), fps=5.0)
    assert (known.fps, known.spec.frame_gap_s) == (5.0, 0.2)


# --- files


@pytest.mark.parametrize("codes", [None, [0, 3, 6, 1, 2]])
def test_a_guide_survives_saving(tmp_path, codes):
    saved = guide(LINE, 20.0, codes)
    saved.save(tmp_path)
    for path in (tmp_path, tmp_path / "latents.safetensors", tmp_path / "latents.pt"):
        found = Guide.load(path)
        assert (found.spec, found.fps) == (saved.spec, 20.0)
        np.testing.assert_array_equal(found.continuous, saved.continuous)
        np.testing.assert_array_equal(found.vectors, saved.vectors)
        assert (found.codes is None) == (codes is None)
    values = torch.load(tmp_path / "latents.pt", weights_only=True)
    assert values["latent_actions"].shape == (5, 1, 2)
    np.testing.assert_allclose(values["timestamps"], np.arange(5) / 20)
    assert parse_spec(values["metadata"]["spec"], "the guide") == saved.spec


def test_what_is_no_guide_is_refused(tmp_path):
    guide(LINE).save(tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in ("latents.pt", "latents.safetensors")}
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data[:-40])
        with pytest.raises(UserError, match=name):
            Guide.load(tmp_path / name)
        with pytest.raises(UserError, match=r"does not exist|missing|cannot be read"):
            Guide.load(tmp_path / f"no_{name}")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="must contain a dict of weights, got list"):
        Guide.load(tmp_path / "list.pt")
    strange = dict.fromkeys(("latent_actions", "vectors"), torch.zeros(3, 1, 5)) | {
        "timestamps": torch.zeros(3)
    }
    about = {"spec": json.loads(json.dumps(vars(SPEC))), "fps": 10.0}
    torch.save({**strange, "metadata": about}, tmp_path / "shape.pt")
    with pytest.raises(UserError, match=r"'vectors' of float32 \[3, 1, 2\], got float32 \[3, 1, 5\]"):
        Guide.load(tmp_path / "shape.pt")


# --- time base


def test_hold_by_hand():
    line = guide(LINE, 10.0)
    assert align_to_rate(line, 10.0, "hold").tolist() == [0, 1, 2, 3, 4]
    assert align_to_rate(line, 20.0, "hold").tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert align_to_rate(line, 25.0, "hold").tolist() == [
        0,
        0,
        0,
        1,
        1,
        2,
        2,
        2,
        3,
        3,
        4,
        4,
        4,
    ]  # 0.5 s, 0.04 s each
    assert align_to_rate(guide(LINE, 29.97), 30.0, "hold").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(
        UserError, match="10 latent actions per second and control runs at 5, so --time-base hold"
    ):
        align_to_rate(line, 5.0, "hold")


def test_resample_by_hand():
    line = guide(LINE, 10.0)
    np.testing.assert_allclose(
        align_to_rate(line, 25.0, "resample"), [0, 0.4, 0.8, 1.2, 1.6, 2, 2.4, 2.8, 3.2, 3.6, 4, 4, 4]
    )
    np.testing.assert_allclose(align_to_rate(line, 5.0, "resample"), [0, 2, 4])
    found = sample_tokens(line, np.array([0.0, 0.4, 3.75, 4.0]), "continuous")
    np.testing.assert_allclose(found, [[0, 0], [0.4, -0.4], [3.75, -3.75], [4, -4]], rtol=1e-6)
    coded = guide(LINE, 10.0, codes=[5, 4, 3, 2, 1])
    assert sample_tokens(coded, np.array([0.4, 0.5, 1.6]), "codes").tolist() == [[5], [4], [3]]
    assert sample_tokens(coded, np.array([0.4, 0.5]), "vectors").tolist() == [
        [0, 0],
        [1, -1],
    ]  # never between codes
    with pytest.raises(UserError, match="needs codes, but the guide of lapo has none"):
        sample_tokens(line, np.zeros(1), "codes")
    with pytest.raises(UserError, match="time_base must be hold or resample, got 'hole'"):
        align_to_rate(line, 10.0, "hole")


# --- inference


def test_one_action_per_latent_action_then_none():
    policy = Echo()
    inference = LatentGuidedInference(policy, guide(LINE))
    assert [inference.predict_action({}).tolist() for _ in LINE] == LINE
    assert inference.predict_action({}) is None
    assert inference.act({}) == [None]
    assert inference.get_next_latent_action() is None
    inference.reset()
    assert policy.resets == 2
    latent = inference.get_next_latent_action()
    assert latent.tolist() == [[0.0, -0.0]]
    batch = inference.prepare_batch({"observation.state": np.zeros(3), "task": "go"}, latent[0])
    assert batch["observation.state"].shape == (1, 3)
    assert batch["task"] == ["go"]
    assert batch["observation.lam_tokens"].shape == (1, 1, 2)
    assert np.array_equal(inference.act(batch)[0], LINE[1])


def test_extra_steps_are_without_a_guide():
    policy = Echo(optional=True)
    inference = LatentGuidedInference(policy, guide(LINE), extra_steps=2)
    assert (len(inference), inference.control_steps, len(inference.position)) == (5, 7, 5)
    for _ in range(2):
        played = [inference.predict_action({}) for _ in range(8)]
        assert [a.tolist() for a in played[:7]] == [*LINE, [9, 9], [9, 9]]
        assert played[7] is None
        assert inference.ended
        inference.reset()
    with pytest.raises(
        UserError, match="--extra-steps must be 0 for a policy that always needs a guide, got 2"
    ):
        LatentGuidedInference(Echo(), guide(LINE), extra_steps=2)


def test_a_window_of_the_guide_stays_at_its_ends():
    inference = LatentGuidedInference(Echo(offsets=(0, 1, 3)), guide(LINE))
    rows = [inference.get_next_latent_action()[:, 0].tolist() for _ in LINE]
    assert rows == [[0, 1, 3], [1, 2, 4], [2, 3, 4], [3, 4, 4], [4, 4, 4]]
    past = LatentGuidedInference(Echo(offsets=(-2, 0)), guide(LINE))
    assert [past.get_next_latent_action()[:, 0].tolist() for _ in range(4)] == [
        [0, 0],
        [0, 1],
        [0, 2],
        [1, 3],
    ]
    faster = LatentGuidedInference(Echo(offsets=(0, 1)), guide(LINE), fps=20.0)
    rows = [faster.get_next_latent_action()[:, 0].tolist() for _ in range(4)]
    assert rows == [[0, 1], [0, 1], [1, 2], [1, 2]]  # a step of the policy is two of control


@pytest.mark.parametrize(
    ("policy", "other", "message"),
    [
        (
            Echo(),
            guide(LINE, weights="xyz"),
            "in the policy and the guide, got 'abc' and 'xyz'",
        ),
        (Echo(), guide(LINE, model="laq"), "in the policy and the guide, got 'lapo' and 'laq'"),
        (Echo(spec=None, weights="q"), guide(LINE), "LAM of weights q, but the guide comes from abc"),
        (
            Echo(spec=None, size=8),
            guide(LINE),
            "needs 8 values per latent action, but the guide has 2",
        ),
        (
            Echo(),
            guide(LINE, frame_gap_s=0.2, frame_gap=2),
            "latent actions of 0.1 s, but those of the guide span 0.2 s",
        ),
        (Echo(stride=2, fps=5.0), guide(LINE), "2 robot actions at 5 per second, but control runs at 10"),
    ],
)
def test_what_does_not_belong_together_is_refused(policy, other, message):
    with pytest.raises(UserError, match=message):
        LatentGuidedInference(policy, other, fps=10.0)


def test_the_same_gap_at_another_rate_belongs_together():
    twice = replace(guide(LINE), fps=20.0, spec=replace(SPEC, frame_gap=2, fps=20.0))
    inference = LatentGuidedInference(Echo(), twice, time_base="resample")
    assert inference.fps == 10.0
    assert inference.position.tolist() == [0, 2, 4]


# --- agreement


def test_latent_agreement_by_hand():
    demo = guide([[1, 0], [0, 2], [-3, 0]])
    same = latent_agreement(demo, demo, np.arange(3.0))
    assert same["steps"] == [1, 1, 1]
    assert same["mean"] == 1
    # rows of the cosine matrix: (1, 0, -1), (0, 1, 0), (-1, 0, 1)
    assert same["chance"] == pytest.approx(1 / 9)
    achieved = guide([[0, 1], [0, 1]])
    found = latent_agreement(demo, achieved, np.arange(3.0))
    assert found["steps"] == [0, 1]
    assert found["measure"] == "cosine"
    coded, done = guide(LINE, codes=[0, 1, 2, 3, 4]), guide(LINE, codes=[0, 1, 1, 1, 4])
    found = latent_agreement(coded, done, np.arange(5.0))
    assert (found["measure"], found["steps"]) == ("equal codes", [1, 1, 0, 0, 1])
    assert found["chance"] == pytest.approx(1 / 5)


def test_the_only_image_is_selected_whatever_its_key():
    one = {"observation.images.top": np.zeros((2, 2, 3), np.uint8), "task": ""}
    assert select_image(one, "observation.image") is one["observation.images.top"]
    two = {**one, "observation.images.side": np.ones((2, 2, 3), np.uint8)}
    assert select_image(two, "observation.images.side").all()
    with pytest.raises(UserError, match=r"must have the image observation.image, got observation.images.top"):
        select_image(two, "observation.image")
