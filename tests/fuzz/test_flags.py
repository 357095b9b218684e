"""Unusual numbers in every flag and setting: a command succeeds, or fails with exit code 2 and one sentence.

Flags come from the command line's own definition and settings from the stages' dataclasses, so new ones are
covered. Another seed or more cases: LATENTACT_FUZZ_SEED=7 LATENTACT_FUZZ_CASES=5000 pytest tests/fuzz.
"""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest
from guard import check, emptied
from mutations import NUMBERS
from whole import CASES, LAM, POLICY, SEED, whole_artifacts  # noqa: F401 (a fixture)

from latentact import overrides
from latentact.cli.stage_command import FILE_COMMANDS
from latentact.lams.contract import LAMS
from latentact.policies.contract import POLICIES
from latentact.quantizers.quantizer import QUANTIZERS

BASES = {
    "cache": "--data {w}/blocks.npz --resolution 16",
    "collect": "babyai/GoToRedBallNoDists --out {o} --episodes 1 --workers 1",
    "convert-lam": "{w}/lam --out {o}",
    "label": "--lam {w}/lam --data {w}/blocks.npz --out {o}",
    "precompute": "--lam-model-path {w}/lam --dataset-root {w}/blocks.npz --output-dir {o} --output file",
    "train-with-tokens": "--dataset-root {w}/column --output-dir {o}",
    "rollout": "--policy {w}/ground --env babyai/GoToLocal --out {o} --episodes 1 --max-steps 2 --record 0",
    "imitate": "--mode extract_only --video-path {w}/videos/a.mp4 --lam-model-path {w}/lam --output-dir {o} "
    "--lam-resolution 32",
    "guide": "concat {w}/guide {w}/guide --out {o}",
    "check-guidance": "--policy-path {w}/guided --lam-model-path {w}/lam --output-dir {o} --demos 1",
    "inspect": "{w}/lam --data {w}/blocks.npz --out {o} --max-transitions 8",
    "demo": "--out {o} --episodes 5 --k 5",
    "check-data": "{w}/blocks.npz --max-frames 4",
    "preview-augment": "--data {w}/blocks.npz --shift 2 --out {o}",
    "shard": "--data {w}/blocks.npz --out {o}",
    "adapt-policy": "--policy {w}/ground --data {w}/column --out {o}",
    "record": "babyai/GoToRedBallNoDists --device terminal --out {o} --episodes 1",
    "relabel": "{w}/column --device terminal --out {o}",
    "studio": "{w}/lam --data {w}/blocks.npz --export {o} --out {o}/saved",
    "plan": "--labels {w}/labels --budget 2 --out {o}",
    "export": "--policy {w}/ground --labels {w}/labels --out {o} --labeled-episodes 2 --steps 2",
}
"""Command -> flags with which it ends quickly."""
SMALL = {
    "lapo": LAM,
    "idm": ("lam.backbone=patch", "lam.size=32", "lam.patch=8", "lam.channels=[8]", "labeled_episodes=2"),
    "laom": (
        *("lam.backbone=patch", "lam.size=32", "lam.patch=8", "lam.channels=[8]", "lam.hidden=16"),
        *("lam.bottleneck.dim=4", "lam.target.features=8", "lam.horizon=2"),
    ),
    "clam": (
        *("lam.backbone=patch", "lam.size=32", "lam.patch=8", "lam.idm_channels=[8]", "lam.fdm_channels=[8]"),
        "lam.bottleneck.dim=4",
    ),
    "laq": (
        *("lam.size=32", "lam.patch=4", "lam.dim=16", "lam.heads=2", "lam.head_dim=8", "lam.spatial_depth=1"),
        *("lam.temporal_depth=1", "lam.bottleneck.dim=16", "lam.bottleneck.codebook_size=8"),
    ),
    "villa_x": (
        *("lam.resolution=28", "lam.d_t=2", "lam.encoder_depth=1", "lam.encoder_embed_dim=16"),
        *("lam.encoder_n_heads=2", "lam.map_heads=2", "lam.decoder_depth=1", "lam.decoder_embed_dim=16"),
        *("lam.decoder_n_heads=2", "lam.num_learned_tokens=1", "lam.action_latent_dim=4", "lam.n_codes=4"),
    ),
}
"""LAM -> settings of a small model."""
STEPS = ("training.steps=2", "training.batch_size=4", "data.resolution=32")


