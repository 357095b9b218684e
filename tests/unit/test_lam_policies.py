"""The LeRobot policies `lam_diffusion` and `lam_act`, in this process."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.dataset_tools import add_features, recompute_stats
from lerobot.datasets.factory import make_dataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies import get_policy_class, make_policy, make_policy_config, make_pre_post_processors
from lerobot_policy_latentact import LamActConfig, LamDiffusionConfig

from latentact.errors import UserError
from latentact.lams.contract import load_lam
from latentact.lams.models.clam import ClamConfig
from latentact.nn.token_projection import TokenProjection
from toy_lerobot import CAMERA, GAP, SIZE, SMALL, STEPS, TOKENS, D, K, write_demonstrations, write_lam

CONFIGS = {"lam_diffusion": LamDiffusionConfig, "lam_act": LamActConfig}
HOSTS = {"lam_diffusion": "diffusion", "lam_act": "act"}
both = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Demonstrations with a column of random tokens; those without are in the folder `plain` beside them."""
    folder = tmp_path_factory.mktemp("lam_policies")
    plain = LeRobotDataset("local/plain", root=write_demonstrations(folder), video_backend="pyav")
    rng, rows = np.random.default_rng(1), len(plain)
    columns: dict[str, Any] = {
        TOKENS: (
            5 + 3 * rng.standard_normal((rows, K * D)).astype(np.float32),
            {"dtype": "float32", "shape": (K * D,), "names": None},
        ),
        "observation.lam_valid": (
            np.arange(rows) % STEPS < STEPS - GAP,
            {"dtype": "bool", "shape": (1,), "names": None},
        ),
    }
    recompute_stats(add_features(plain, columns, output_dir=folder / "tokens", repo_id="local/tokens"))
    return folder / "tokens"


@pytest.fixture(scope="module")
def lam(tmp_path_factory) -> Path:
    return write_lam(tmp_path_factory.mktemp("lam") / "lam")


@functools.cache
def single_rows(root: Path) -> LeRobotDataset:
    return LeRobotDataset("local/tokens", root=root, video_backend="pyav")


def settings(kind: str, **changes: Any) -> dict[str, Any]:
    own = {"lam_num_learned_tokens": K, "lam_action_latent_dim": D} if kind in HOSTS else {}
    small = SMALL[HOSTS.get(kind, kind)]
    common = {"device": "cpu", "push_to_hub": False, "pretrained_backbone_weights": None}
    return {**common, **small, **own, **changes}


def build(kind: str, root: Path, **changes: Any) -> SimpleNamespace:
    """Return what lerobot-train makes of a configuration: dataset, policy, processors."""
    config: Any = make_policy_config(kind, **settings(kind, **changes))
    dataset_config = DatasetConfig("local/tokens", root=str(root), video_backend="pyav")
    dataset: Any = make_dataset(TrainPipelineConfig(dataset=dataset_config, policy=config))
    torch.manual_seed(0)
    policy = make_policy(config, ds_meta=dataset.meta)
    before, after = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)
    return SimpleNamespace(config=config, dataset=dataset, policy=policy, before=before, after=after)


def batch_of(built: SimpleNamespace, rows: list[int]) -> dict[str, Any]:
    """Return dataset rows as the training loop hands them to the preprocessor."""
    batch = torch.utils.data.default_collate([built.dataset[row] for row in rows])
    if batch[CAMERA].dtype == torch.uint8:
        batch[CAMERA] = batch[CAMERA] / 255
    return batch


def condition(policy: Any) -> list[torch.Tensor]:
    """Return a list that collects what enters the projection from now on."""
    seen: list[torch.Tensor] = []
    policy._host.lam_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def observation(built: SimpleNamespace, row: int, *keys: str) -> dict[str, Any]:
    """Return the raw observation of one row, without an axis of time or of batch."""
    item = single_rows(built.dataset.root)[row]
    return {key: item[key] for key in (CAMERA, "observation.state", *keys)}


# --- settings


