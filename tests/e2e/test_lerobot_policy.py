"""A policy folder under LeRobot's commands: the same episodes, actions and weights as under ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import cli
from latentact import Policy
from latentact.data.latents import read_labels
from latentact.data.samples import PolicyBatch
from latentact.envs.adapter import Adapter
from latentact.envs.distract import Distraction
from latentact.envs.spec import env_spec
from latentact.errors import UserError
from latentact.policies.bc import BcConfig
from latentact.policies.decoder import DecoderConfig
from latentact.policies.guided import GuidedConfig
from latentact.policies.latent import LatentConfig
from latentact.policies.network import NetworkConfig
from latentact.policies.spec import PolicySpec, Target
from latentact.policies.vla.model import Vla
from latentact.types import ActionSpace, LatentActionSpec
from toy_lerobot import CAMERA, write_demonstrations, write_lam

BABYAI, PUSHT = "babyai/GoToRedBall", "pusht"
LATENT = LatentActionSpec(
    model="lapo",
    tokens=2,
    token_dim=3,
    codebook_size=None,
    frame_gap=2,
    frame_gap_s=0.2,
    fps=10.0,
    resolution=32,
    camera="",
    weights="1234",
)
EPISODES, SEED, MAX_STEPS = 4, 100_000, 12


def make_policy(kind: str, env: str, *, dropout: float = 0.2) -> Policy:
    """Return a policy of random weights for an environment; `kind` is bc, latent (grounded) or guided."""
    torch.manual_seed(0)
    about = env_spec(env)
    space, numbers = about.action_space, len(about.state_names)
    network = NetworkConfig(
        backbone="patch",
        patch=8,
        channels=(8,),
        n_obs_steps=2 if kind == "latent" else 1,
        use_state=kind != "latent",
        chunk_size=4,
        n_action_steps=3,
    )
    target = Target(kind="classes" if space.discrete else "continuous", size=space.size)
    spec: dict[str, Any] = {
        "resolution": 48,
        "state_size": numbers,
        "words": ("a", "the"),
        "fps": 10.0,
        "camera": about.camera,
    }
    if kind == "latent":
        latent = LatentConfig(network=network).build(
            PolicySpec(target=Target(kind="continuous", size=6), stride=2, **spec),
            LATENT,
        )
        policy = latent.ground(DecoderConfig(hidden=(16,), use_state=True), space)
        assert policy.decoder is not None
        policy.decoder.set_action_stats(_spread(space))
    else:
        config: Any = BcConfig(network=network)
        if kind == "guided":
            config = GuidedConfig(network=network, offsets=(-2, 0, 2), dropout=dropout)
            spec["guide"] = config.targets(LATENT, space).guide
        policy = config.build(
            PolicySpec(target=target, action_space=space, **spec),
            LATENT if kind == "guided" else None,
        )
        policy.set_action_stats(_spread(space), None)
    policy.state_mean.fill_(100)
    policy.state_std.fill_(50)
    return policy.eval()


def _spread(space: ActionSpace) -> np.ndarray:
    return np.random.default_rng(0).uniform(50, 450, (100, space.size)).astype(np.float32)


def lerobot_eval(policy: Path, env: str, out: Path, *options: str) -> dict[str, Any]:
    """Run `lerobot-eval` in this process and return the metrics of its task."""
    from lerobot.scripts.lerobot_eval import main

    typed = [
        "lerobot-eval",
        f"--policy.path={policy}",
        "--policy.device=cpu",
        "--env.type=latentact",
        f"--env.task={env}",
        f"--seed={SEED}",
        "--eval.use_async_envs=false",
        f"--output_dir={out}",
        *options,
    ]
    with mock.patch.object(sys, "argv", typed), mock.patch("lerobot.scripts.lerobot_eval.init_logging"):
        main()
    return json.loads((out / "eval_info.json").read_text())["per_task"][0]["metrics"]


class Recorder:
    """Every action that reaches an environment, by the episode's reset seed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.actions: dict[int, list[np.ndarray]] = defaultdict(list)
        step = Adapter.step

        def recorded(env: Any, action: Any) -> Any:
            self.actions[env._seed].append(np.ravel(np.asarray(action, np.float64)))
            return step(env, action)

        monkeypatch.setattr(Adapter, "step", recorded)

    def take(self) -> dict[int, np.ndarray]:
        """Return the recorded actions ``[t, a]`` of every episode and start again."""
        taken = {seed: np.stack(actions) for seed, actions in self.actions.items()}
        self.actions.clear()
        return taken


