"""Vision-language-action models: what they learn, what they may see, and their checkpoints."""

import json
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

import toy_vlms
from latentact.errors import UserError
from latentact.policies.vla.backbone import load_vlm, set_resolution
from latentact.policies.vla.heads import HEADS, ActionHeadConfig
from latentact.policies.vla.model import Vla, VlaConfig, VlaSpec
from latentact.policies.vla.plan import LAPA, plan
from latentact.policies.vla.samples import VlaBatch
from latentact.training.fit import fit
from latentact.training.settings import TrainingConfig
from latentact.types import ActionSpace

TINY = VlaConfig(vlm="tiny", prompt="{task}", freeze_vision=False)
TWO = replace(LAPA, tokens=2, codebook_size=4)
NUMBERS = replace(LAPA, tokens=2, token_dim=3, codebook_size=None)
MOVES = ActionSpace(kind="continuous", size=2)


def images(count=4, size=16, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(256, size=(count, 3, size, size), dtype=np.uint8))


def model(latent=TWO, config=TINY, head=None, kind="tiny", **spec):
    torch.manual_seed(0)
    spec = VlaSpec(resolution=16, action_space=MOVES if head else None, **spec)
    if kind == "tiny":
        return Vla.create(config, spec, latent, head).eval()
    vlm, processor = toy_vlms.build(kind)
    set_resolution(processor, 16)
    return Vla(config, spec, latent, vlm, processor, head).eval()


@pytest.mark.parametrize("kind", toy_vlms.KINDS)
def test_a_code_sees_those_before_it_only(kind):
    vla = model(replace(TWO, tokens=4), kind=kind)
    inputs = vla.prepare_inputs(images(), ["push", "pull it", "go", "stop there"])
    codes = torch.zeros(4, 3, dtype=torch.long)
    with torch.no_grad():
        logits = vla.code_logits(inputs, None, codes)
        assert logits.shape == (4, 4, 4)
        for position in range(3):
            changed = codes.clone()
            changed[:, position] = 3
            other = vla.code_logits(inputs, None, changed)
            assert torch.equal(other[:, : position + 1], logits[:, : position + 1])
            assert not torch.allclose(other[:, position + 1], logits[:, position + 1], atol=1e-5)
        # Padding on the left changes nothing.
        alone = vla.code_logits(vla.prepare_inputs(images()[:1], ["push"]), None, codes[:1])
        assert torch.allclose(alone, logits[:1], atol=1e-4)
        # The image and the text matter.
        assert not torch.allclose(
            vla.code_logits(vla.prepare_inputs(images(seed=1), ["push"] * 4), None, codes)[0],
            alone[0],
            atol=1e-5,
        )
        decoded = vla.decode(inputs, None)
    assert decoded.shape == (4, 4)
    assert decoded.dtype == torch.long
    assert 0 <= decoded.min() <= decoded.max() < 4


def test_a_loaded_model_checkpoints_activations(tmp_path, monkeypatch):
    """Also when the vision-language model comes from a folder, and when it gets an action head."""
    model().save_pretrained(tmp_path / "vla")
    config = replace(TINY, vlm=str(tmp_path / "vla/vlm"), gradient_checkpointing=True)
    vla = Vla.create(config, VlaSpec(resolution=16), TWO)
    head = ActionHeadConfig(chunk_size=2, n_action_steps=1)
    for trained in (vla, vla.eval().with_actions(config, MOVES, head, 0.1)):
        calls = []
        for layer in trained.vlm.modules():
            if (inner := getattr(layer, "_gradient_checkpointing_func", None)) is not None:
                spy = mock.Mock(side_effect=inner)
                monkeypatch.setattr(layer, "_gradient_checkpointing_func", spy)
                calls.append(spy)
        trained.latent_loss(toy(trained))
        assert any(spy.called for spy in calls)


