"""Damaged artifacts: a command that reads them succeeds, or fails with exit code 2 and a one-sentence error.

Another seed or more cases: LATENTACT_FUZZ_SEED=7 LATENTACT_FUZZ_CASES=5000 pytest tests/fuzz.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from guard import check, emptied
from mutations import copy_of, mutate
from whole import CASES, LAM, POLICY, SEED, whole_artifacts  # noqa: F401 (a fixture)


@dataclass(frozen=True)
class Use:
    """How a command reads an artifact."""

    artifact: str
    """Name in `whole`; a copy of it is damaged."""
    command: Callable[[Path, Path, Path], tuple[str | Path, ...]]
    """(whole, damaged copy, out) -> command line."""
    files: str = "**/*"
    """Pattern of the files that are damaged."""
    makes: bool = True
    """Whether it creates `out`; otherwise it writes into the artifact."""
    weight: int = 4
    """Relative frequency."""
    drop: str = ""
    """File to remove first, so that the run is unfinished."""


def _lam_run(whole: Path, bad: Path, _: Path) -> tuple[str | Path, ...]:
    return ("train-lam", f"data.path={whole}/blocks.npz", *LAM, f"out={bad}")


def _policy_run(whole: Path, bad: Path, _: Path) -> tuple[str | Path, ...]:
    return ("train-policy", *POLICY, f"labels={whole}/labels", f"out={bad}")


def _ground_run(whole: Path, bad: Path, _: Path) -> tuple[str | Path, ...]:
    return _ground(whole / "policy", whole / "labels", bad)


def _ground(policy: Path, labels: Path, out: Path) -> tuple[str | Path, ...]:
    few = ("labeled_episodes=2", "training.steps=2")
    return ("ground", f"policy={policy}", f"labels={labels}", *few, f"out={out}")


def _few(policy: Path, out: Path) -> tuple[str | Path, ...]:
    names = ("rollout", "--policy", policy, "--env", "babyai/GoToLocal", "--out", out)
    return (*names, "--episodes", "1", "--max-steps", "2", "--record", "0")


LAM_FILES = "[cms]*[!v]"  # config.json, config.yaml, model.safetensors, spec.json
USES = {
    "label": Use(
        "lam", lambda w, b, o: ("label", "--lam", b, "--data", w / "blocks.npz", "--out", o), LAM_FILES
    ),
    "precompute": Use(
        "lam",
        lambda w, b, o: (
            *("precompute", "--lam-model-path", b, "--dataset-root", w / "blocks.npz"),
            *("--output-dir", o, "--output", "file"),
        ),
        LAM_FILES,
    ),
    "convert": Use("lam", lambda _, b, o: ("convert-lam", b, "--out", o), LAM_FILES),
    "extract": Use(
        "lam",
        lambda w, b, o: (
            *("imitate", "--mode", "extract_only", "--video-path", w / "videos/a.mp4", "--lam-model-path", b),
            *("--lam-resolution", "32", "--output-dir", o),
        ),
        LAM_FILES,
    ),
    "inspect": Use(
        "lam",
        lambda w, b, o: ("inspect", b, "--data", w / "blocks.npz", "--out", o, "--max-transitions", "8"),
        "[cls]*[!vz]",
        weight=1,
    ),
    "labels": Use("labels", lambda _, b, o: ("train-policy", *POLICY, f"labels={b}", f"out={o}"), weight=8),
    "labels of guided": Use(
        "labels", lambda _, b, o: ("train-policy", *POLICY, "policy=guided", f"labels={b}", f"out={o}")
    ),
    "labels of ground": Use("labels", lambda w, b, o: _ground(w / "policy", b, o)),
    "labels again": Use(
        "labels",
        lambda w, b, _: ("label", "--lam", w / "lam", "--data", w / "blocks.npz", "--out", b),
        makes=False,
    ),
    "token file": Use(
        "tokens",
        lambda w, b, o: (
            *(
                "train-with-tokens",
                "--dataset-root",
                w / "column",
                "--lam-tokens-path",
                b / "lam_tokens.safetensors",
            ),
            *("--output-dir", o),
        ),
        "*.safetensors",
        weight=6,
    ),
    "token pickle": Use(
        "tokens",
        lambda w, b, o: (
            *("train-with-tokens", "--dataset-root", w / "column", "--lam-tokens-path", b / "lam_tokens.pt"),
            *("--output-dir", o),
        ),
        "*.pt",
        weight=6,
    ),
    "tokens again": Use(
        "tokens",
        lambda w, b, _: (
            *("precompute", "--lam-model-path", w / "lam", "--dataset-root", w / "blocks.npz"),
            *("--output-dir", b, "--output", "file"),
        ),
        makes=False,
    ),
    "sidecar": Use(
        "column",
        lambda _, b, o: ("train-with-tokens", "--dataset-root", b, "--output-dir", o),
        "meta/lam_tokens.json",
    ),
    "policy": Use(
        "policy",
        lambda w, b, o: _ground(b, w / "labels", o),
        LAM_FILES,
        weight=6,
    ),
    "rollout": Use("ground", lambda _, b, o: _few(b, o), LAM_FILES, weight=6),
    "imitate": Use(
        "ground",
        lambda w, b, o: (
            *("imitate", "--latents-path", w / "guide", "--policy-path", b, "--env-name", "babyai/GoToLocal"),
            *("--output-dir", o, "--max-steps", "2", "--no-save-video"),
        ),
        LAM_FILES,
    ),
    "imitate guided": Use(
        "guided",
        lambda w, b, o: (
            *("imitate", "--latents-path", w / "guide", "--policy-path", b, "--env-name", "babyai/GoToLocal"),
            *("--output-dir", o, "--max-steps", "2", "--no-save-video"),
        ),
        LAM_FILES,
    ),
    "guide": Use(
        "guide",
        lambda w, b, o: (
            *(
                "imitate",
                "--latents-path",
                b,
                "--policy-path",
                w / "ground",
                "--env-name",
                "babyai/GoToLocal",
            ),
            *("--output-dir", o, "--max-steps", "2", "--no-save-video"),
        ),
        "*.safetensors",
        weight=6,
    ),
    "guide blend": Use(
        "guide",
        lambda w, b, o: ("guide", "blend", b, w / "guide", "--weights", "1,2", "--out", o),
        "*.safetensors",
        weight=4,
    ),
    "guide pickle": Use(
        "guide",
        lambda w, b, o: (
            *("imitate", "--mode", "extract_only", "--latents-path", b / "latents.pt", "--output-dir", o),
            *("--lam-model-path", w / "lam"),
        ),
        "*.pt",
        weight=6,
    ),
    "report": Use("report", lambda _, b, __: ("report", b), makes=False, weight=8),
    "lam run": Use("lam_run", _lam_run, makes=False, weight=6, drop="lam.json"),
    "finished lam run": Use("lam_run", _lam_run, "*.[jy]*", makes=False),
    "policy run": Use("policy_run", _policy_run, makes=False, drop="policy.json"),
    "ground run": Use("ground_run", _ground_run, makes=False, drop="ground.json"),
    "rollout again": Use("report/rollout", lambda w, b, _: _few(w / "ground", b), makes=False),
    "cache": Use("cache", lambda _, b, __: ("cache", "--cache-dir", b), makes=False, weight=2),
    "cache of label": Use(
        "cache",
        lambda w, _, o: ("label", "--lam", w / "lam", "--data", w / "blocks.npz", "--out", o),
        weight=8,
    ),
    "cache of training": Use("cache", lambda w, _, o: _lam_run(w, o, o), weight=4),
    "cache filled": Use(
        "cache",
        lambda w, b, _: ("cache", "--cache-dir", b, "--data", w / "blocks.npz", "--resolution", "32"),
        makes=False,
    ),
}
DRAWN = [name for name, use in USES.items() for _ in range(use.weight)]


@pytest.mark.parametrize("number", range(CASES - CASES // 3))
def test_damaged_artifact(
    number: int, whole: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{SEED}:{number}")
    name = rng.choice(DRAWN)
    use = USES[name]
    box = emptied(tmp_path_factory.getbasetemp() / "box")
    bad = copy_of(whole / use.artifact, box / "bad")
    if use.drop:
        (bad / use.drop).unlink()
    files = sorted(path for path in bad.glob(use.files) if path.is_file() and path.name != ".lock")
    chosen = rng.sample(files, min(len(files), rng.choice((1, 1, 1, 2))))
    done = [f"{file.relative_to(bad)}: {mutate(rng, file, box / 'mark')}" for file in chosen]
    monkeypatch.chdir(box / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if use.artifact == "cache":
        monkeypatch.setenv("LATENTACT_CACHE", str(bad))
    command = [*use.command(whole, bad, box / "out")]
    wrong = check(
        command,
        box=box,
        out=box / "out" if use.makes else None,
        mark=box / "mark",
        resumed=use.artifact == "cache",
    )
    assert not [*(box / "here").iterdir()]
    assert not wrong, f"{name}, {', '.join(done)}: " + "\n".join(wrong)