def check_same_episodes(
    policy: Path, env: str, out: Path, recorder: Recorder, *, episodes: int, batch: int, max_steps: int = 0
) -> dict[str, Any]:
    """Play the same episodes under both commands, compare outcomes and actions, and return ours.

    The commands must act in batches of the same size: floats depend on it in their last bits.
    """
    ours = cli(
        *("rollout", "--policy", policy, "--env", env, "--episodes", episodes, "--seed", SEED),
        *("--max-steps", max_steps, "--record", 0, "--out", out / "rollout"),
    )
    assert ours.returncode == 0, ours.stderr
    result, actions = json.loads((out / "rollout/rollout.json").read_text()), recorder.take()
    metrics = lerobot_eval(
        policy,
        env,
        out / "eval",
        f"--env.max_steps={max_steps}",
        f"--eval.n_episodes={episodes}",
        f"--eval.batch_size={batch}",
    )
    theirs = recorder.take()
    assert [bool(success) for success in result["successes"]] == metrics["successes"]
    np.testing.assert_allclose(result["returns"], metrics["sum_rewards"], atol=1e-5)
    assert sorted(actions) == sorted(theirs) == list(range(SEED, SEED + episodes))
    for seed, taken in actions.items():
        np.testing.assert_allclose(theirs[seed], taken, atol=1e-5, rtol=0)
    return result


@pytest.mark.parametrize("env", [BABYAI, PUSHT])
@pytest.mark.parametrize("kind", ["bc", "latent", "guided"])
def test_both_commands_play_the_same_episodes(
    kind: str, env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_policy(kind, env).save_pretrained(tmp_path / "policy")
    recorder = Recorder(monkeypatch)
    result = check_same_episodes(
        tmp_path / "policy",
        env,
        tmp_path,
        recorder,
        episodes=EPISODES,
        batch=EPISODES,
        max_steps=MAX_STEPS,
    )
    assert max(result["lengths"]) == MAX_STEPS


# --- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A grounded policy's folder."""
    make_policy("latent", BABYAI).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_files_are_those_that_lerobot_writes(folder: Path, tmp_path: Path) -> None:
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot_policy_latentact.modeling_latentact import LatentactPolicy

    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=["--device=cpu"])
    again = tmp_path / "again"
    LatentactPolicy.from_pretrained(folder, config=config, strict=True).save_pretrained(again)
    for pipeline in make_pre_post_processors(config):
        pipeline.save_pretrained(again)
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.glob("*.json"):
        expected, written = json.loads(path.read_text()), json.loads((again / path.name).read_text())
        if path.name == "config.json":
            assert (expected.pop("device"), written.pop("device")) == (None, "cpu")
        assert written == expected, path.name
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert Policy.from_pretrained(again).spec == Policy.from_pretrained(folder).spec


def test_a_latent_policy_without_decoder_is_no_lerobot_policy(tmp_path: Path) -> None:
    spec = PolicySpec(resolution=32, target=Target(kind="continuous", size=6))
    network = NetworkConfig(backbone="patch", patch=8, channels=(8,))
    LatentConfig(network=network).build(spec, LATENT).save_pretrained(tmp_path / "latent")
    assert "type" not in json.loads((tmp_path / "latent/config.json").read_text())
    assert not (tmp_path / "latent/policy_preprocessor.json").exists()