def toy(vla):
    """All eight of: plain image of four colors, one of two verbs. The first code is the color, the second the
    color plus one plus the verb, so that it takes the image, the text and the first code."""
    color, verb = torch.arange(8) % 4, torch.arange(8) // 4
    table = torch.tensor([(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30)], dtype=torch.uint8)
    frames = table[color][:, :, None, None].expand(-1, -1, 16, 16).contiguous()
    codes = torch.stack([color, (color + 1 + verb) % 4], dim=1)
    inputs = vla.prepare_inputs(frames, [("push", "pull")[v] for v in verb])
    return VlaBatch(inputs=inputs, latent=codes, latent_mask=torch.ones(8, dtype=torch.bool))


def steps(vla, count):
    batch = toy(vla)
    optimizer = torch.optim.AdamW([p for p in vla.train().parameters() if p.requires_grad], 3e-3)
    for _ in range(count):
        loss, _ = vla.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vla.eval()


def test_codes_of_image_and_text_are_learned():
    vla = steps(model(), 60)
    assert torch.equal(vla.decode(toy(vla).inputs, None), toy(vla).latent)


def test_checkpoint_of_adapters(tmp_path):
    """Adapters train alone; a checkpoint has them merged, and transformers loads its part, too."""
    vla = model(config=replace(TINY, lora_rank=4, freeze_vision=True, gradient_checkpointing=True))
    trained = {name for name, p in vla.named_parameters() if p.requires_grad}
    before = {name: p.clone() for name, p in vla.named_parameters()}
    steps(vla, 3)
    changed = {name for name, p in vla.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained
    assert {name for name in trained if "lora_" not in name} == {
        *("own.latent_embed.weight", "own.latent_head.weight", "own.latent_head.bias")
    }
    assert not any("visual" in name for name in trained)
    batch = toy(vla)
    with torch.no_grad():
        logits = vla.code_logits(batch.inputs, None, batch.latent[:, :-1])
        vla.save_pretrained(tmp_path / "vla")
        again = Vla.from_pretrained(tmp_path / "vla")
        loaded = again.code_logits(batch.inputs, None, batch.latent[:, :-1])
        assert torch.allclose(loaded, logits, atol=1e-4)
        plain, _ = load_vlm(str(tmp_path / "vla/vlm"), 16)
        mine, theirs = (m.eval()(**batch.inputs, use_cache=False).logits for m in (again.vlm, plain))
    assert torch.equal(mine, theirs)
    assert json.loads((tmp_path / "vla/config.json").read_text())["vla"]["lora_rank"] == 0
    assert not {p.suffix for p in (tmp_path / "vla").rglob("*.*")} - {".safetensors", ".json", ".jinja"}
    (tmp_path / "vla/vlm/model.safetensors").write_bytes(b"1" * 100)
    with pytest.raises(UserError, match="vlm must be tiny, a folder or a hub id that can be read"):
        Vla.from_pretrained(tmp_path / "vla")


class Toys(torch.utils.data.Dataset):
    def __init__(self, vla):
        self.vla = vla

    def __len__(self):
        return 8

    def __getitems__(self, positions):
        whole = toy(self.vla)
        return replace(whole, latent_mask=torch.isin(torch.arange(8), torch.tensor(positions)))


def test_resumed_training_is_bit_equal(tmp_path):
    settings = {"steps": 6, "batch_size": 4, "checkpoint_every": 3, "log_every": 1, "eval_every": 4}
    config = TrainingConfig(**settings, device="cpu", precision="32-true")

    def keep(last):
        if not last:
            shutil.copytree(tmp_path / "whole/checkpoints", tmp_path / "cut/checkpoints", dirs_exist_ok=True)
        return {}

    ends = []
    for name in ("whole", "cut"):
        vla = model(config=replace(TINY, gradient_checkpointing=True))
        fit(vla, Toys(vla), config, tmp_path / name, keep if name == "whole" else None)
        ends.append(vla.state_dict())
    assert [path.name for path in (tmp_path / "cut/checkpoints").iterdir()] == ["step=00000006"]
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())