@pytest.mark.parametrize(
    ("kind", "given", "dim"),
    [
        ("lam_diffusion", {"n_obs_steps": 3, "lam_temporal_aggregation": "concat"}, 3 * 8),
        ("lam_diffusion", {"n_obs_steps": 3}, 8),
        (
            "lam_diffusion",
            {"n_obs_steps": 3, "lam_temporal_aggregation": "concat", "use_precomputed_lam_tokens": False},
            2 * 8,
        ),
        ("lam_diffusion", {"n_obs_steps": 3, "use_precomputed_lam_tokens": False}, 8),
        ("lam_act", {"lam_temporal_aggregation": "concat"}, 8),
        ("lam_act", {"lam_temporal_aggregation": "concat", "use_precomputed_lam_tokens": False}, 8),
    ],
)
def test_conditioning_size(kind: str, given: dict[str, Any], dim: int) -> None:
    config: Any = CONFIGS[kind](**settings(kind, lam_model_path="somewhere", **given))
    assert config.token_dim == 8
    assert config.conditioning_dim == dim


@both
def test_defaults_are_the_hosts(kind: str) -> None:
    config: Any = make_policy_config(kind, device="cpu")
    host: Any = make_policy_config(HOSTS[kind], device="cpu")
    for name in vars(host):
        assert getattr(config, name) == getattr(host, name), name
    assert (config.lam_tokens_key, config.lam_num_learned_tokens, config.token_dim) == (TOKENS, 2, 64)


@both
def test_environment_state_is_the_projection_and_the_real_one(kind: str) -> None:
    config: Any = CONFIGS[kind](**settings(kind, lam_projection_dim=5))
    assert config.env_state_feature.shape == (5,)
    config.input_features = {"observation.environment_state": PolicyFeature(FeatureType.ENV, (3,))}
    assert config.env_state_feature.shape == (8,)
    config.use_lam_conditioning = False
    assert config.env_state_feature.shape == (3,)