def test_a_folder_of_an_older_release_is_upgraded_by_saving_it(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    old = {key: config[key] for key in ("policy", "spec", "decoder")}
    (folder / "config.json").write_text(json.dumps(old))
    Policy.from_pretrained(folder).save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new/config.json").read_text()) == config


def test_weights_of_another_policy_are_refused(folder: Path, tmp_path: Path) -> None:
    from lerobot_policy_latentact.modeling_latentact import LatentactPolicy

    make_policy("bc", BABYAI).save_pretrained(tmp_path / "other")
    (folder / "model.safetensors").write_bytes((tmp_path / "other/model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors"):
        LatentactPolicy.from_pretrained(folder)


def test_a_new_policy_is_refused() -> None:
    from lerobot_policy_latentact import LatentactConfig
    from lerobot_policy_latentact.modeling_latentact import LatentactPolicy

    with pytest.raises(UserError, match=r"policy\.path must be a policy folder"):
        LatentactPolicy(LatentactConfig(device="cpu"))


# --- the policy's methods


def loaded(policy: Policy, folder: Path) -> Any:
    from lerobot_policy_latentact.modeling_latentact import LatentactPolicy

    policy.save_pretrained(folder)
    return LatentactPolicy.from_pretrained(folder)


def observation(policy: Policy, size: int, camera: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Return uint8 frames ``[b, h, w, 3]`` and LeRobot's batch of the same."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (size, 40, 40, 3), np.uint8)
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    state = torch.from_numpy(rng.random((size, policy.spec.state_size), np.float32))
    return frames, {camera: images, "observation.state": state, "task": ["go to the ball"] * size}


def test_a_guide_changes_the_action_and_its_absence_must_be_learned(tmp_path: Path) -> None:
    policy = make_policy("guided", PUSHT)
    theirs = loaded(policy, tmp_path / "policy")
    _, batch = observation(policy, 2, "observation.images.top")
    alone = theirs.predict_action_chunk(batch)
    assert alone.shape == (2, 4, 2)
    guide = torch.randn(2, 3, 6)
    guided = theirs.predict_action_chunk({**batch, "observation.lam_tokens": guide})
    assert not torch.equal(alone, guided)
    flat = theirs.predict_action_chunk({**batch, "observation.lam_tokens": guide.flatten(1)})
    assert torch.equal(guided, flat)
    needs_guide = loaded(make_policy("guided", PUSHT, dropout=0.0), tmp_path / "needs_guide")
    with pytest.raises(UserError, match=r"observation\.lam_tokens"):
        needs_guide.predict_action_chunk(batch)


@pytest.mark.parametrize("kind", ["bc", "latent", "guided"])
@pytest.mark.parametrize("env", [BABYAI, PUSHT])
def test_the_training_loss_is_ours(kind: str, env: str, tmp_path: Path) -> None:
    policy = make_policy(kind, env)
    theirs = loaded(policy, tmp_path / "policy")
    space = policy.spec.action_space
    assert space is not None
    rows, length = theirs.config.observation_delta_indices, len(theirs.config.action_delta_indices)
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(rng.integers(0, 256, (3, len(rows), 3, 48, 48), np.uint8))
    state = torch.from_numpy(rng.random((3, len(rows), policy.spec.state_size), np.float32))
    actions = torch.from_numpy(rng.integers(0, space.size, (3, length)))
    if not space.discrete:
        actions = torch.from_numpy(rng.random((3, length, space.size), np.float32))
    pad = torch.arange(length) >= torch.tensor([[length], [2], [1]])
    batch = {
        policy.spec.camera: frames / 255,
        "observation.state": state,
        "action": actions,
        "action_is_pad": pad,
        "task": ["go to a ball"] * 3,
    }
    guide = None
    if kind == "guided":
        tokens, valid = torch.randn(3, len(rows), 6), torch.ones(3, len(rows), dtype=torch.bool)
        valid[1], valid[2] = torch.tensor(rows) == 0, False  # one token stands for those before and after it
        batch |= {"observation.lam_tokens": tokens, "observation.lam_valid": valid}
        guide = tokens[:, [rows.index(-2), rows.index(0), rows.index(2)]].clone()
        guide[1], guide[2] = tokens[1, rows.index(0)], torch.nan
    loss, _ = theirs.forward(batch)
    inputs = PolicyBatch(
        frames=frames[:, [rows.index(row) for row in theirs.config.frame_indices]],
        state=state[:, rows.index(0)],
        words=torch.tensor([[1.0, 0.0]] * 3),
        target=actions.reshape(3, length, -1),
        mask=~pad,
        guide=guide,
    )
    if policy.decoder is None:
        expected, _ = policy.loss(inputs)
    else:
        expected = policy.decoder.action_loss(policy.action_scores(inputs), actions, ~pad)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in theirs.get_optim_params())


def test_actions_of_another_environment_are_refused(tmp_path: Path) -> None:
    policy = make_policy("bc", BABYAI)
    theirs = loaded(policy, tmp_path / "policy")
    _, batch = observation(policy, 1, policy.spec.camera)
    batch = {
        key: value[:, None] if isinstance(value, torch.Tensor) else value for key, value in batch.items()
    }
    with pytest.raises(UserError, match=r"action must be one of \[0, 1"):
        theirs.forward({**batch, "action": torch.full((1, 4), 9)})


# --- the environment


def test_the_environment_shows_and_takes_what_ours_does() -> None:
    from lerobot.envs.factory import make_env
    from lerobot_env_latentact import LatentactEnv

    from latentact.envs.spec import make_env as make_ours

    config = LatentactEnv(task=BABYAI, view="full", distract="background=0.5")
    envs = make_env(config, n_envs=2)["latentact"][0]
    ours = make_ours(BABYAI, view="full", distract=Distraction(background=0.5))
    seen, _ = envs.reset(seed=[3, 4])
    expected, info = ours.reset(seed=4)
    camera = env_spec(BABYAI, view="full").camera.removeprefix("observation.images.")
    assert np.array_equal(seen["pixels"][camera][1], expected["pixels"])
    assert np.array_equal(seen["agent_pos"][1], expected["agent_pos"])
    assert envs.call("task")[1] == envs.call("task_description")[1] == info["task"]
    seen, _, _, _, info = envs.step(np.array([[2.0], [1.0]], np.float32))
    assert np.array_equal(seen["pixels"][camera][1], ours.step(1)[0]["pixels"])
    assert info["is_success"].tolist() == [False, False]
    envs.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": ""}, r"env\.task must name an environment"),
        ({"task": "babyai/GoToRedBal"}, "GoToRedBall"),
        ({"camera": "top"}, r"env\.camera must be observation\.image"),
        ({"max_steps": -1}, "max_steps must be between"),
        ({"distract": "fog=1"}, "unknown distractor"),
    ],
)
def test_settings_of_the_environment_are_validated(settings: dict[str, Any], message: str) -> None:
    from lerobot_env_latentact import LatentactEnv

    with pytest.raises(UserError, match=message):
        LatentactEnv(**settings)