@pytest.mark.parametrize("regression", ["l1", "mse"])
def test_numbers_without_codes(regression):
    vla = model(NUMBERS, replace(TINY, regression=regression, use_state=True), state_size=2)
    numbers = np.random.default_rng(0).normal(3, 2, (64, 2, 3)).astype(np.float32)
    vla.set_stats(numbers, np.arange(128, dtype=np.float32).reshape(64, 2))
    inputs, state = vla.prepare_inputs(images(), ["go"] * 4), torch.tensor([[64.0, 65.0]] * 4)
    decoded = vla.decode(inputs, state)
    assert decoded.shape == (4, 2, 3)
    mask = torch.tensor([True, True, False, True])
    target = decoded.clone()
    target[0] += 2 * vla.own.latent_std  # two units in one of three samples
    target[2] += 100
    loss, _ = vla.loss(VlaBatch(inputs=inputs, latent=target, latent_mask=mask, state=state))
    assert loss.item() == pytest.approx({"l1": 2, "mse": 4}[regression] / 3, rel=1e-4)
    assert not torch.allclose(vla.decode(inputs, state + 50), decoded, atol=1e-4)
    with pytest.raises(UserError, match=r"observation.state must have 2 values, got none"):
        vla.decode(inputs, None)


def test_masked_rows_do_not_count():
    vla = model()
    batch = toy(vla)
    half = replace(batch, latent_mask=torch.arange(8) < 4)
    kept = VlaBatch(
        inputs=vla.prepare_inputs(images(8), ["a"] * 8),
        latent=batch.latent,
        latent_mask=torch.zeros(8, dtype=torch.bool),
    )
    assert vla.loss(kept)[0].item() == 0
    changed = half.latent.clone()
    changed[4:] = 0
    assert vla.loss(half)[0].item() == pytest.approx(vla.loss(replace(half, latent=changed))[0].item())


def test_a_prompt_longer_than_the_context_is_refused():
    with pytest.raises(
        UserError, match=r"must have at most 2048 tokens for this vlm, got 3\d\d\d with 'go go"
    ):
        model().prepare_inputs(images(1), ["go " * 1000])


def test_models_of_another_kind_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"image-text-to-text model, got .* of type 'llama'"):
        load_vlm(str(tmp_path), 16)
    with pytest.raises(UserError, match=r"vlm must be tiny, a folder or a hub id that can be read, got"):
        load_vlm(str(tmp_path / "nothing"), 16)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", (0.677, 8.292)),
        ("Qwen/Qwen3-VL-2B-Instruct", (0.407, 2.128)),
        ("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", (0.086, 0.460)),
    ],
)
def test_plan_of_published_models(name, parameters):
    settings = {"resolution": 224, "task": "", "batch_size": 256, "steps": 1000, "accumulate": 1}
    settings |= {"devices": 8, "sharded": True, "bf16": True, "tflops": 400.0}
    config = VlaConfig(vlm=name, gradient_checkpointing=True)
    found = plan(config, LAPA, **settings)
    assert (found.vision / 1e9, (found.vision + found.text) / 1e9) == pytest.approx(parameters, abs=6e-4)
    assert found.own < 1e6
    whole = plan(replace(config, freeze_vision=False), LAPA, **settings)
    assert whole.trained > found.trained
    assert found.state_bytes == 16 * found.trained + 4 * (
        found.vision + found.text + found.own - found.trained
    )
    if "7B" in name:
        assert found.state_bytes_all_trained / 1e9 == pytest.approx(133, abs=0.5)
        assert found.state_bytes_all_trained / 8e9 == pytest.approx(16.6, abs=0.05)
        tokens = found.sequence * 256
        assert found.tokens_per_step == tokens
        # 6 operations per trained weight and position, 2 of them once more for checkpointing.
        blocks = found.text - 2 * 152064 * 3584
        assert found.flops_per_step == pytest.approx(
            8 * blocks * tokens + 2 * found.vision * 256 * 256, rel=1e-3
        )
        assert found.hours == pytest.approx(1000 * found.flops_per_step / (8 * 400e12) / 3600)
    assert "GB on each of 8 devices" in str(found)