def _flags() -> list[tuple[str, str]]:
    """(command, flag) of every flag that takes a number."""
    return [
        (name, f"--{flag.name}")
        for name, command in FILE_COMMANDS.items()
        for flag in command.flags
        if flag.kind in (int, float, int | None, float | None)
    ]


def _settings() -> list[tuple[str, tuple[str, ...], str, str]]:
    """Return (stage, group choices, setting, type) for every numeric setting."""
    choices: list[tuple[str, dict[str, str]]] = [("ground", {}), ("compare", {})]
    choices += [("train_lam", {"lam": name}) for name in LAMS.names()]
    choices += [("train_policy", {"policy": name}) for name in POLICIES.names()]
    found = []
    for stage, chosen in choices:
        module = importlib.import_module(f"latentact.stages.{stage}")
        kind = getattr(module, f"{stage.title().replace('_', '')}Config")
        for key, type_, _, _ in overrides.keys(kind, chosen=chosen):
            if "int" in type_ or "float" in type_:
                found.append((stage, tuple(f"{k}={v}" for k, v in chosen.items()), key, type_))
    return found


LARGE = ("300", "2000", "65537", "1000000", "300000000", "2147483647", "1e9", "1e-9", "-1e9")
"""Values for sizes of networks."""
FLAGS, SETTINGS = _flags(), _settings()


def _typed(whole: Path, out: Path, rng: random.Random) -> list[str | Path]:
    value = rng.choice(NUMBERS)
    if rng.random() < 0.4:
        name, flag = rng.choice(FLAGS)
        return [name, *BASES.get(name, "").format(w=whole, o=out).split(), flag, value]
    stage, chosen, key, kind = rng.choice(SETTINGS)
    if key.startswith(("lam.", "policy.", "decoder.")):  # sizes of networks; elsewhere these are long runs
        value = rng.choice((*NUMBERS, *LARGE))
    value = f"[{value}]" if kind.startswith("tuple") and rng.random() < 0.8 else value
    base: tuple[str, ...] = ()
    if stage == "train_lam":
        name = chosen[0].partition("=")[2]
        base = (f"data.path={whole}/blocks.npz", *chosen, *SMALL.get(name, ()), *STEPS)
        if "bottleneck" in key and rng.random() < 0.7:
            base += (f"lam.bottleneck.kind={rng.choice(QUANTIZERS.names())}",)
    elif stage == "train_policy":
        data = f"data.path={whole}/blocks.npz" if chosen == ("policy=bc",) else f"labels={whole}/labels"
        base = (data, *chosen, *POLICY, *STEPS[:2], *(STEPS[2:] if data[0] == "d" else ()))
    elif stage == "ground":
        base = (f"policy={whole}/policy", f"labels={whole}/labels", "labeled_episodes=2", *STEPS[:2])
    elif stage == "compare":
        base = (f"data.path={whole}/blocks.npz", "env=babyai/GoToLocal", "data.resolution=32")
    base = tuple(word for word in base if not word.startswith(f"{key}="))
    return [stage.replace("_", "-"), *base, f"{key}={value}", f"out={out}"]


@pytest.mark.parametrize("number", range(CASES // 3))
def test_odd_number(
    number: int,
    whole: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(f"{SEED}:{number}")
    box = emptied(tmp_path_factory.getbasetemp() / "box")
    monkeypatch.chdir(box / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    typed = _typed(whole, box / "out", rng)
    wrong = check(typed, box=box, out=box / "out", mark=box / "mark")
    wrong += ["something is left in the working folder"] * bool([*(box / "here").iterdir()])
    shown = " ".join(str(word)[:60] for word in typed)
    assert not wrong, f"{shown}: " + "\n".join(wrong)


def test_every_command_is_known() -> None:
    """A new command with flags that take numbers gets a base, so that its numbers are reached."""
    assert {name for name, _ in FLAGS} <= BASES.keys()
    assert len(FLAGS) > 40
    assert len(SETTINGS) > 150
