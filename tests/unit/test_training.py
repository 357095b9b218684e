"""The training loop: exact resume, batches by (seed, step), what is written and when it stops."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import distributed_training
from conftest import fork, ranks
from distributed_training import Toy
from latentact.errors import UserError
from latentact.quantizers.vq_ema import VqEmaConfig
from latentact.training.checkpoint_io import FolderCheckpointIO
from latentact.training.fit import fit
from latentact.training.loop import _Module, _parameter_groups
from latentact.training.metrics_csv import MetricsCsv
from latentact.training.run_folder import begin_run, discard_run, finished
from latentact.training.settings import TrainingConfig


class Batch:
    def __init__(self, positions):
        self.positions = positions

    def to(self, device):
        return self


class Positions(torch.utils.data.Dataset):
    """Its batches are the positions asked for, which it records."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 100

    def __getitems__(self, positions):
        self.asked.append(positions)
        return Batch(torch.tensor(positions))


class Noisy(nn.Module):
    """A model with noise, dropout and statistics, all of which a resumed run must find again."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.seen = []

    def loss(self, batch):
        self.seen.append(batch.positions.tolist())
        x = batch.positions.float()[:, None] / 100
        loss = (self.net(x + torch.randn_like(x)) - x.sin()).square().mean()
        return loss, {"noise": loss.detach() * 2}


class Killed(Exception):
    pass


def train(out, kill_at=None, **settings):
    """Train a model; `kill_at` ends it in the middle of that step, as a power cut would."""
    model, data = Noisy(), Positions()
    config = TrainingConfig(
        **{"steps": 12, "batch_size": 8, "checkpoint_every": 5, "log_every": 3, "device": "cpu", **settings}
    )
    loss = model.loss

    def cut(batch):
        if len(model.seen) == kill_at:
            raise Killed
        return loss(batch)

    model.loss = cut
    if kill_at is None:
        fit(model, data, config, out)
    else:
        with pytest.raises(Killed):
            fit(model, data, config, out)
    return model


def rows(out):
    with (out / "metrics.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


def equal(a, b):
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


class Plain(nn.Module):
    """A model whose loss equals one of its metrics, or with a codebook that training updates."""

    def __init__(self, coded):
        super().__init__()
        torch.manual_seed(0)
        config = VqEmaConfig(dim=4, codebooks=1, positions=1, codebook_size=4, decay=0.5, guard=False)
        self.into, self.out, self.codes = nn.Linear(1, 4), nn.Linear(4, 1), config.build() if coded else None

    def loss(self, batch):
        x = batch.positions.float()[:, None] / 100
        y, extra = self.into(x), x.new_zeros(())
        if self.codes is not None:
            found = self.codes(y)
            y, extra = found.vectors, found.loss
        error = (self.out(y) - x.sin()).square().mean()
        return error + extra, {"recon": error.detach()}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("coded", [False, True])
def test_compiled_training_equals_eager_training(tmp_path, coded):
    from torch._inductor import config as inductor

    with inductor.patch({"cpp.vec_isa_ok": True}):  # otherwise found by compiling programs
        for name in ("eager", "compiled"):
            compile = name == "compiled"
            config = TrainingConfig(steps=4, batch_size=8, device="cpu", compile=compile, log_every=1)
            fit(Plain(coded), Positions(), config, tmp_path / name)
    eager, compiled = rows(tmp_path / "eager"), rows(tmp_path / "compiled")
    assert len({row["train/loss"] for row in eager}) == 4
    for one, other in zip(eager, compiled, strict=True):
        assert float(other["train/loss"]) == pytest.approx(float(one["train/loss"]), rel=1e-2)


def test_shards_are_not_compiled():
    with pytest.raises(UserError, match=r"training\.compile must be false with strategy=fsdp, got true"):
        TrainingConfig(compile=True, strategy="fsdp")


def test_undisturbed_run(tmp_path):
    model = train(tmp_path)
    assert [int(row["step"]) for row in rows(tmp_path)] == [1, 3, 6, 9, 12]
    first, *_, last = rows(tmp_path)
    assert float(first["train/noise"]) == pytest.approx(2 * float(first["train/loss"]), rel=1e-4)
    assert set(last) == {"step", "train/loss", "train/noise"}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=00000012"]
    assert not model.training
    assert not equal(model, Noisy())


def test_betas_are_those_of_the_optimizer(tmp_path):
    quick = {"steps": 3, "batch_size": 4}
    plain = train(tmp_path / "a", **quick)
    assert equal(plain, train(tmp_path / "b", **quick, betas=(0.9, 0.999)))
    assert not equal(plain, train(tmp_path / "c", **quick, betas=(0.9, 0.99)))
    with pytest.raises(UserError, match=r"training\.betas must be two numbers"):
        TrainingConfig(betas=(0.9, 1.0))


@pytest.mark.parametrize("kill_at", [2, 5, 7, 11])
def test_resumed_run_ends_with_the_same_weights(kill_at, tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "cut", kill_at=kill_at)
    resumed = train(tmp_path / "cut")
    done = kill_at // 5 * 5
    assert resumed.seen == whole.seen[done:]
    assert equal(resumed, whole)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "cut/checkpoints").iterdir()] == ["step=00000012"]


def test_run_killed_after_its_last_step_has_its_weights(tmp_path):
    whole = train(tmp_path)
    again = train(tmp_path)
    assert again.seen == []
    assert equal(again, whole)
    assert not again.training


def test_half_written_checkpoint_is_not_taken(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "cut", kill_at=7)
    half = tmp_path / "cut/checkpoints/.step=00000010.77.partial"
    half.mkdir()
    (half / "state.json").write_text("{")
    assert equal(train(tmp_path / "cut"), whole)


def test_damaged_checkpoint_is_a_user_error(tmp_path):
    train(tmp_path, kill_at=7)
    state = tmp_path / "checkpoints/step=00000005/state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        train(tmp_path)


def test_batches_follow_from_seed_and_step(tmp_path):
    first = train(tmp_path / "a").seen
    assert train(tmp_path / "b").seen == first
    assert train(tmp_path / "c", steps=6).seen == first[:6]
    other = train(tmp_path / "d", seed=1).seen
    assert all(x != y for x, y in zip(first, other, strict=True))
    assert all(len(batch) == 8 for batch in first)
    assert len({tuple(batch) for batch in first}) == 12


def test_evaluation_sees_the_model_at_rest_and_changes_nothing(tmp_path):
    model, modes = Noisy(), []

    def evaluate(last):
        modes.append((model.training, torch.is_grad_enabled()))
        torch.rand(3)  # draws random numbers, which must not reach the next step
        return {"val/loss": 1.5}

    config = TrainingConfig(steps=12, batch_size=8, log_every=3, eval_every=4, device="cpu")
    fit(model, Positions(), config, tmp_path / "judged", evaluate)
    assert modes == [(False, False)] * 3
    found = {int(row["step"]): row["val/loss"] for row in rows(tmp_path / "judged")}
    assert found == {1: "", 3: "", 4: "1.5", 6: "", 8: "1.5", 9: "", 12: "1.5"}
    assert equal(model, train(tmp_path / "plain"))


def test_diverged_training_is_a_user_error(tmp_path):
    model = Noisy()
    nn.init.constant_(model.net[0].weight, float("nan"))
    config = TrainingConfig(steps=3, batch_size=8, device="cpu")
    with pytest.raises(UserError, match=r"the loss must be finite, got nan at step 1; lower training.lr"):
        fit(model, Positions(), config, tmp_path)
    assert not [*(tmp_path / "checkpoints").glob("*")]


def test_ctrl_c_reaches_the_command_line(tmp_path):
    """Lightning turns it into an exit with code 1; the command line says that it can go on."""
    model, before = Noisy(), signal.getsignal(signal.SIGINT)

    def interrupted(batch):
        raise KeyboardInterrupt

    model.loss = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(model, Positions(), TrainingConfig(steps=3, device="cpu"), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"precision": "float8"},
        {"strategy": "deepspeed"},
        {"device": "tpu"},
        {"log_every": 0},
    ],
)
def test_settings_that_no_training_can_use(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        TrainingConfig(**wrong)


def test_metrics_keep_rows_up_to_the_resumed_step(tmp_path):
    first = MetricsCsv(tmp_path)
    for step in (1, 2, 3, 4):
        first.log_metrics({"train/loss": 1 / step}, step)
    first.log_metrics({"val/loss": 0.25}, 4)
    assert rows(tmp_path)[-1] == {"step": "4", "train/loss": "0.25", "val/loss": "0.25"}
    resumed = MetricsCsv(tmp_path, start=2)
    resumed.log_metrics({"train/loss": 9.0}, 3)
    assert [(row["step"], row["train/loss"]) for row in rows(tmp_path)] == [
        ("1", "1"),
        ("2", "0.5"),
        ("3", "9"),
    ]
    afresh = MetricsCsv(tmp_path)
    afresh.log_metrics({"x": 1.0}, 1)
    assert rows(tmp_path) == [{"step": "1", "x": "1"}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_checkpoint_round_trip(tmp_path):
    state = {
        "numbers": [1, 2.5, True, None, "text"],
        "pair": (torch.arange(3), {"deep": [torch.zeros(2, 0), ()]}),
        "by number": {0: torch.tensor(1.5, dtype=torch.float64), 1: {}},
        "halves": torch.ones(2, dtype=torch.bfloat16),
    }
    FolderCheckpointIO().save_checkpoint(state, tmp_path / "here")
    found = FolderCheckpointIO().load_checkpoint(tmp_path / "here")
    assert found["numbers"] == state["numbers"]
    assert found["numbers"][2] is True
    assert isinstance(found["pair"], tuple)
    assert torch.equal(found["pair"][0], state["pair"][0])
    assert found["pair"][1]["deep"][0].shape == (2, 0)
    assert found["pair"][1]["deep"][1] == ()
    assert [*found["by number"]] == [0, 1]
    assert found["by number"][0].dtype == torch.float64
    assert found["halves"].dtype == torch.bfloat16
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["state.json", "state.safetensors"]


def test_checkpoint_refuses_what_would_need_a_pickle(tmp_path):
    with pytest.raises(TypeError, match=r"/model must be tensors, numbers or strings, got Noisy"):
        FolderCheckpointIO().save_checkpoint({"model": Noisy()}, tmp_path / "here")
    assert not [*tmp_path.iterdir()]


def test_run_folder(tmp_path):
    out, config = tmp_path / "run", TrainingConfig(steps=3, device="cpu")
    assert not finished(out, config, "result.json")
    assert not out.exists()
    begin_run(out, config)
    assert not finished(out, config, "result.json")
    with pytest.raises(UserError, match="steps = 3, not 4"):
        finished(out, TrainingConfig(steps=4, device="cpu"), "result.json")
    (out / "result.json").touch()
    assert finished(out, config, "result.json")
    with pytest.raises(UserError, match="is a file"):
        finished(out / "result.json", config, "result.json")


def test_accumulated_slices_make_the_same_step(tmp_path):
    whole, sliced = Toy(), Toy()
    settings = {"steps": 6, "batch_size": 8, "log_every": 1, "eval_every": 0, "device": "cpu"}
    fit(whole, Positions(), TrainingConfig(**settings), tmp_path / "whole")
    data = Positions()
    fit(sliced, data, TrainingConfig(**settings, accumulate=4), tmp_path / "sliced")
    assert [len(positions) for positions in data.asked[:24]] == [2] * 24
    for mine, other in zip(rows(tmp_path / "sliced"), rows(tmp_path / "whole"), strict=True):
        assert mine["step"] == other["step"]
        assert float(mine["train/loss"]) == pytest.approx(float(other["train/loss"]), rel=1e-4)
    for name, value in sliced.state_dict().items():
        assert torch.allclose(value, whole.state_dict()[name], atol=1e-5)


@pytest.mark.parametrize("kill_at", [5, 13])
def test_resumed_run_with_accumulation_ends_with_the_same_weights(kill_at, tmp_path):
    whole = train(tmp_path / "whole", accumulate=2)
    train(tmp_path / "cut", kill_at=kill_at, accumulate=2)
    assert equal(train(tmp_path / "cut", accumulate=2), whole)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_parameter_groups_have_their_own_rate_and_decay(tmp_path):
    config = TrainingConfig(steps=1, batch_size=8, lr=0.1, weight_decay=0.2, device="cpu", warmup_steps=0)
    first, rest = _parameter_groups(Toy(), config)
    assert "lr" not in first
    assert len(first["params"]) == 6
    assert (rest["lr"], rest["weight_decay"], len(rest["params"])) == (0.05, 0.0, 2)
    frozen = Toy()
    frozen.parameter_groups = lambda: [{"params": [*frozen.last.parameters()], "lr_factor": 0.0}]
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    fit(frozen, Positions(), config, tmp_path)
    changed = {name for name, value in frozen.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith("last.") for name in changed)


def test_a_batch_must_divide_into_slices():
    with pytest.raises(UserError, match=r"batch_size must be a multiple of .* \(6\), got 8"):
        TrainingConfig(batch_size=8, accumulate=3, devices=2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does_and_resume(strategy, tmp_path):
    """Losses are those of one process."""

    def run(out):
        given = (str(out), strategy, "2", "6", "1")
        if strategy == "ddp" and out.name == "two":  # the script starts its second process itself
            command = [sys.executable, distributed_training.__file__, *given]
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
            assert done.returncode == 0, done.stderr
        else:
            logs = [tmp_path / f"log{number}" for number in range(2)]
            both = [
                fork(distributed_training.main, *given, log=log, **environment)
                for log, environment in zip(logs, ranks(2), strict=True)
            ]
            for process, log in zip(both, logs, strict=True):
                process.join()
                assert process.exitcode == 0, log.read_text()
        return torch.load(out / "weights.pt", weights_only=True)

    config = distributed_training.settings("auto", 1, 6, 1)
    one = Toy()
    fit(one, Positions(), config, tmp_path / "one", lambda last: {"val/sum": one.total()})
    weights = run(tmp_path / "two")
    for mine, other in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert mine.keys() == other.keys()
        assert [*map(bool, mine.values())] == [*map(bool, other.values())]
        for key, value in other.items():
            assert not value or float(mine[key]) == pytest.approx(float(value), rel=1e-4)
    for name, value in one.state_dict().items():
        assert torch.allclose(weights[name], value, atol=1e-5)
    (checkpoint,) = (tmp_path / "two/kept").iterdir()
    assert not {path.suffix for path in checkpoint.iterdir()} - {".safetensors", ".json"}
    shutil.copytree(checkpoint, tmp_path / "resumed/checkpoints" / checkpoint.name)
    resumed = run(tmp_path / "resumed")
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert [row["step"] for row in rows(tmp_path / "resumed")] == ["4", "5", "6"]


@pytest.mark.slow
def test_a_process_that_dies_is_named_by_the_other(tmp_path):
    given = (str(tmp_path / "run"), "ddp", "2", "100000", "1")
    first, second = (
        fork(distributed_training.main, *given, log=tmp_path / f"log{number}", **environment)
        for number, environment in enumerate(ranks(2))
    )
    while not (tmp_path / "run/kept").exists():
        assert first.is_alive(), (tmp_path / "log0").read_text()
        time.sleep(0.02)
    second.kill()
    first.join()
    said = (tmp_path / "log0").read_text().strip().splitlines()[-1]
    assert "process 1 of 2 has stopped before the training was done. See its output" in said


def test_only_runs_are_overwritten(tmp_path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for folder, name in ((run, "config.yaml"), (other, "data.bin")):
        folder.mkdir()
        (folder / name).touch()
    discard_run(run)
    discard_run(tmp_path / "nothing")
    assert not run.exists()
    with pytest.raises(UserError, match="holds no run to overwrite"):
        discard_run(other)
    assert (other / "data.bin").exists()


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1, 1)]
)
def test_learning_rate_schedules(schedule, middle, end) -> None:
    config = TrainingConfig(
        steps=99, warmup_steps=0, lr=1.0, final_lr_factor=0.1, lr_schedule=schedule, device="cpu"
    )
    module = _Module(Toy(), config)
    factor = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert [factor(step) for step in (0, 50, 100)] == pytest.approx([1, middle, end])