def test_action_heads_by_hand():
    hidden, mask = torch.zeros(1, 2, 8), torch.tensor([[True, False]])
    config = ActionHeadConfig(chunk_size=2, n_action_steps=1, bins=4)
    data = np.array([[0.0, 10.0], [1.0, 10.0], [2.0, 20.0], [3.0, 20.0]], dtype=np.float32)

    chunk = HEADS["chunk"](config, MOVES, 8)
    chunk.set_stats(data)
    torch.nn.init.zeros_(chunk.net[-1].weight)
    torch.nn.init.zeros_(chunk.net[-1].bias)
    assert torch.allclose(chunk.actions(hidden), torch.tensor([1.5, 15.0]).expand(1, 2, 2))
    actions = torch.tensor([[[1.5 + 2 * 1.25**0.5, 15.0], [99.0, 99.0]]])
    assert chunk.loss(hidden, actions, mask).item() == pytest.approx(1.0)  # two deviations off in one of two

    bins = HEADS["bins"](replace(config, kind="bins"), MOVES, 8)
    bins.set_stats(data)
    assert torch.allclose(bins.edges[0], torch.tensor([0.0, 0.75, 1.5, 2.25, 3.0]))
    torch.nn.init.zeros_(bins.net[-1].weight)
    with torch.no_grad():
        bins.net[-1].bias.copy_(torch.tensor([0.0, 0, 20, 0, 20, 0, 0, 0]))
    assert torch.allclose(bins.actions(hidden), torch.tensor([1.875, 10.0]).expand(1, 2, 2))
    inside = torch.tensor([[[1.9, 14.0], [0.0, 0.0]]])
    assert bins.classes(inside)[0, 0].tolist() == [2, 1]
    assert bins.loss(hidden, inside, mask).item() == pytest.approx(10.0, abs=1e-3)

    classes = HEADS["chunk"](config, ActionSpace(kind="discrete", size=3), 8)
    chosen = classes.actions(hidden)
    assert chosen.shape == (1, 2)
    assert chosen.dtype == torch.long
    with pytest.raises(UserError, match=r"head.kind must be chunk for discrete actions, got 'bins'"):
        HEADS["bins"](replace(config, kind="bins"), ActionSpace(kind="discrete", size=3), 8)


def test_bins_have_equal_frequency_and_keep_numbers_that_repeat():
    """LAPA's 256 bins: about ten of 2560 actions in each, whatever their distribution; a gripper is exact."""
    bins = HEADS["bins"](ActionHeadConfig(kind="bins", chunk_size=1, n_action_steps=1), MOVES, 8)
    rng = np.random.default_rng(0)
    data = np.stack([rng.exponential(size=2560), rng.integers(2, size=2560)], 1).astype(np.float32)
    bins.set_stats(data)
    classes = bins.classes(torch.from_numpy(data)[:, None])[:, 0]
    counts = torch.bincount(classes[:, 0], minlength=256)
    assert len(counts) == 256
    assert counts.max() - counts.min() <= 2
    middles = (bins.edges[:, 1:] + bins.edges[:, :-1]) / 2
    assert torch.equal(middles[1][classes[:, 1]], torch.from_numpy(data[:, 1]))
    far = torch.tensor([[[-5.0, -5.0]], [[1e6, 1e6]]])  # outside of the data: the first and the last bin
    assert bins.classes(far)[:, 0].tolist() == [[0, 0], [255, 255]]


