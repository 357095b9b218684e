"""No action of an unlabeled episode reaches any training step.

Every action of the data is the number of its episode, so that an action that is seen says where it is from.
Two proofs for every stage that trains: the actions that losses are given belong to labeled episodes, all of
them; and data whose other actions are random trains the same weights, bit by bit.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import write_blocks
from latentact.data.cache import DataConfig, open_store
from latentact.data.mixture import TrainingDataConfig
from latentact.data.samples import PolicyBatch
from latentact.data.splits import choose_labeled, split_episodes
from latentact.data.store import FrameStore
from latentact.data.windows import Clips
from latentact.lams.models.idm import IdmConfig
from latentact.lams.models.lapo import LapoConfig
from latentact.policies.bc import BcConfig
from latentact.policies.contract import Policy
from latentact.policies.decoder import DecoderConfig
from latentact.policies.latent import LatentConfig
from latentact.policies.network import NetworkConfig
from latentact.policies.vla.heads import ActionHeadConfig
from latentact.policies.vla.model import VlaConfig
from latentact.policies.vla.samples import VlaBatch
from latentact.quantizers.none import WhitenedConfig
from latentact.stages import finetune, finetune_vla, ground, label, train_lam, train_policy, train_vla
from latentact.training.settings import TrainingConfig
from latentact.types import Clip

EPISODES, K = 8, 3
NETWORK = NetworkConfig(backbone="patch", patch=8, channels=(8,), chunk_size=2)
TRAINING = TrainingConfig(steps=12, batch_size=16, eval_every=6, device="cpu")
LAPO = LapoConfig(
    backbone="patch",
    size=32,
    patch=8,
    idm_channels=(8,),
    fdm_channels=(8,),
    bottleneck=WhitenedConfig(dim=4),
)
JOINT = LapoConfig(
    backbone="patch",
    size=32,
    patch=8,
    idm_channels=(8,),
    fdm_channels=(8,),
    bottleneck=WhitenedConfig(dim=4),
    action_weight=1.0,
)
IDM = IdmConfig(backbone="patch", size=32, patch=8, channels=(8,))


def data(path, kind=DataConfig):
    return kind(path=str(path), resolution=32)


@pytest.fixture(scope="module")
def labeled(honest):
    train, _ = split_episodes(open_store(data(honest)), held_out=0.1, seed=0)
    return choose_labeled(train, K, 0)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Data whose actions are the numbers of their episodes."""
    path = write_blocks(tmp_path_factory.mktemp("honest") / "blocks.npz")
    arrays = dict(np.load(path))
    arrays["action"] = np.repeat(np.arange(EPISODES), len(arrays["action"]) // EPISODES)
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def poisoned(honest, labeled, tmp_path_factory):
    """The same, but the actions of all other episodes, held out or not, are random."""
    path = tmp_path_factory.mktemp("poisoned") / "blocks.npz"
    arrays = dict(np.load(honest))
    hidden = ~np.isin(arrays["action"], labeled)
    drawn = np.random.default_rng(0).integers(EPISODES, size=len(hidden))
    arrays["action"] = np.where(hidden, drawn, arrays["action"])
    np.savez(path, **arrays)
    return path


@pytest.fixture
def seen(monkeypatch):
    """All actions that a loss is given, and the latent policy's targets left out."""
    actions = []

    def watch(stage):
        fit = stage.fit

        def spied(model, *arguments, **options):
            loss = model.loss

            def recording(batch):
                if model.training:  # held-out episodes are evaluated in evaluation mode
                    actions.extend(_actions(batch))
                return loss(batch)

            model.loss = recording
            fit(model, *arguments, **options)

        monkeypatch.setattr(stage, "fit", spied)

    for stage in (train_lam, train_policy, ground, finetune, train_vla, finetune_vla):
        watch(stage)
    return actions


def _actions(batch):
    if isinstance(batch, Clip):
        assert batch.action is not None
        return batch.action[batch.labeled].tolist()
    if isinstance(batch, PolicyBatch):
        return [] if batch.target.is_floating_point() else batch.target[..., 0][batch.mask].tolist()
    if isinstance(batch, VlaBatch):
        return [] if batch.actions is None else batch.actions[batch.action_mask].tolist()
    return batch.actions.flatten().tolist()


def lam(path, out, config, k):
    settings = train_lam.TrainLamConfig(
        data=data(path, TrainingDataConfig),
        lam=config,
        training=TRAINING,
        labeled_episodes=k,
        labeled_share=0.5,
    )
    return train_lam.run(settings, out)


def bc(path, out):
    settings = train_policy.TrainPolicyConfig(
        data=data(path, TrainingDataConfig),
        policy=BcConfig(network=NETWORK),
        training=TRAINING,
        labeled_episodes=K,
    )
    return train_policy.run(settings, out)


def grounded(path, out, self_training=False):
    """LAM, labels, latent policy and its grounding, with fine-tuning."""
    model = lam(path, out / "lam", LAPO, 0)
    labels = label.run(label.LabelConfig(lam=str(model), data=data(path), out=str(out / "labels")))
    network = LatentConfig(network=NETWORK)
    settings = train_policy.TrainPolicyConfig(labels=str(labels), policy=network, training=TRAINING)
    policy = train_policy.run(settings, out / "policy")
    last = ground.GroundConfig(
        policy=str(policy),
        labels=str(labels),
        labeled_episodes=K,
        decoder=DecoderConfig(hidden=(8,)),
        training=TRAINING,
        finetune_steps=12,
        self_training=self_training,
    )
    return ground.run(last, out / "ground")


def vla(path, out, pseudo_labels=False):
    """LAM, labels, a vision-language-action model and its fine-tuning."""
    model = lam(path, out / "lam", LAPO, 0)
    labels = label.run(label.LabelConfig(lam=str(model), data=data(path), out=str(out / "labels")))
    few = TrainingConfig(steps=4, batch_size=16, eval_every=0, device="cpu")
    tiny = VlaConfig(vlm="tiny", prompt="{task}", freeze_vision=False)
    first = train_vla.TrainVlaConfig(labels=str(labels), model=tiny, training=few, eval_rows=4)
    train_vla.run(first, out / "vla")
    second = finetune_vla.FinetuneVlaConfig(
        vla=str(out / "vla"),
        labels=str(labels),
        labeled_episodes=K,
        head=ActionHeadConfig(chunk_size=2, n_action_steps=1),
        pseudo_labels=pseudo_labels,
        decoder_training=few,
        training=few,
        eval_rows=4,
    )
    return finetune_vla.run(second, out / "finetuned").path


STAGES = {
    "train-lam joint": lambda path, out: lam(path, out, JOINT, K),
    "train-lam idm": lambda path, out: lam(path, out, IDM, K),
    "train-policy bc": bc,
    "ground": grounded,
    "finetune-vla": vla,
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
def test_losses_see_actions_of_all_labeled_episodes_and_of_no_other(stage, honest, labeled, seen, tmp_path):
    stage(honest, tmp_path)
    assert sorted(set(seen)) == labeled.tolist()


def test_a_lam_without_labels_sees_no_action(honest, seen, tmp_path):
    lam(honest, tmp_path / "lam", LAPO, 0)
    assert seen == []


def weights(folder):
    files = sorted(Path(folder).rglob("model.safetensors"))
    assert files
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
def test_other_actions_change_no_weight(stage, honest, poisoned, tmp_path):
    stage(honest, tmp_path / "honest")
    stage(poisoned, tmp_path / "poisoned")
    assert weights(tmp_path / "honest") == weights(tmp_path / "poisoned")


@pytest.mark.parametrize("stage", [partial(grounded, self_training=True), partial(vla, pseudo_labels=True)])
def test_other_actions_change_no_weight_of_self_training(stage, honest, poisoned, tmp_path):
    for path in (honest, poisoned):
        stage(path, tmp_path / path.parent.name)
    assert weights(tmp_path / honest.parent.name) == weights(tmp_path / poisoned.parent.name)


def test_self_training_keeps_known_actions_and_fills_the_others(honest, labeled, tmp_path):
    folder = grounded(honest, tmp_path)
    store, policy = open_store(data(honest)), Policy.from_pretrained(folder)
    train, held_out = split_episodes(store, held_out=0.1, seed=0)
    filled = finetune._pseudo_actions(
        policy, store, train, store.actions(labeled), TRAINING, tmp_path / "teacher"
    )
    known = np.isin(store.episode, labeled)
    assert (filled[known] == store.episode[known]).all()
    assert ((filled[~known] >= 0) & (filled[~known] < EPISODES))[np.isin(store.episode[~known], train)].all()
    assert not filled[np.isin(store.episode, held_out)].any()  # hidden, and never learned from


def test_a_teacher_also_learns_where_steps_have_no_latent_action(honest, labeled, tmp_path):
    folder = grounded(honest, tmp_path)
    store, policy = open_store(data(honest)), Policy.from_pretrained(folder)
    train, _ = split_episodes(store, held_out=0.1, seed=0)
    latents = torch.from_numpy(store.episode).float()[:, None].repeat(1, 2)
    latents[::5] = torch.nan
    filled = finetune._pseudo_actions(
        policy, store, train, store.actions(labeled), TRAINING, tmp_path / "teacher", latents
    )
    known, inside = np.isin(store.episode, labeled), np.isin(store.episode, train)
    assert (filled[known] == store.episode[known]).all()
    assert ((filled[inside & ~known] >= 0) & (filled[inside & ~known] < EPISODES)).all()


def test_labeled_actions_do_change_weights(honest, labeled, tmp_path):
    """The counterpart: the test above can fail."""
    path = tmp_path / "blocks.npz"
    arrays = dict(np.load(honest))
    rows = np.flatnonzero(arrays["action"] == labeled[0])
    arrays["action"][rows] = (arrays["action"][rows] + 1) % EPISODES
    np.savez(path, **arrays)
    for name, stage in STAGES.items():
        stage(honest, tmp_path / "honest" / name)
        stage(path, tmp_path / "changed" / name)
    honest_weights, changed = weights(tmp_path / "honest"), weights(tmp_path / "changed")
    same = {name for name in changed if changed[name] == honest_weights[name]}
    assert same == {
        *("ground/lam/model.safetensors", "ground/policy/model.safetensors"),
        *("finetune-vla/lam/model.safetensors", "finetune-vla/vla/model.safetensors"),
        "finetune-vla/vla/vlm/model.safetensors",
    }


def test_the_last_action_of_an_episode_is_never_used(honest, monkeypatch, seen, tmp_path):
    """It is a hold; here it is class 7 in data that has no other 7."""
    arrays = dict(np.load(honest))
    arrays["action"] = np.where(arrays["done"], 7, arrays["action"] % 7)
    np.savez(tmp_path / "blocks.npz", **arrays)
    for name, stage in STAGES.items():
        stage(tmp_path / "blocks.npz", tmp_path / name)
    assert seen
    assert 7 not in seen


def test_a_store_shows_only_the_named_actions(honest):
    store = open_store(data(honest))
    shown = store.actions([1, 4])
    assert set(shown[np.isin(store.episode, [1, 4])]) == {1, 4}
    assert shown.mask[~np.isin(store.episode, [1, 4])].all()
    assert store.actions([]).mask.all()
    for name in ("action", "action.left"):
        with pytest.raises(ValueError, match="column must not be an action"):
            store.column(name)
    clips = Clips(store, episodes=range(EPISODES), frame_gap=1, labeled=[2])
    clip = clips.clip(clips.rows)
    assert clip.action is not None
    assert clip.labeled is not None
    assert set(clip.action[clip.labeled].tolist()) == {2}
    assert clip.labeled.any()
    assert not clip.labeled.all()
    assert not clip.action[~clip.labeled].any()
    assert not any("action" in name for name in vars(FrameStore) if name not in ("actions",))