# --- fine-tuning


@pytest.mark.slow
def test_lerobot_train_fine_tunes_a_policy_that_both_load(tmp_path: Path) -> None:
    make_policy("latent", PUSHT).save_pretrained(tmp_path / "policy")
    data = write_demonstrations(tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from lerobot.scripts.lerobot_train import main; main()",
            f"--policy.path={tmp_path / 'policy'}",
            "--policy.device=cpu",
            "--dataset.repo_id=local/plain",
            f"--dataset.root={data}",
            "--dataset.video_backend=pyav",
            "--batch_size=4",
            "--num_workers=0",
            "--steps=2",
            "--save_freq=2",
            "--env_eval_freq=0",
            f"--output_dir={tmp_path / 'run'}",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    checkpoint = tmp_path / "run/checkpoints/last/pretrained_model"
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "policy", checkpoint))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    tuned = Policy.from_pretrained(checkpoint)
    assert tuned.spec == Policy.from_pretrained(tmp_path / "policy").spec
    assert tuned.latent == LATENT


# --- vision-language-action models


def lerobot_train(data: Path, out: Path, *options: str) -> Path:
    """Run `lerobot-train` for two steps in this process and return the checkpoint."""
    from lerobot.scripts.lerobot_train import main

    typed = [
        *("lerobot-train", f"--dataset.root={data}", "--dataset.repo_id=local/data", f"--output_dir={out}"),
        *("--dataset.video_backend=pyav", "--batch_size=4", "--num_workers=0", "--steps=2", "--save_freq=2"),
        *("--env_eval_freq=0", "--policy.device=cpu", *options),
    ]
    with (
        mock.patch.object(sys, "argv", typed),
        mock.patch("lerobot.scripts.lerobot_train.init_logging"),
        mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}),
    ):
        main()
    return out / "checkpoints/last/pretrained_model"