@both
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lam_num_learned_tokens": 0}, "lam_num_learned_tokens must be at least 1, got 0"),
        ({"lam_projection_dim": 0}, "lam_projection_dim must be at least 1, got 0"),
        ({"lam_dropout": 1.0}, "lam_dropout must be at least 0 and less than 1, got 1.0"),
        ({"lam_temporal_aggregation": "mean"}, "must be latest or concat"),
        ({"lam_tokens_key": "lam"}, "begin with 'observation.'"),
        ({"use_precomputed_lam_tokens": False}, "lam_model_path must be given"),
    ],
)
def test_settings_that_cannot_be_used(kind: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CONFIGS[kind](**settings(kind, **given))


# --- the projection


def test_projection_standardises_tokens_and_leaves_still_dimensions_small() -> None:
    stats = {"mean": [1.0, 2.0], "std": [2.0, 1e-9]}
    projection = TokenProjection(steps=1, token_dim=2, width=2, dropout=0.0, stats=stats)
    projection.network = torch.nn.Identity()  # type: ignore[assignment]
    tokens = torch.tensor([[[5.0, 2.0]], [[1.0, 2.002]]])
    torch.testing.assert_close(projection(tokens), torch.tensor([[2.0, 0.0], [0.0, 0.1]]), atol=1e-4, rtol=0)
    valid = torch.tensor([[False], [True]])
    torch.testing.assert_close(projection(tokens, valid)[0], torch.zeros(2))


def test_dropout_hides_the_guide_while_training_only() -> None:
    projection = TokenProjection(steps=1, token_dim=2, width=3, dropout=0.25, stats=None)
    assert projection.no_guide is not None
    torch.nn.init.constant_(projection.no_guide, 9.0)
    torch.manual_seed(0)
    hidden = (projection(torch.randn(4000, 1, 2)) == 9).all(1).float().mean()
    assert hidden == pytest.approx(0.25, abs=0.03)
    assert not (projection.eval()(torch.randn(400, 1, 2)) == 9).any()
    assert (projection.without_guide(5) == torch.full((5, 3), 9.0)).all()


# --- training


@both
def test_without_conditioning_it_is_the_stock_policy(kind: str, data: Path) -> None:
    losses = []
    for name in (kind, HOSTS[kind]):
        built = build(
            name, data.parent / "plain", **({"use_lam_conditioning": False} if name in HOSTS else {})
        )
        optimizer = built.config.get_optimizer_preset().build(built.policy.get_optim_params())
        built.policy.train()
        torch.manual_seed(1)
        for rows in ([0, 5, 20], [7, 9, 30], [1, 2, 3]):
            loss, _ = built.policy.forward(built.before(batch_of(built, rows)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]
    assert len({*losses}) == 3


@both
def test_conditioning_can_be_switched_off_on_data_with_tokens(kind: str, data: Path) -> None:
    built = build(kind, data, use_lam_conditioning=False)
    loss, _ = built.policy.forward(built.before(batch_of(built, [0, 5])))
    assert loss.isfinite()


@both
def test_projection_is_trained_and_saved_with_the_host(kind: str, data: Path) -> None:
    built = build(kind, data, lam_dropout=0.5)
    names = {n: p for n, p in built.policy.named_parameters() if "lam_encoder" in n}
    assert len(names) == 5
    groups = built.policy.get_optim_params()
    trained = {id(p) for g in groups for p in (g["params"] if isinstance(g, dict) else [g])}
    assert all(id(p) in trained for p in names.values())
    built.policy.train()
    built.policy.forward(built.before(batch_of(built, [0, 5, 20, 21, 22, 25])))[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in names.values())


@both
def test_stated_statistics_standardise_the_tokens(kind: str, data: Path) -> None:
    built = build(kind, data)
    stats = built.dataset.meta.stats[TOKENS]
    np.testing.assert_allclose(built.policy._host.lam_encoder.mean, stats["mean"], rtol=1e-6)
    np.testing.assert_allclose(built.policy._host.lam_encoder.std, stats["std"], rtol=1e-6)


@both
@pytest.mark.parametrize("aggregation", ["latest", "concat"])
def test_tokens_reach_the_projection_as_they_are(kind: str, aggregation: str, data: Path) -> None:
    built = build(kind, data, lam_temporal_aggregation=aggregation)
    seen = condition(built.policy)
    raw = batch_of(built, [0, 5, 13])
    processed = built.before(raw)
    assert processed["observation.state"].abs().max() < 5, "states are normalized"
    built.policy.forward(processed)
    tokens = raw[TOKENS] if raw[TOKENS].ndim == 3 else raw[TOKENS][:, None]
    assert torch.equal(seen[0], tokens[:, -built.config.lam_transitions :])


# --- on the fly


@both
@pytest.mark.parametrize("aggregation", ["latest", "concat"])
def test_on_the_fly_tokens_are_the_lams_of_raw_frames(
    kind: str, aggregation: str, data: Path, lam: Path
) -> None:
    changes: dict[str, Any] = {"use_precomputed_lam_tokens": False, "lam_model_path": str(lam)}
    if kind == "lam_diffusion":
        changes["n_obs_steps"] = 3
    built = build(kind, data, lam_temporal_aggregation=aggregation, **changes)
    seen, row = condition(built.policy), STEPS + 9
    built.policy.forward(built.before(batch_of(built, [row, row])))
    count = built.config.lam_transitions
    assert count == (2 if aggregation == "concat" and kind == "lam_diffusion" else 1)
    first = row - GAP * (count + 1)  # the model looks at one frame of context before the transition
    frames = torch.stack(
        [(single_rows(data)[i][CAMERA] * 255).round().byte() for i in range(first, row + 1, GAP)]
    )
    wanted = load_lam(lam).encode(frames[None]).continuous[:, -count:].flatten(2)
    torch.testing.assert_close(seen[0], wanted.expand(2, -1, -1))


@both
def test_on_the_fly_tokens_of_a_lam_that_uses_states(kind: str, data: Path, tmp_path: Path) -> None:
    first = single_rows(data)[0]
    size, row = len(first["observation.state"]), STEPS + 9
    small: dict[str, Any] = {"backbone": "patch", "size": 32, "idm_channels": (8,), "fdm_channels": (8,)}
    config = ClamConfig(observations="both", state_size=size, hidden=16, decoder=(16,), **small)
    config.build().eval().save_pretrained(tmp_path / "lam")
    options = {"lam_num_learned_tokens": 1, "lam_action_latent_dim": 8, "lam_frame_gap": GAP}
    options |= {"use_precomputed_lam_tokens": False, "lam_model_path": str(tmp_path / "lam")}
    built = build(kind, data, **options)
    tokens = condition(built.policy)
    built.policy.forward(built.before(batch_of(built, [row, row])))
    rows = [single_rows(data)[i] for i in range(row - 2 * GAP, row + 1, GAP)]
    frames = torch.stack([(item[CAMERA] * 255).round().byte() for item in rows])
    states = torch.stack([item["observation.state"] for item in rows])
    latent = load_lam(tmp_path / "lam").encode(frames, states=states).continuous[:, -1:].flatten(2)
    torch.testing.assert_close(tokens[0], latent.expand(2, -1, -1))
    built.policy.eval().reset()
    built.policy.select_action(built.before(observation(built, row)))
    replace(config, state_size=size + 1).build().eval().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=f"must have the {size + 1} values that the LAM clam"):
        build(kind, data, **options | {"lam_model_path": str(tmp_path / "other")})


@both
def test_on_the_fly_leaves_the_hosts_inputs_alone(kind: str, data: Path, lam: Path) -> None:
    made = build(kind, data, use_precomputed_lam_tokens=False, lam_model_path=str(lam))
    plain = build(kind, data)
    batch, wanted = (b.before(batch_of(b, [4, 15])) for b in (made, plain))
    own = made.policy._host_rows(batch)
    for key in (CAMERA, "observation.state"):
        assert torch.equal(own[key], wanted[key]), key


@both
def test_no_checkpoint_holds_the_lam_and_another_lam_is_refused(
    kind: str, data: Path, lam: Path, tmp_path: Path
) -> None:
    built = build(kind, data, use_precomputed_lam_tokens=False, lam_model_path=str(lam))
    precomputed = build(kind, data)
    assert built.policy.state_dict().keys() == precomputed.policy.state_dict().keys()
    built.policy.save_pretrained(tmp_path / "saved")
    config: Any = PreTrainedConfig.from_pretrained(tmp_path / "saved")
    assert config.lam_weights == load_lam(lam).spec.weights != ""
    get_policy_class(kind).from_pretrained(tmp_path / "saved", config=config)
    other = write_lam(tmp_path / "other", seed=1)
    config = PreTrainedConfig.from_pretrained(tmp_path / "saved", cli_overrides=[f"--lam_model_path={other}"])
    with pytest.raises(UserError, match="must be of the LAM with weights"):
        get_policy_class(kind).from_pretrained(tmp_path / "saved", config=config)


# --- acting


@both
@pytest.mark.parametrize("precomputed", [True, False])
def test_acting_sees_what_training_saw(kind: str, precomputed: bool, data: Path, lam: Path) -> None:
    changes = {"n_obs_steps": 3} if kind == "lam_diffusion" else {}
    built = build(
        kind,
        data,
        n_action_steps=1,
        lam_temporal_aggregation="concat",
        use_precomputed_lam_tokens=precomputed,
        lam_model_path=str(lam),
        **changes,
    )
    policy = built.policy.eval()
    seen = condition(policy)
    rows = range(STEPS, STEPS + 6)
    with torch.inference_mode():
        policy.forward(built.before(batch_of(built, [*rows])))
        learned = seen.pop()
        for _ in range(2):  # a second episode begins afresh
            policy.reset()
            for row in rows:
                extra = (TOKENS,) if precomputed else ()
                action = built.after(policy.select_action(built.before(observation(built, row, *extra))))
                assert action.shape == (1, 2)
    acted = torch.cat(seen)
    torch.testing.assert_close(acted[:6], learned)
    torch.testing.assert_close(acted[6:], learned)


def test_every_step_of_the_hosts_queue_has_the_latest_guide(data: Path) -> None:
    built = build("lam_diffusion", data, n_action_steps=2)
    policy = built.policy.eval()
    given, wanted = [], []
    generate = policy.diffusion.generate_actions
    policy.diffusion.generate_actions = lambda batch, noise=None: (
        given.append(batch) or generate(batch, noise)
    )
    policy.diffusion.lam_encoder.register_forward_hook(lambda _, __, out: wanted.append(out))
    with torch.inference_mode():
        for row in range(5):
            policy.select_action(built.before(observation(built, row, TOKENS)))
    assert len(given) == len(wanted) == 3, "one prediction for two actions"
    for batch, projected in zip(given, wanted, strict=True):
        assert torch.equal(batch["observation.environment_state"], projected[:, None].expand(-1, 2, -1))


@both
def test_without_a_guide(kind: str, data: Path) -> None:
    with torch.inference_mode():
        built = build(kind, data)
        with pytest.raises(UserError, match="Give a guide with `latentact imitate`"):
            built.policy.eval().select_action(built.before(observation(built, 0)))
        built = build(kind, data, lam_dropout=0.5, n_action_steps=1)
        policy = built.policy.eval()
        seen = condition(policy)
        policy.select_action(built.before(observation(built, 0, TOKENS)))
        policy.select_action(built.before(observation(built, 1)))
    assert len(seen) == 1, "the second step has no guide, and forgets the first one's"


@both
def test_training_never_goes_without_a_guide(kind: str, data: Path) -> None:
    built = build(kind, data, lam_dropout=0.5)
    batch = built.before(batch_of(built, [0, 1]))
    del batch[TOKENS]
    with pytest.raises(UserError, match=r"must hold 'observation\.lam_tokens'"):
        built.policy.train().forward(batch)


@both
@pytest.mark.parametrize("precomputed", [True, False])
def test_saved_and_loaded_it_acts_the_same(
    kind: str, precomputed: bool, data: Path, lam: Path, tmp_path: Path
) -> None:
    built = build(kind, data, use_precomputed_lam_tokens=precomputed, lam_model_path=str(lam))
    built.policy.save_pretrained(tmp_path)
    built.before.save_pretrained(tmp_path)
    built.after.save_pretrained(tmp_path)
    loaded = get_policy_class(kind).from_pretrained(tmp_path)
    pipelines = make_pre_post_processors(loaded.config, pretrained_path=str(tmp_path))
    actions = []
    for policy, (before, after) in ((built.policy.eval(), (built.before, built.after)), (loaded, pipelines)):
        policy.reset()
        torch.manual_seed(3)
        with torch.inference_mode():
            extra = (TOKENS,) if precomputed else ()
            actions.append(after(policy.select_action(before(observation(built, 3, *extra)))))
    assert torch.equal(*actions)


# --- data that does not fit


@both
def test_data_that_does_not_fit(kind: str, data: Path, lam: Path) -> None:
    def check(root: Path = data, **changes: Any) -> None:
        config: Any = CONFIGS[kind](**settings(kind, **changes))
        config.check_dataset(LeRobotDatasetMetadata("local/tokens", root=root))

    check()
    with pytest.raises(UserError, match=r"= 12 values per row, got 8\. Set both"):
        check(lam_num_learned_tokens=3)
    with pytest.raises(
        UserError, match=r"must have a column 'observation\.lam_tokens', got none\. Add it with"
    ):
        check(data.parent / "plain")
    fly = {"use_precomputed_lam_tokens": False, "lam_model_path": str(lam)}
    check(**fly)
    with pytest.raises(UserError, match=r"Set lam_num_learned_tokens=2 and lam_action_latent_dim=4"):
        check(lam_action_latent_dim=8, **fly)
    with pytest.raises(UserError, match=r"span 0\.2 s.*Set lam_frame_gap=2"):
        check(lam_frame_gap=5, **fly)


def test_cameras_for_the_lam() -> None:
    config = LamDiffusionConfig(**settings("lam_diffusion"))
    image = PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE))
    config.input_features = {CAMERA: image}
    assert config.lam_camera == CAMERA
    config.input_features["observation.images.wrist"] = image
    with pytest.raises(UserError, match=r"must be one of observation\.images\.top, observation"):
        _ = config.lam_camera
    config.lam_camera_key = "observation.images.wrist"
    assert config.lam_camera == "observation.images.wrist"


@both
def test_provenance_of_the_column_is_checked_and_kept(kind: str, data: Path, lam: Path) -> None:
    def check(**changes: Any) -> Any:
        config: Any = CONFIGS[kind](**settings(kind, **changes))
        config.check_dataset(LeRobotDatasetMetadata("local/tokens", root=data))
        return config

    path, spec = data / "meta" / "lam_tokens.json", vars(load_lam(lam).spec)
    path.write_text(json.dumps({"spec": spec, "tokens": "continuous"}))
    try:
        config = check()
        assert (config.lam_weights, config.lam_frame_gap_s, config.lam_fps) == (spec["weights"], 0.2, 10.0)
        with pytest.raises(UserError, match="Set lam_use_vq_tokens=false, or precompute the other kind"):
            check(lam_use_vq_tokens=True)
        with pytest.raises(UserError, match=r"Set lam_num_learned_tokens=2 and lam_action_latent_dim=4"):
            check(lam_num_learned_tokens=1, lam_action_latent_dim=8)
        with pytest.raises(UserError, match="must be of the LAM with weights another"):
            check(lam_weights="another")
    finally:
        path.unlink()
