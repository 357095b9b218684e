"""LeRobot's policies as rows of a comparison, at toy size through the real command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from conftest import ok, refused
from latentact.data.cache import DataConfig, open_store
from latentact.data.lerobot.writer import EpisodeBuffer, RecordSpec, stage_episode, write_dataset
from latentact.data.splits import choose_labeled, split_episodes
from latentact.envs.spec import env_spec

pytestmark = pytest.mark.slow
ROWS = ("act_k", "diffusion_k", "lam_act_k")
NET = (
    "dim_model=16 n_heads=2 dim_feedforward=16 n_encoder_layers=1 latent_dim=4 chunk_size=4 n_action_steps=2"
)
SETTINGS = (
    *("lam.backbone=patch", "lam.size=32", "lam.patch=8", "lam.idm_channels=[8]", "lam.fdm_channels=[8]"),
    *(
        "lam.bottleneck.kind=none",
        "lam.bottleneck.dim=4",
        "lam_training.steps=2",
        "lam_training.batch_size=4",
    ),
    *("lam_training.eval_every=0", "policy_training.steps=2", "policy_training.batch_size=13"),
    f'lerobot.act="{NET} pretrained_backbone_weights=null"',
    f'lerobot.lam_act="{NET} pretrained_backbone_weights=null lam_dropout=0.5"',
    'lerobot.diffusion="horizon=8 n_action_steps=4 down_dims=[8,16,32] n_groups=4 num_train_timesteps=5 '
    'pretrained_backbone_weights=null"',
    *("episodes=1", "max_steps=3", "record=0", "data.resolution=32", "held_out=0.3"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of PushT with random content; the actions of episode i are around 100 * i."""
    folder, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    spec, paths = RecordSpec.of_env(env_spec("pusht"), 64, 64), []
    for i in range(5):
        n = 12
        paths.append(folder / f"{i}.npz")
        episode = EpisodeBuffer(
            frames=rng.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8),
            state=rng.uniform(0, 512, (n, 2)).astype(np.float32),
            action=(100 * i + rng.uniform(0, 10, (n, 2))).astype(np.float32),
            reward=np.zeros(n, np.float32),
            success=np.zeros(n, bool),
            task="push the block",
        )
        stage_episode(paths[-1], spec, episode)
    write_dataset(folder / "data", spec, paths, sidecars={})
    return folder / "data"


def test_rows(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "compare"
    command = (
        "compare",
        f"data.path={data}",
        "env=pusht",
        "ks=[2]",
        f"methods=[{','.join(ROWS)}]",
        *SETTINGS,
    )
    ok(*command, f"out={out}")
    content = json.loads((out / "comparison.json").read_text())
    rows = {row["method"]: row for row in content["rows"]}
    assert [*rows] == [*ROWS, "uniform", "frequencies"]
    for name in ROWS:
        assert (rows[name]["k"], rows[name]["updates"], rows[name]["episodes"]) == (2, 2, 1)
        last = out / f"seed0/{name}_k2/policy/checkpoints/last/pretrained_model"
        assert json.loads((last / "config.json").read_text())["type"] == name.removesuffix("_k")
        assert len([*last.parents[1].glob("0*")]) == 1, "the last checkpoint only"
        assert (out / f"seed0/{name}_k2/rollout/rollout.json").is_file()
    assert (out / "seed0/latent/tokens/meta/lam_tokens.json").is_file(), "shared by every k"
    store = open_store(DataConfig(path=str(data), resolution=32))
    train, _ = split_episodes(store, held_out=0.3, seed=0)
    known = np.ma.getdata(store.actions(chosen := choose_labeled(train, 2, 0)))[
        np.isin(store.episode, chosen)
    ]
    folder = out / "seed0/act_k_k2/policy/checkpoints/last/pretrained_model"
    (stats,) = [path for path in folder.glob("*.safetensors") if "preprocessor" in path.name]
    mean = load_file(stats)["action.mean"]
    assert np.allclose(mean, known.mean(0), atol=1e-3), "hidden actions do not enter the statistics"


def test_discrete_actions_are_refused(tmp_path: Path) -> None:
    ok(
        "collect",
        "babyai/GoToRedBallNoDists",
        "--episodes",
        "4",
        "--workers",
        "1",
        "--out",
        tmp_path / "data",
    )
    settings = (f"data.path={tmp_path / 'data'}", "env=babyai/GoToRedBallNoDists", f"out={tmp_path / 'out'}")
    said = refused("compare", *settings, "methods=[bc_k,act_k]", "ks=[1]")
    assert "must be continuous for act_k" in said
    assert "got 7 classes" in said
    assert not (tmp_path / "out").exists()
