"""The public conformance checks notice planted faults."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import write_blocks
from latentact import Clip, UserError, check_format, check_lam
from latentact.data.format import FORMATS, EpisodeMetadata
from latentact.lams.contract import LamConfig
from latentact.lams.models.clam import ClamConfig
from latentact.lams.models.lapo import LapoConfig
from latentact.quantizers.vq_ema import VqEmaConfig
from latentact.registry import Registry

SMALL = LapoConfig(
    size=32,
    backbone="patch",
    patch=4,
    idm_channels=(8,),
    fdm_channels=(8,),
    bottleneck=VqEmaConfig(dim=16, codebooks=2, positions=2, codebook_size=8),
)


def other_codes(latent: Any) -> Any:
    return replace(latent, codes=latent.codes + 8)


def flat(latent: Any) -> Any:
    return replace(latent, vectors=latent.vectors.flatten(2)[..., None])


def mixed(latent: Any) -> Any:
    return replace(latent, continuous=latent.continuous - latent.continuous.mean(0))


def noisy(latent: Any) -> Any:
    return replace(latent, vectors=latent.vectors + torch.rand(1))


def shifted(latent: Any) -> Any:
    return replace(latent, continuous=latent.continuous.roll(1, 1))


def always_valid(latent: Any) -> Any:
    return replace(latent, valid=torch.ones_like(latent.valid))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (other_codes, "codes must be int64 from 0 to 7, got torch.int64 from"),
        (flat, "vectors must be"),
        (mixed, "clips of a batch must not influence each other"),
        (noisy, "encode must be deterministic in eval mode"),
        (shifted, "encode with last must return the last transition"),
        (always_valid, "a transition must be valid exactly if both of its frames are"),
    ],
)
def test_a_faulty_encoder_is_noticed(fault: Any, message: str) -> None:
    torch.manual_seed(0)
    model = SMALL.build()
    encode = type(model).encode
    faulty = type("Faulty", (type(model),), {"encode": lambda self, *a, **k: fault(encode(self, *a, **k))})
    faulty.encode.__signature__ = inspect.signature(encode)
    model.__class__ = faulty
    with pytest.raises(UserError, match=message):
        check_lam(model)


def test_a_parameter_without_gradient_is_noticed() -> None:
    model = SMALL.build()
    model.unused = torch.nn.Linear(3, 3)
    with pytest.raises(UserError, match="every parameter must get a gradient"):
        check_lam(model)


def test_a_model_that_ignores_missing_states_is_noticed() -> None:
    config = ClamConfig(size=32, backbone="patch", idm_channels=(8,), fdm_channels=(8,), hidden=16)
    model = replace(config, observations="both", state_size=3).build().eval()
    check_lam(model)
    states = model._states
    model._states = lambda given: states(torch.zeros(8, 3, 3) if given is None else given)
    with pytest.raises(UserError, match="must raise a UserError without states"):
        check_lam(model)


class Wrapped:
    """The npz format with a fault in its source."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def detect(self, path: Path) -> bool:
        return FORMATS.get("npz").detect(path)

    def open(self, path: Path, camera: str, memo: Any) -> Any:
        source = FORMATS.get("npz").open(path, camera, memo)
        for name, change in self.changes.items():
            setattr(source, name, change(getattr(source, name)))
        return source


def one_frame_short(frames: Any) -> Any:
    return lambda number: list(frames(number))[:-1]


def as_floats(frames: Any) -> Any:
    return lambda number: [(seconds, frame.astype(np.float32)) for seconds, frame in frames(number)]


def without_time(frames: Any) -> Any:
    return lambda number: [(0.0, frame) for _, frame in frames(number)]


def in_turn(frames: Any) -> Any:
    calls: list[int] = []

    def changing(number: int) -> Any:
        calls.append(number)
        return [(seconds, frame + np.uint8(len(calls))) for seconds, frame in frames(number)]

    return changing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": one_frame_short}, "must have the 12 frames that it declares, got 11"),
        ({"frames": as_floats}, "must be uint8"),
        ({"frames": without_time}, "must be finite and increase"),
        ({"frames": in_turn}, "must be the same at each decoding"),
        ({"fps": lambda fps: float("nan")}, "fps must be more than 0 and finite, got nan"),
        ({"action_space": lambda space: replace(space, size=2)}, "discrete actions must be one of 2 classes"),
        ({"row_tasks": lambda tasks: lambda number: tasks(number) + 7}, "must be from -1 to"),
        ({"column": lambda column: lambda name: column("action")}, "an unknown column must be None"),
    ],
)
def test_a_faulty_format_is_noticed(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = write_blocks(tmp_path / "blocks.npz", episodes=2)
    check_format(Wrapped(), data)
    with pytest.raises(UserError, match=message):
        check_format(Wrapped(**changes), data)


def test_a_format_that_detects_everything_is_noticed(tmp_path: Path) -> None:
    data, greedy = write_blocks(tmp_path / "blocks.npz", episodes=2), Wrapped()
    greedy.detect = lambda path: True
    with pytest.raises(UserError, match="detect must be false for an empty folder"):
        check_format(greedy, data)


def test_a_config_that_is_not_registered_is_noticed() -> None:
    model = SMALL.build()
    model.config = type("Other", (), {"kind": "lapo"})()
    with pytest.raises(UserError, match=r"registered with LAMS.register\('lapo'\), got another Other"):
        check_lam(model)


def test_a_registered_config_gets_the_defaults_of_its_contract() -> None:
    class Plain:
        kind = "plain"

    class Own(Plain):
        target = "its own"

    registry: Registry[Any] = Registry("lam", "latentact.lams.models", contract=LamConfig)
    registry.register("own")(Own)
    registry.register("plain")(Plain)
    assert (Plain.target, Plain.read_published(Path("a.pt")), Own.target) == (None, None, "its own")
    assert not hasattr(Plain, "with_action_head")


def test_former_names_of_the_data_warn() -> None:
    with pytest.warns(DeprecationWarning, match="use EpisodeMetadata"):
        from latentact.data.format import Episode
    assert Episode is EpisodeMetadata
    frames = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)
    clip = Clip(
        frames=frames, valid=torch.ones(1, 2, dtype=torch.bool), index=torch.zeros(1, dtype=torch.int64)
    )
    with pytest.warns(DeprecationWarning, match=r"use Clip.idm_frames"):
        assert clip.seen is clip.idm_frames
