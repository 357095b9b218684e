"""Quantizers by hand; the collapse of a codebook far from its features, and the guard that cures it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import latentact.quantizers.usage as guarding
from conftest import fork, ranks
from latentact.composition import load_experiment
from latentact.config import from_dict
from latentact.errors import UserError
from latentact.lams.models.lapo import LapoConfig
from latentact.quantizers.fsq import FsqConfig
from latentact.quantizers.kl import KlConfig
from latentact.quantizers.lfq import Lfq, LfqConfig
from latentact.quantizers.nsvq import Nsvq, NsvqConfig
from latentact.quantizers.quantizer import QUANTIZERS, BottleneckConfig, Quantizer
from latentact.quantizers.residual_vq import ResidualVq, ResidualVqConfig
from latentact.quantizers.usage import UsageGuard, usage
from latentact.quantizers.vq import Vq, VqConfig
from latentact.stages.train_lam import TrainLamConfig

CODES = ("vq_ema", "vq", "nsvq", "residual_vq")
PERIOD = 12


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "PERIOD", PERIOD)


def _config(kind: str, **settings: Any) -> BottleneckConfig:
    return from_dict(QUANTIZERS.get(kind), {"kind": kind, **settings})


def test_vq_by_hand() -> None:
    vq = Vq(VqConfig(dim=2, positions=2, codebook_size=2))
    vq.embedding.weight.data = torch.tensor([[0.0], [1.0]])
    x = torch.tensor([[0.2, 0.6]], requires_grad=True)
    out = vq(x)
    assert out.codes.tolist() == [[0, 1]]
    torch.testing.assert_close(out.vectors, torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(out.loss, torch.tensor(1.25 * (0.04 + 0.16) / 2))
    (out.vectors.sum() * 3).backward()  # straight through
    torch.testing.assert_close(x.grad, torch.full((1, 2), 3.0))


def test_fsq_of_two_levels_by_hand() -> None:
    fsq = FsqConfig(positions=2, levels=(2, 2, 2)).build().eval()  # BatchNorm is the identity here
    x = torch.tensor([[3.0, -3.0, 3.0, -3.0, -3.0, -3.0]])
    out = fsq(x)
    torch.testing.assert_close(out.vectors, torch.tensor([[1.0, -1.0, 1.0, -1.0, -1.0, -1.0]]))
    assert out.codes.tolist() == [[1 + 4, 0]]
    assert fsq.codebook_size == 8


def test_nsvq_noise_is_as_large_as_the_error() -> None:
    torch.manual_seed(0)
    nsvq = Nsvq(NsvqConfig(dim=12, positions=3, codebook_size=5))
    x = torch.randn(7, 12, requires_grad=True)
    nearest = nsvq.eval()(x)
    assert torch.equal(nearest.vectors.view(7, 3, 4), nsvq.codebooks[nearest.codes])
    noisy = nsvq.train()(x)
    assert torch.equal(noisy.codes, nearest.codes)
    error = [(each.vectors - x).view(7, 3, 4).norm(dim=2) for each in (nearest, noisy)]
    torch.testing.assert_close(error[0], error[1])
    assert not torch.equal(noisy.vectors, nsvq(x).vectors)
    noisy.vectors.square().sum().backward()
    assert nsvq.codebooks.grad is not None
    assert nsvq.codebooks.grad[nearest.codes.unique()].abs().sum(1).min() > 0


def test_nsvq_replaces_hardly_used_entries_on_its_schedule() -> None:
    nsvq = Nsvq(NsvqConfig(dim=1, positions=1, codebook_size=5)).train()
    entries = torch.tensor([[50.0], [0.0], [60.0], [10.0], [70.0]])
    nsvq.codebooks.data = entries.clone()
    x = torch.tensor([[0.0]] * 12 + [[10.0]] * 8)
    for step in range(10):
        nsvq(x)
        assert torch.equal(nsvq.codebooks, entries), step
    nsvq(x)  # step 10, the first that replaces: entries 0, 2, 4 take the used 1 and 3 in turn
    torch.testing.assert_close(nsvq.codebooks.data, torch.tensor([[0.0], [0], [10], [10], [0]]))
    assert nsvq.used.tolist() == [0, 0, 0, 0, 0]
    nsvq.codebooks.data = torch.tensor([[0.0], [1.0], [2.0], [10.0], [99.0]])
    for _ in range(10):
        nsvq(x)
    torch.testing.assert_close(nsvq.codebooks.data, torch.tensor([[0.0], [0], [10], [10], [0]]))


def test_lfq_codes_are_signs() -> None:
    lfq = Lfq(LfqConfig(positions=2, codebook_size=4)).eval()
    out = lfq(torch.tensor([[0.3, -0.2, -5.0, 0.1]]))
    assert out.codes.tolist() == [[2, 1]]
    assert out.vectors.tolist() == [[1, -1, -1, 1]]


def test_residual_vectors_are_sums_of_entries() -> None:
    torch.manual_seed(0)
    residual = ResidualVq(ResidualVqConfig(dim=8, codebooks=2, positions=2, codebook_size=4))
    residual.eval()
    x = torch.randn(5, 8) * 0.1
    out = residual(x)
    books = residual.vq.codebooks  # [level, entry, number]
    codes = out.codes.view(5, 2, 2)
    summed = books[0][codes[..., 0]] + books[1][codes[..., 1]]
    torch.testing.assert_close(out.vectors.view(5, 2, 4), summed)
    left = x.view(5, 2, 4) - books[0][codes[..., 0]]
    assert torch.equal(torch.cdist(left, books[1].expand(5, -1, -1)).argmin(-1), codes[..., 1])


@pytest.mark.parametrize("kind", ["vq", "nsvq", "vq_ema", "residual_vq"])
def test_sizes_that_do_not_fit_are_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"must be a multiple of the . tokens of {kind}"):
        _config(kind, dim=10, codebooks=1, positions=4)


def test_lfq_wants_a_power_of_two() -> None:
    with pytest.raises(UserError, match="power of two"):
        LfqConfig(codebook_size=12)


def test_a_setting_of_another_kind_has_no_effect_and_older_files_are_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = ["data.path=x", "out=y", "lam=laq", "lam.bottleneck.kind=fsq"]
    config = load_experiment("train_lam", TrainLamConfig, asked)
    assert config.lam.bottleneck == FsqConfig(positions=4)
    assert load_experiment("train_lam", TrainLamConfig, [*asked, "lam.bottleneck.dim=8"]) == config
    assert "lam.bottleneck.dim has no effect with lam.bottleneck.kind=fsq" in caplog.text
    older = {"kind": "kl", "dim": 8, "codebooks": 2, "positions": 4, "levels": [8, 5], "guard": False}
    assert from_dict(LapoConfig, {"bottleneck": older}).bottleneck == KlConfig(dim=8)
    with pytest.raises(UserError, match=r"KlConfig.kind must be kl, got 'vq'"):
        KlConfig(kind="vq")


def test_usage_by_hand() -> None:
    found = usage(torch.tensor([[4.0, 4, 0, 0], [8.0, 0, 0, 0]]))
    torch.testing.assert_close(found["perplexity"], torch.tensor(1.5))  # of 2 and 1
    assert found["usage"].item() == 3 / 8


def far_features(step: int) -> Tensor:
    """Features as reported of LAQ: a large constant and around it what tells them apart."""
    generator = torch.Generator().manual_seed(step)
    places = torch.randn(8, 16, generator=torch.Generator().manual_seed(99))
    chosen = torch.randint(8, (64,), generator=generator)
    return 10 + places[chosen] + 0.1 * torch.randn(64, 16, generator=generator)


def trained(quantizer: Quantizer, steps: int = 3 * PERIOD + 5) -> dict[str, float]:
    """Train a quantizer to hand features on, and return what it says at the last step."""
    optimizer = torch.optim.Adam([*quantizer.parameters(), torch.zeros(1, requires_grad=True)], 1e-3)
    metrics: dict[str, Tensor] = {}
    for step in range(steps):
        torch.manual_seed(step)
        x = far_features(step)
        out = quantizer.train()(x)
        metrics = out.metrics
        loss = (out.vectors - x).square().mean() + out.loss
        if loss.requires_grad:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize("kind", CODES)
def test_a_codebook_far_from_its_features_collapses_and_the_guard_cures_it(kind: str) -> None:
    torch.manual_seed(0)
    config = _config(kind, dim=16, codebooks=1, positions=1, codebook_size=8, decay=0.99)
    collapsed = trained(config.build())
    assert collapsed["perplexity"] < 2
    assert collapsed["usage"] <= 0.25
    cured = trained(replace(config, guard=True).build())
    assert cured["perplexity"] > 4
    assert cured["usage"] > 0.6
    if kind != "residual_vq":  # restarts by itself, and does not count
        assert cured["restarted"] >= 4


def test_the_guard_lets_used_codes_be() -> None:
    guard, x = UsageGuard(1, 3), torch.arange(6.0).view(1, 6, 1)
    for _ in range(PERIOD - 1):
        dead, _ = guard(torch.tensor([[4.0, 2.0, 0.0]]), x)
        assert not dead.any()
    dead, drawn = guard(torch.tensor([[4.0, 2.0, 0.0]]), x)
    assert dead.flatten().tolist() == [False, False, True]
    assert drawn.flatten().unique().numel() == 3  # no feature twice
    assert guard.restarted.item() == 1
    assert guard.window.sum() == 0


@pytest.mark.parametrize(("kind", "guard"), [*((kind, True) for kind in CODES), ("nsvq", False)])
def test_training_resumes_exactly(kind: str, guard: bool) -> None:
    torch.manual_seed(0)
    config = _config(kind, dim=16, codebooks=1, positions=1, codebook_size=8, guard=guard)
    whole = config.build().train()
    for step in range(PERIOD + 2):
        if step == PERIOD - 5:
            saved = copy.deepcopy(whole.state_dict())
        torch.manual_seed(step)
        whole(far_features(step))
    resumed = config.build().train()
    resumed.load_state_dict(saved)
    for step in range(PERIOD - 5, PERIOD + 2):
        torch.manual_seed(step)
        resumed(far_features(step))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    guarding.PERIOD = PERIOD
    for name, guard in (("published", False), ("guard", True)):
        torch.manual_seed(0)
        nsvq = Nsvq(NsvqConfig(dim=16, positions=1, codebook_size=8, guard=guard))
        torch.manual_seed(rank)  # processes that have drawn differently
        for step in range(PERIOD + 1):
            nsvq.train()(far_features(2 * step + rank) - 10)
        torch.save(nsvq.state_dict(), f"{folder}/{name}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_that_train_together_keep_one_codebook(tmp_path) -> None:
    both = [fork(_rank, int(rank["RANK"]), str(tmp_path), **rank) for rank in ranks(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    for name in ("published", "guard"):
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first), name
        torch.manual_seed(0)
        untouched = Nsvq(NsvqConfig(dim=16, positions=1, codebook_size=8))
        assert not torch.equal(first["codebooks"], untouched.codebooks.data)
