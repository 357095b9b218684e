"""The frame of an observation, whatever an environment shows or renders."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from PIL import Image

from latentact.envs.frames import is_image, to_rgb
from latentact.envs.spec import EnvError, env_spec, make_env
from latentact.errors import UserError
from toy_env import FRAME, IMAGE, VECTOR, toy

GRADIENT = np.arange(32 * 40, dtype=np.int64).reshape(32, 40) % 256
COLOR = np.stack([GRADIENT, 255 - GRADIENT, GRADIENT // 2], -1)
RGB = COLOR.astype(np.uint8)
GRAY = np.repeat(GRADIENT.astype(np.uint8)[..., None], 3, -1)


@pytest.mark.parametrize(
    ("value", "frame"),
    [
        (RGB, RGB),
        (RGB / 255, RGB),
        ((RGB / 255).astype(np.float32) + 1e-6, RGB),
        (RGB.astype(np.float64), RGB),
        (COLOR, RGB),
        (COLOR.astype(np.uint16), RGB),
        (RGB > 100, np.where(RGB > 100, 255, 0)),
        (GRADIENT.astype(np.uint8), GRAY),
        (GRADIENT[..., None] / 255, GRAY),
        (GRADIENT[None].astype(np.uint8), GRAY),
        (np.dstack([RGB, GRADIENT]).astype(np.uint8), RGB),
        (np.dstack([RGB, GRADIENT]) / 255, RGB),
        (RGB.transpose(2, 0, 1), RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (torch.from_numpy(RGB / 255).requires_grad_(), RGB),
        (torch.from_numpy(RGB > 100).bfloat16(), np.where(RGB > 100, 255, 0)),
        ([GRAY, RGB], RGB),
        ((RGB / 255,), RGB),
        (np.stack([GRAY, RGB]), RGB),
        (COLOR.tolist(), RGB),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GRADIENT.astype(np.uint8)), GRAY),
        (np.asfortranarray(RGB), RGB),
    ],
)
def test_a_frame_of_any_kind_is_rgb(value, frame):
    read = to_rgb(value, "render()")
    assert (read.dtype, read.shape) == (np.uint8, frame.shape)
    np.testing.assert_array_equal(read, frame)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "got None"),
        ([], "got a list of 0"),
        ("text", "got a str"),
        ({"top": RGB}, "got a dict"),
        (7, "got a int"),
        (np.zeros((0, 32, 3), np.uint8), r"shape \(0, 32, 3\)"),
        (np.zeros((32, 32, 2), np.uint8), r"shape \(32, 32, 2\) and dtype uint8"),
        (np.zeros((2, 2, 32, 32, 3), np.uint8), "got ndarray of shape"),
        (np.array([["a"]]), "dtype <U1"),
        ([[1, 2], [3]], "got a list of 2"),
        (RGB / 127.5 - 1, "got -1 to 1"),
        (COLOR * 257, "got 0 to 65535"),
        (np.full((32, 32), np.nan), "got nan to nan"),
    ],
)
def test_what_is_no_frame_is_described(value, got):
    with pytest.raises(UserError, match=r"^render\(\) of Toy must return .*" + got + r".* Wrap the env"):
        to_rgb(value, "render() of Toy")


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (IMAGE, True),
        (Box(0, 255, (3, 40, 32), np.uint8), True),
        (Box(0, 255, (84, 84), np.uint8), True),
        (Box(0, 255, (84, 84, 1), np.uint8), True),
        (Box(0, 1, (32, 32, 3), np.float32), True),
        (Box(0, 255, (32, 32, 4), np.float32), True),
        (Box(0, 255, (7, 7, 3), np.uint8), False),
        (Box(0, 255, (4, 84, 84), np.uint8), False),
        (Box(-1, 1, (32, 32, 3), np.float32), False),
        (Box(0, 1, (32, 32), np.float32), False),
        (VECTOR, False),
        (Discrete(3), False),
        (Text(5), False),
        (MultiDiscrete(np.full((32, 32, 3), 256)), False),
    ],
)
def test_which_spaces_are_images(space, expected):
    assert is_image(space) is expected


@pytest.mark.parametrize(
    "value", [FRAME / 255, [FRAME, FRAME], FRAME[..., 0], FRAME.transpose(2, 0, 1), torch.from_numpy(FRAME)]
)
def test_what_render_draws_is_the_frame(value):
    env = make_env(toy("ToyDraws-v0", observation=VECTOR, render=lambda _: value))
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation["pixels"], FRAME)
    assert observation["agent_pos"].tolist() == [0, 0]
    np.testing.assert_array_equal(env.step(0)[0]["pixels"], FRAME)


def test_an_environment_that_renders_lists():
    parts = {"observe": lambda _: 0, "render": lambda _: [FRAME], "modes": ["rgb_array_list"]}
    env = make_env(toy("ToyList-v0", observation=Discrete(4), **parts))
    assert env.reset(seed=0)[0].keys() == {"pixels"}


def test_render_without_a_frame_says_so():
    with pytest.raises(EnvError, match=r"render\(\) of ToyNone-v0 must return an image .*got None"):
        make_env(toy("ToyNone-v0", observation=VECTOR, render=lambda _: None))


def test_a_frame_is_not_the_environments_own_buffer():
    buffer = np.zeros((32, 32, 3), np.uint8)

    def observe(env):
        buffer[:] = env.steps
        return buffer

    env = make_env(toy("ToyBuffer-v0", observe=observe))
    first = env.reset(seed=0)[0]["pixels"]
    env.step(0)
    assert first.max() == 0


def test_frames_that_change_their_size_are_refused():
    env = make_env(toy("ToySize-v0", observe=lambda env: np.zeros((32 + env.steps, 32, 3), np.uint8)))
    env.reset(seed=0)
    with pytest.raises(
        EnvError, match=r"frame of size \(32, 32\) as the first one, got \(33, 32\) at step 1"
    ):
        env.step(0)
    assert make_env("ToySize-v0", resolution=48).step(0)[0]["pixels"].shape == (48, 48, 3)


@pytest.mark.parametrize(
    ("space", "value"),
    [
        (Dict(pixels=Dict(top=IMAGE), agent_pos=VECTOR), {"pixels": {"top": FRAME}, "agent_pos": np.ones(2)}),
        (Dict(rgb=IMAGE, state=VECTOR), {"rgb": FRAME, "state": np.ones(2)}),
        (Dict(wrist=IMAGE, image=IMAGE), {"wrist": FRAME * 0, "image": FRAME}),
        (Box(0, 1, (3, 32, 32), np.float32), FRAME.transpose(2, 0, 1) / 255),
    ],
)
def test_the_image_of_an_observation(space, value):
    env = make_env(toy("ToyDict-v0", observation=space, observe=lambda _: value))
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation["pixels"], FRAME)
    assert observation.get("agent_pos", np.ones(2)).tolist() == [1, 1]


def test_of_several_images_one_must_be_called_pixels():
    space = Dict(cameras=Dict(top=IMAGE, wrist=IMAGE))
    with pytest.raises(
        UserError, match=r"one camera, got cameras\.top, cameras\.wrist.*names the one to use 'pix"
    ):
        env_spec(toy("ToyTwo-v0", observation=space))


@pytest.mark.parametrize(
    "space", [Tuple([Discrete(3), VECTOR]), Discrete(5), MultiBinary(4), Dict(a=Discrete(2), b=Text(9))]
)
def test_any_observation_will_do_where_render_draws(space):
    name = toy("ToySpace-v0", observation=space, observe=lambda _: space.sample(), render=lambda _: FRAME)
    assert env_spec(name).state_names == ()
    assert make_env(name).reset(seed=0)[0].keys() == {"pixels"}