NEW_VLA = (
    *("--policy.type=lam_vla", "--policy.vla.vlm=tiny", "--policy.vla.prompt='{task}'"),
    *("--policy.vla.freeze_vision=false", "--policy.vla.use_state=true", "--policy.optimizer_lr=0.001"),
    "--policy.resolution=32",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LAM, a dataset with its tokens and labels, and what `lerobot-train` made of it."""
    folder = tmp_path_factory.mktemp("lam_vla")
    plain, lam = write_demonstrations(folder), write_lam(folder / "lam")
    for command in (
        ("precompute", "--dataset-root", plain, "--lam-model-path", lam, "--output-dir", folder / "tokens"),
        ("label", "--data", plain, "--lam", lam, "--out", folder / "labels"),
    ):
        done = cli(*command)
        assert done.returncode == 0, done.stderr
    lerobot_train(folder / "tokens", folder / "latent", *NEW_VLA)
    return folder


def differing(one: Path, other: Path, name: str = "vlm/model.safetensors") -> list[str]:
    a, b = load_file(one / name), load_file(other / name)
    return [key for key in a if key in b and not torch.equal(a[key], b[key])]


@pytest.mark.slow
def test_lerobot_train_makes_a_vla_that_finetune_vla_takes_on(world: Path, tmp_path: Path) -> None:
    latent = world / "latent/checkpoints/last/pretrained_model"
    model = Vla.from_pretrained(latent)
    assert (model.spec.camera, model.spec.resolution, model.spec.state_size) == (CAMERA, 32, 2)
    assert (model.latent.tokens, model.latent.codebook_size, model.latent.frame_gap_s) == (2, 8, 0.2)
    assert (model.head, model.config.prompt, model.config.freeze_vision) == (None, "{task}", False)
    states = read_labels(world / "labels")[1].state
    assert states is not None
    np.testing.assert_allclose(model.own.state_mean.numpy(), states.mean(0), rtol=1e-4)
    assert (latent / "policy_preprocessor.json").is_file()
    done = cli(
        *("finetune-vla", f"vla={latent}", f"labels={world}/labels", "experiment=vla_debug"),
        *("labeled_episodes=1", "training.steps=1", "training.batch_size=4", "training.device=cpu"),
        f"out={tmp_path}/tuned",
    )
    assert done.returncode == 0, done.stderr
    # LeRobot trains the result on, with the latent loss; settings of acting can be changed.
    more = lerobot_train(
        *(world / "tokens", tmp_path / "more", f"--policy.path={tmp_path}/tuned"),
        *("--policy.head.n_action_steps=2", "--policy.optimizer_lr=0.001"),
    )
    assert differing(tmp_path / "tuned", more)
    moved = differing(tmp_path / "tuned", more, "model.safetensors")
    assert {"latent_head.weight", "queries.weight"} <= {*moved}
    assert not {"actions.mean", "actions.std", "state_mean"} & {*moved}
    assert Vla.from_pretrained(more).head == replace(
        Vla.from_pretrained(tmp_path / "tuned").head, n_action_steps=2
    )


@pytest.mark.slow
def test_lerobot_train_gives_a_vla_an_action_head(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent = world / "latent/checkpoints/last/pretrained_model"
    tuned = lerobot_train(
        *(world / "tokens", tmp_path / "tuned", f"--policy.path={latent}", "--policy.head.kind=bins"),
        *("--policy.head.bins=4", "--policy.head.chunk_size=3", "--policy.head.n_action_steps=2"),
    )
    actions = np.ma.getdata(read_labels(world / "labels")[1].actions([0, 1, 2]))
    own = Vla.from_pretrained(tuned).own
    assert own.actions is not None
    quantiles = np.quantile(actions, [0, 0.25, 0.5, 0.75, 1], axis=0).T
    np.testing.assert_allclose(own.actions.edges.numpy(), quantiles, rtol=1e-5)
    check_same_episodes(
        tuned, PUSHT, tmp_path, Recorder(monkeypatch), episodes=2, batch=2, max_steps=MAX_STEPS
    )

    files = cli("push", tuned, "owner/name", "--dry-run").stdout.partition("Files:")[2].split()
    ours = {str(path.relative_to(tuned)) for path in tuned.rglob("*") if path.is_file()}
    assert {*files} == ours - {"train_config.json"} | {"README.md"}

    from lerobot.configs import PreTrainedConfig
    from lerobot.rollout.context import _load_pretrained_policy

    config = PreTrainedConfig.from_pretrained(tuned, cli_overrides=["--device=cpu"])
    config.pretrained_path = tuned
    loaded = _load_pretrained_policy(config)  # as lerobot-rollout does
    frames = torch.rand(2, 3, 48, 48)
    batch = {CAMERA: frames, "observation.state": torch.rand(2, 2), "task": ["go"] * 2}
    assert loaded.predict_action_chunk(batch).shape == (2, 3, 2)


def test_datasets_that_a_vla_cannot_learn_from(world: Path, tmp_path: Path) -> None:
    latent = f"--policy.path={world}/latent/checkpoints/last/pretrained_model"
    write_lam(tmp_path / "lam", seed=1)
    other = tmp_path / "other"
    given = ("--dataset-root", world / "plain", "--lam-model-path", tmp_path / "lam")
    assert cli("precompute", *given, "--output-dir", other).returncode == 0
    shutil.copytree(world / "tokens", tmp_path / "codes")
    sidecar = tmp_path / "codes/meta/lam_tokens.json"
    about = json.loads(sidecar.read_text())
    about["spec"]["codebook_size"] = 2
    sidecar.write_text(json.dumps(about))
    for data, options, message in (
        (world / "plain", NEW_VLA, "must have the columns of latent actions that `latentact precompute`"),
        (other, (latent,), "weights of the latent actions must be the same in the model and the dataset"),
        (tmp_path / "codes", NEW_VLA, "observation.lam_codes of the dataset local/data must be from 0 to 1"),
        (world / "tokens", (*NEW_VLA, "--policy.vla.prompt={task}"), "must contain {task}, got"),
        (world / "tokens", (*NEW_VLA, "--policy.vla.lora_rank=2"), "lora_rank must be 0 in LeRobot"),
        (world / "tokens", (*NEW_VLA, f"--policy.vla.vlm={tmp_path}"), "vlm must be tiny, a folder or a hub"),
    ):
        with pytest.raises(UserError, match=message):
            lerobot_train(data, tmp_path / "out", *options)
    from lerobot_policy_latentact.modeling_lam_vla import LamVlaPolicy

    policy = LamVlaPolicy.from_pretrained(world / "latent/checkpoints/last/pretrained_model")
    with pytest.raises(UserError, match="the model must output robot actions"):
        policy.predict_action_chunk(
            {CAMERA: torch.rand(1, 3, 32, 32), "observation.state": torch.rand(1, 2), "task": ["go"]}
        )
    with pytest.raises(
        UserError, match=r"policy\.path must be a folder of latentact finetune-vla, got a new"
    ):
        LamVlaPolicy(policy.config)
