"""Every registered LAM keeps the contract of `LatentActionModel`."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from latentact import check_lam
from latentact.data.cache import DataConfig
from latentact.data.lerobot.writer import EpisodeBuffer, RecordSpec, stage_episode, write_dataset
from latentact.data.mixture import TrainingDataConfig
from latentact.data.stream import FrameStream
from latentact.errors import UserError
from latentact.labeling.dataset import EncodeOptions, encode_dataset
from latentact.lams.contract import LAMS, LatentActionModel, load_lam
from latentact.lams.models.clam import ClamConfig
from latentact.lams.models.idm import IdmConfig
from latentact.lams.models.laom import LaomConfig
from latentact.lams.models.lapo import LapoConfig
from latentact.lams.models.laq import LaqConfig
from latentact.lams.models.villa_x import VillaXConfig
from latentact.lams.targets import TargetConfig
from latentact.quantizers.fsq import FsqConfig
from latentact.quantizers.kl import KlConfig
from latentact.quantizers.lfq import LfqConfig
from latentact.quantizers.none import WhitenedConfig
from latentact.quantizers.nsvq import NsvqConfig
from latentact.quantizers.residual_vq import ResidualVqConfig
from latentact.quantizers.vq import VqConfig
from latentact.quantizers.vq_ema import VqEmaConfig
from latentact.stages import train_lam
from latentact.stages.train_lam import TrainLamConfig
from latentact.training.settings import TrainingConfig
from latentact.types import ActionSpace, Clip, LatentActions

SPACE = ActionSpace(kind="discrete", size=4)
SMALL = VqEmaConfig(dim=16, codebooks=2, positions=2, codebook_size=8, decay=0.9)
LAPO = LapoConfig(
    size=32, backbone="patch", idm_channels=(16,), fdm_channels=(16, 16), patch=4, bottleneck=SMALL
)
LAQ = LaqConfig(
    size=32,
    patch=4,
    dim=32,
    heads=2,
    head_dim=16,
    spatial_depth=1,
    temporal_depth=1,
    bottleneck=NsvqConfig(dim=32, positions=4, codebook_size=8, guard=True),
)
VILLA = VillaXConfig(
    resolution=32,
    patch_size=8,
    d_t=4,
    encoder_depth=2,
    encoder_embed_dim=32,
    encoder_n_heads=2,
    num_learned_tokens=2,
    action_latent_dim=8,
    map_heads=4,
    n_codes=16,
    decoder_depth=2,
    decoder_embed_dim=32,
    decoder_n_heads=2,
    augment=False,
)
WHITENED = WhitenedConfig(dim=8)
FROZEN = TargetConfig(kind="frozen_features", backbone="any", size=12, hidden=32)
AVERAGED = TargetConfig(kind="ema_features", features=32, hidden=32, tau=0.01)
LAOM = LaomConfig(
    size=32,
    backbone="patch",
    channels=(16,),
    stack=2,
    horizon=2,
    hidden=32,
    bottleneck=WHITENED,
    target=AVERAGED,
    augment="none",
)
CLAM = ClamConfig(
    size=32,
    backbone="patch",
    patch=4,
    idm_channels=(16,),
    fdm_channels=(16, 16),
    decoder=(32,),
    hidden=32,
)
CONFIGS = {
    "lapo published networks": LapoConfig(size=32, idm_scale=1, fdm_base=4, bottleneck=SMALL),
    "lapo patch": LAPO,
    "lapo odd size": replace(LAPO, size=37),
    "lapo keypoints": replace(LAPO, bottleneck=WhitenedConfig(dim=16), idm_patch=4, keypoints=4),
    "lapo whitened": replace(
        LAPO, bottleneck=WhitenedConfig(dim=16), difference_input=2.0, motion_weight=9.0
    ),
    "lapo kl": replace(LAPO, bottleneck=KlConfig(dim=16), fdm_context=0),
    "lapo fsq": replace(LAPO, bottleneck=FsqConfig(positions=2, levels=(8, 8))),
    "lapo vq": replace(LAPO, bottleneck=VqConfig(dim=16, positions=2, codebook_size=8, guard=True)),
    "lapo nsvq": replace(LAPO, bottleneck=NsvqConfig(dim=16, positions=2, codebook_size=8)),
    "lapo lfq": replace(LAPO, bottleneck=LfqConfig(positions=2, codebook_size=8)),
    "lapo residual_vq": replace(
        LAPO, bottleneck=ResidualVqConfig(dim=16, positions=2, codebook_size=8, decay=0.9, guard=True)
    ),
    "lapo joint": replace(LAPO, bottleneck=WhitenedConfig(dim=16), action_weight=1.0),
    "lapo grid": LapoConfig(
        backbone="grid",
        size=5,
        frame_channels=2,
        idm_channels=(16,),
        fdm_channels=(16,),
        bottleneck=SMALL,
    ),
    "lapo cells": LapoConfig(
        backbone="cells",
        size=5,
        frame_channels=2,
        idm_channels=(16,),
        fdm_channels=(16,),
        bottleneck=SMALL,
    ),
    "villa_x": VILLA,
    "villa_x chunked proprio": replace(VILLA, window="chunked", action_weight=0.1),
    "laq": LAQ,
    "laq as published": replace(LAQ, compat=True, size=40, patch=5),
    "laq fsq": replace(LAQ, bottleneck=FsqConfig(positions=4, levels=(4, 4, 4))),
    "lapo ema_features": replace(LAPO, target=AVERAGED),
    "lapo frozen_features": replace(LAPO, target=FROZEN),
    "laom": LAOM,
    "laom labels": replace(LAOM, action_weight=0.1, backbone="impala", scale=1, horizon=1),
    "laom pixels": replace(LAOM, patch=4, image_channels=(16,)),
    "laom frozen_features": replace(LAOM, target=replace(FROZEN, features=32)),
    "clam": CLAM,
    "clam published networks": replace(CLAM, backbone="impala", idm_scale=1, fdm_base=4),
    "clam labels": replace(CLAM, action_weight=1.0, steps=2, difference_input=2.0),
    "clam both": replace(CLAM, observations="both", state_size=3, action_weight=0.1),
    "clam state": replace(CLAM, observations="state", state_size=3, steps=3),
    "clam ema_features": replace(CLAM, target=AVERAGED, bottleneck=KlConfig(dim=8)),
    "idm": IdmConfig(size=32, scale=1),
    "idm patch": IdmConfig(size=32, backbone="patch", channels=(16,), difference_input=2.0),
    "idm state": IdmConfig(backbone="state", state_size=3, hidden=16),
}  # fmt: skip


def test_every_lam_is_here() -> None:
    assert {config.kind for config in CONFIGS.values()} == set(LAMS.names())


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request: pytest.FixtureRequest) -> LatentActionModel:
    torch.manual_seed(0)
    return request.param.build(SPACE)


def clip(model: LatentActionModel, b: int = 4, seed: int = 0) -> Clip:
    """Clips in which a block moves, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    grid = getattr(model.config, "backbone", "") in ("grid", "cells")
    t, size = model.context + 1 + model.horizon, 5 if grid else 32
    frames = torch.zeros(b, t, 2 if grid else 3, size, size, dtype=torch.uint8)
    for i, step in product(range(b), range(t)):
        side = 1 if grid else 8
        y, x = ((torch.randint(0, size - side + 1, (2,), generator=generator)) // side * side).tolist()
        frames[i, step, :, y : y + side, x : x + side] = 7 if grid else 220
    action = torch.randint(0, 4, (b,), generator=generator)
    target = getattr(model.config, "target", None)
    return Clip(
        frames=frames,
        valid=torch.ones(b, t, dtype=torch.bool),
        index=torch.arange(b),
        action=action,
        labeled=torch.ones(b, dtype=torch.bool),
        states=states(frames),
        features=torch.randn(b, t, target.size, generator=generator) if target and target.size else None,
    )


def states(frames: torch.Tensor) -> torch.Tensor:
    """Numbers that tell where the block is."""
    lit = frames[..., 0, :, :].float().div(220)
    y, x = (torch.linspace(-1, 1, size) for size in lit.shape[-2:])
    places = [(lit * x).mean((-1, -2)), (lit * y[:, None]).mean((-1, -2)), lit.mean((-1, -2))]
    return torch.stack(places, -1)


def encode(
    model: LatentActionModel, frames: torch.Tensor, valid: torch.Tensor | None = None, **options
) -> LatentActions:
    """Call `encode` as a caller does who has robot states where the model wants them."""
    more = {"states": states(frames)} if model.state_size else {}
    return model.encode(frames, valid, **options, **more)


def test_the_contract(model: LatentActionModel) -> None:
    check_lam(model, clip(model, b=8))


def test_missing_context_repeats_the_first_frame(model: LatentActionModel) -> None:
    frames = clip(model).frames[:, -2:]
    alone = encode(model.eval(), frames)
    for older in (frames[:, :1], frames.flip(0)[:, 1:]):  # what is masked may be anything
        padded = torch.cat([older] * model.context + [frames], dim=1)
        valid = (torch.arange(padded.shape[1]) >= model.context).expand(len(padded), -1)
        given = encode(model, padded, valid, last=True)
        torch.testing.assert_close(alone.continuous, given.continuous, rtol=1e-5, atol=1e-5)


def test_masked_frames_change_nothing(model: LatentActionModel) -> None:
    frames = torch.cat([clip(model).frames[:, -3:]] * 3, dim=1)
    valid = torch.ones(frames.shape[:2], dtype=torch.bool)
    valid[1, 0] = valid[2, 4] = valid[3, -1] = False
    other = torch.where(valid[..., None, None, None], frames, frames.flip(0, 1))
    one, two = encode(model.eval(), frames, valid), encode(model, other, valid)
    assert torch.equal(one.valid, valid[:, 1:] & valid[:, :-1])
    torch.testing.assert_close(one.continuous[one.valid], two.continuous[two.valid], rtol=1e-5, atol=1e-5)
    alone = encode(model, frames[2:3, 5:])
    torch.testing.assert_close(one.continuous[2, 5:], alone.continuous[0], rtol=1e-5, atol=1e-5)


def test_frames_of_other_channels_are_one_sentence(model: LatentActionModel) -> None:
    with pytest.raises(UserError, match="frames must be uint8"):
        model.encode(clip(model).frames[:, :, :1])


def test_one_frame_has_no_transition(model: LatentActionModel) -> None:
    latent = encode(model.eval(), clip(model).frames[:, :1])
    assert latent.vectors.shape == (4, 0, model.spec.tokens, model.spec.token_dim)
    assert latent.valid.shape == (4, 0)
    assert (latent.codes is None) == (model.spec.codebook_size is None)
    with pytest.raises(UserError, match="at least two frames for a transition"):
        encode(model, clip(model).frames[:, :1], last=True)


def test_predict(model: LatentActionModel) -> None:
    batch = clip(model)
    latent = encode(model.eval(), batch.frames, last=True)
    if not model.generative:
        with pytest.raises(UserError, match="no forward dynamics"):
            model.predict(batch.frames[:, :-1], latent.vectors[:, -1])
        return
    predicted = model.predict(batch.frames[:, :-1], latent.vectors[:, -1])
    size = model.spec.resolution
    assert predicted.shape == (4, batch.frames.shape[2], size, size)
    assert predicted.dtype == torch.uint8


def test_vectors_are_the_sum_of_the_codebook_entries(model: LatentActionModel) -> None:
    codebook = model.codebook()
    assert (codebook is None) == (model.spec.codebook_size is None)
    if codebook is not None:
        latent = encode(model.eval(), clip(model).frames, last=True)
        codes, vectors = latent.codes[:, -1], latent.vectors[:, -1].flatten(1)
        expected = sum(table[codes[:, token]] for token, table in enumerate(codebook))
        if model.spec.robot_actions:  # probabilities of classes
            assert torch.equal(expected.argmax(1), vectors.argmax(1))
        else:
            torch.testing.assert_close(expected, vectors)


def test_save_and_load_are_bit_equal(model: LatentActionModel, tmp_path) -> None:
    model.eval().save_pretrained(tmp_path / "lam")
    loaded = load_lam(tmp_path / "lam")
    assert loaded.spec == model.spec
    assert loaded.spec.weights
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    frames = clip(model).frames
    assert torch.equal(encode(loaded, frames).vectors, encode(model, frames).vectors)


def test_overfits_four_clips(model: LatentActionModel) -> None:
    batch = clip(model)
    optimizer = torch.optim.Adam(model.train().parameters(), 3e-3)
    first = model.loss(batch)[0].item()
    for _ in range(120):
        loss, _ = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.5 * first:
            return
    pytest.fail(f"the loss fell from {first:.3g} to {loss.item():.3g} only")


def test_any_size_goes_in(model: LatentActionModel) -> None:
    if getattr(model.config, "backbone", "") in ("grid", "cells"):
        return  # cells have no other size
    frames = torch.randint(0, 256, (1, 3, 3, 50, 70), dtype=torch.uint8)
    assert encode(model.eval(), frames).vectors.shape[:2] == (1, 2)


def test_one_clip_without_a_batch_axis_is_a_batch_of_one(model: LatentActionModel) -> None:
    frames = clip(model).frames[:1]
    whole, alone = encode(model.eval(), frames), encode(model, frames[0])
    assert torch.equal(alone.vectors, whole.vectors)
    assert torch.equal(alone.valid, whole.valid)


def test_labels_of_an_episode_are_what_encode_gives_of_it(model: LatentActionModel, tmp_path) -> None:
    if model.state_size or clip(model).frames.shape[2] != 3:  # labels are for videos
        return
    frames = clip(model, b=11, seed=1).frames[:, 0]
    np.savez(tmp_path / "video.npz", obs=frames.permute(0, 2, 3, 1).numpy(), done=np.arange(11) == 10, fps=10)
    config = DataConfig(path=str(tmp_path / "video.npz"), resolution=0, cache_dir=str(tmp_path))
    found = encode_dataset(model.eval(), FrameStream(config), 1, EncodeOptions(cache_dir=str(tmp_path)))
    assert found is not None
    assert found.valid.tolist() == [True] * 10 + [False]
    wanted = encode(model, frames[None]).continuous[0].numpy(force=True)
    np.testing.assert_allclose(found.continuous[:-1], wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def states_in_data(tmp_path):
    """An episode of 11 frames with robot states, as a LeRobot dataset."""
    config = replace(CLAM, observations="both", state_size=3)
    frames = clip(config.build(), b=11, seed=1).frames[:, 0]
    spec = RecordSpec(
        fps=10,
        camera="observation.images.top",
        height=32,
        width=32,
        action_space=SPACE,
        action_names=("a", "b", "c", "d"),
        state_names=("x", "y", "z"),
        robot_type="toy",
    )
    episode = EpisodeBuffer(
        frames=frames.permute(0, 2, 3, 1).numpy(),
        state=states(frames).numpy(),
        action=np.zeros(11, np.int64),
        reward=np.zeros(11, np.float32),
        success=np.arange(11) == 10,
        task="move",
    )
    stage_episode(tmp_path / "one.npz", spec, episode)
    write_dataset(tmp_path / "data", spec, [tmp_path / "one.npz"], sidecars={})
    return DataConfig(path=str(tmp_path / "data"), resolution=32, cache_dir=str(tmp_path)), frames


@pytest.mark.parametrize("observed", ["both", "state"])
def test_labels_of_a_model_that_observes_states(observed, states_in_data, tmp_path) -> None:
    data, frames = states_in_data
    model = replace(CLAM, observations=observed, state_size=3).build().eval()
    found = encode_dataset(model, FrameStream(data), 1, EncodeOptions(cache_dir=str(tmp_path), batch_size=4))
    assert found is not None
    wanted = encode(model, frames[None]).continuous[0].numpy(force=True)
    np.testing.assert_allclose(found.continuous[:-1], wanted, rtol=1e-4, atol=1e-5)
    other = replace(CLAM, observations=observed, state_size=7).build().eval()
    with pytest.raises(UserError, match=r"must have the 7 values that the LAM clam uses, got 3 values"):
        encode_dataset(other, FrameStream(data), 1, EncodeOptions(cache_dir=str(tmp_path)))


TRAINED = ("lapo joint", "villa_x", "laq", "laom", "clam labels", "lapo ema_features")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_training_that_was_cut_short_ends_as_if_it_had_not(name: str, blocks, tmp_path, monkeypatch) -> None:
    training = TrainingConfig(steps=8, batch_size=8, checkpoint_every=3, eval_every=0, log_every=1)
    config = TrainLamConfig(
        data=TrainingDataConfig(path=str(blocks), resolution=32, cache_dir=str(tmp_path)),
        lam=CONFIGS[name],
        training=training,
        labeled_episodes=3 if getattr(CONFIGS[name], "action_weight", 0) else 0,
        probe_transitions=32,
    )
    whole = train_lam.run(config, tmp_path / "whole")
    kind, steps = type(load_lam(whole)), 0

    def until_the_fifth(model, clip, loss=kind.loss):
        nonlocal steps
        steps += 1
        if steps == 5:
            raise RuntimeError("power cut")
        return loss(model, clip)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "loss", until_the_fifth)
        with pytest.raises(RuntimeError, match="power cut"):
            train_lam.run(config, tmp_path / "cut")
    cut = train_lam.run(config, tmp_path / "cut")
    for file in ("model.safetensors", "lam.json", "metrics.csv"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes(), file