def test_flow_by_hand(monkeypatch):
    """Noise 2 and action 1 (normalized): the velocity is 1 at every time, and Euler steps are straight."""
    config = ActionHeadConfig(kind="flow", chunk_size=2, n_action_steps=1, flow_steps=4)
    flow = HEADS["flow"](config, MOVES, 8).eval()
    flow.set_stats(np.array([[0.0, 0.0], [2.0, 4.0]], dtype=np.float32))  # means 1 and 2, deviations 1 and 2
    assert flow.actions(torch.zeros(3, 2, 8)).shape == (3, 2, 2)
    seen = []

    def velocity(hidden, mixed, time):
        seen.append((mixed, time))
        return torch.full_like(mixed, 4.0)

    monkeypatch.setattr(flow, "_velocity", velocity)
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.full_like(like, 2.0))
    monkeypatch.setattr(torch, "rand", lambda *size, **more: torch.tensor([0.0, 1.0, 0.125]))
    actions = torch.tensor([2.0, 4.0]).expand(3, 2, 2)
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    assert flow.loss(torch.zeros(3, 2, 8), actions, mask).item() == pytest.approx(9.0)  # (4 - 1) squared
    ((mixed, time),) = seen
    assert time.tolist() == pytest.approx([0.001, 1.0, 0.999 * 0.25 + 0.001])  # 0.125 ** (1 / 1.5) = 0.25
    assert mixed[:, 0, 0].tolist() == pytest.approx([1.001, 2.0, 1 + 0.999 * 0.25 + 0.001])

    seen.clear()
    target = torch.tensor([0.5, -1.0])
    monkeypatch.setattr(flow, "_velocity", lambda h, x, t: seen.append(t[0].item()) or (x - target) / t[0])
    found = flow.actions(torch.zeros(3, 2, 8))
    assert torch.allclose(found, torch.tensor([1.5, 0.0]).expand(3, 2, 2), atol=1e-6)
    assert seen == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("kind", ["chunk", "bins", "flow"])
def test_statistics_are_in_the_checkpoint(kind, tmp_path):
    head = ActionHeadConfig(kind=kind, chunk_size=2, n_action_steps=1, bins=8)
    base = model(NUMBERS, replace(TINY, use_state=True), state_size=2)
    rng = np.random.default_rng(0)
    base.set_stats(
        rng.normal(3, 2, (64, 2, 3)).astype(np.float32), rng.normal(5, 7, (64, 2)).astype(np.float32)
    )
    vla = base.with_actions(base.config, MOVES, head, 0.1).eval()
    vla.own.actions.set_stats(rng.normal(100, 30, (64, 2)).astype(np.float32))
    vla.save_pretrained(tmp_path / "vla")
    again = Vla.from_pretrained(tmp_path / "vla")
    for name in ("actions.mean", "actions.std", "state_mean", "state_std", "latent_mean", "latent_std"):
        saved = again.own.state_dict()[name]
        assert torch.equal(saved, vla.own.state_dict()[name])
        assert saved.std() > 0
    inputs, state = vla.prepare_inputs(images(), ["go"] * 4), torch.tensor([[4.0, 5.0]] * 4)
    assert torch.equal(again.actions(inputs, state), vla.actions(inputs, state))
    assert torch.equal(again.decode(inputs, state), vla.decode(inputs, state))


@pytest.mark.parametrize("kind", ["chunk", "bins", "flow"])
def test_actions_beside_the_latent_loss(kind):
    head = ActionHeadConfig(kind=kind, chunk_size=3, n_action_steps=1, bins=8)
    base = model()
    vla = base.with_actions(TINY, MOVES, head, 0.5)
    batch = replace(toy(vla), actions=torch.rand(8, 3, 2), action_mask=torch.ones(8, 3, dtype=torch.bool))
    torch.manual_seed(1)
    loss, metrics = vla.loss(batch)
    assert loss.item() == pytest.approx(metrics["action_loss"].item() + 0.5 * metrics["latent_loss"].item())
    loss.backward()
    assert all(p.grad is not None for p in vla.parameters() if p.requires_grad)
    assert vla.actions(batch.inputs, None).shape == (8, 3, 2)
