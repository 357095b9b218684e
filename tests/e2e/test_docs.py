"""Files and folders that the documents name: a tiny run of every stage creates them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY_LAM, TINY_POLICY, cli
from toy_lerobot import SMALL, write_demonstrations, write_lam

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
INPUTS = {"metadata.csv", "metadata.jsonl", "laq_openx.pt", "robot.yaml", "info.json"}
"""Files that users provide; no stage writes them."""
TESTED_ELSEWHERE = {
    "adapted.json": "tests/e2e/test_any_policy.py",
    "data.jsonl": "tests/e2e/test_export.py",
    "export.json": "tests/e2e/test_export.py",
    "learner.json": "tests/e2e/test_learners.py",
    "round.json": "tests/unit/test_dagger_gail.py",
    "seed0/bc": "tests/e2e/test_learners.py",
    "seed0/dagger/data": "tests/e2e/test_learners.py",
    "seed0/dagger/labels400/policy": "tests/e2e/test_learners.py",
    "seed0/dagger/labels400/rollout": "tests/e2e/test_learners.py",
    "seed0/dagger/round1": "tests/e2e/test_learners.py",
    "seed0/expert/rollout.json": "src/latentact/learners/contract.py",
    "labels.json": "tests/unit/test_studio_label.py",
    "labeled": "tests/unit/test_studio_label.py",
    "guides/": "tests/unit/test_studio.py",
    "videos/": "tests/unit/test_studio.py",
    "index.html": "tests/unit/test_studio.py",
    "site/index.html": "tests/unit/test_studio.py",
    "runs/pays/does_it_pay.md": "tests/e2e/test_benchmarks.py",
    "models/": "tests/e2e/test_benchmarks.py",
    "labeled/plan.json": "tests/unit/test_studio_label.py",
    "runs/lam/used_plan.json": "tests/unit/test_plan.py",
    "used_plan.json": "tests/unit/test_plan.py",
    "models/pusht": "tests/e2e/test_benchmarks.py",
    "meta/record.json": "tests/e2e/test_recording.py",
    "meta/relabel.json": "tests/e2e/test_recording.py",
    "runs/dagger": "tests/e2e/test_learners.py",
    "runs/dagger/learner.json": "tests/e2e/test_learners.py",
    "runs/gail": "tests/e2e/test_learners.py",
    "preview.html": "tests/e2e/test_preview_augment.py",
    "seed0/act_k_k5/policy": "tests/e2e/test_lerobot_rows.py",
    "seed0/act_k_k5/rollout": "tests/e2e/test_lerobot_rows.py",
    "seed0/latent/tokens": "tests/e2e/test_lerobot_rows.py",
    "decoder.csv": "tests/e2e/test_ground_online.py",
    "finetuned.csv": "tests/e2e/test_ground_online.py",
    "scratch.csv": "tests/e2e/test_ground_online.py",
    "guidance.html": "tests/e2e/test_imitate.py",
    "guidance.json": "tests/e2e/test_imitate.py",
    "job.json": "tests/unit/test_cluster.py",
    "runs/lam/job.json": "tests/unit/test_cluster.py",
    "runs/policy/policy_preprocessor.json": "tests/conformance/test_policies.py",
    "runs/policy/policy_postprocessor.json": "tests/conformance/test_policies.py",
    "seed0/vla/policy": "tests/e2e/test_compare.py",
    "seed0/vla_k5/finetuned": "tests/e2e/test_compare.py",
    "seed0/vla_k5/rollout": "tests/e2e/test_compare.py",
}
"""Files of stages that are too slow for this test, and the test that runs them."""
SUFFIXES = (
    *(".csv", ".html", ".json", ".jsonl", ".lock", ".md", ".mp4", ".npy", ".npz", ".parquet", ".partial"),
    *(".pt", ".py", ".safetensors", ".svg", ".toml", ".yaml", "/"),
)
FOLDERS = ("runs/", "data/", "seed", "<key>/", "checkpoints/", "tokens/")
PATH = re.compile(r"[\w.*<>{},$~=-]+(?:/[\w.*<>{},$~=-]*)*")
TINY_DEMO = (
    *("data.resolution=56", "lam.idm_channels=[16]", "lam.fdm_channels=[16]", "idm.channels=[16]"),
    *("policy.network.channels=[16]", "policy_training.batch_size=16", "lam_training.batch_size=16"),
    *("lam_training.steps=2", "lam_training.eval_every=0", "idm_training.steps=2", "finetune_steps=2"),
    *("policy_training.steps=2", "decoder_training.steps=2", "episodes=2", "record=1"),
)


class Recorder:
    """Records the paths that this process opens, creates or renames, including temporary ones."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.active = False
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event in ("open", "os.mkdir", "os.rename", "os.link"):
            self.paths |= {str(path) for path in arguments[:2] if isinstance(path, (str, Path))}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[str]]:
    """Run every stage that the documents describe, with their folder names; return all written paths."""
    root, recorder = tmp_path_factory.mktemp("docs"), Recorder()
    red_ball, labels = Path("data/red_ball"), Path("data/red_ball_labels")
    steps = ("training.steps=2", "training.batch_size=4")
    act = ["pretrained_backbone_weights=null", *(f"{key}={value}" for key, value in SMALL["act"].items())]
    write_lam(root / "noise/lam")
    write_demonstrations(root / "noise", episodes=1)
    commands = [
        ("collect", "babyai/GoToLocal", "--episodes", "6", "--workers", "1", "--out", red_ball),
        ("train-lam", f"data.path={red_ball}", *TINY_LAM, *steps, "out=runs/lam"),
        ("label", "--lam", "runs/lam", "--data", red_ball, "--out", labels),
        ("plan", "--labels", labels, "--budget", "2"),
        ("shard", "--data", red_ball, "--out", "data/red_ball_shards"),
        ("train-policy", f"labels={labels}", *TINY_POLICY, *steps, "out=runs/policy"),
        (
            *("ground", "policy=runs/policy", f"labels={labels}", "labeled_episodes=2", *steps),
            *("finetune_steps=2", "self_training=true", "out=runs/ground"),
        ),
        (
            *("rollout", "--policy", "runs/ground", "--env", "babyai/GoToLocal", "--out", "runs/rollout"),
            *("--episodes", "1", "--max-steps", "4", "--record", "1"),
        ),
        ("train-vla", "experiment=vla_debug", f"labels={labels}", *steps, "out=runs/vla"),
        (
            *("finetune-vla", "experiment=vla_debug", "vla=runs/vla", f"labels={labels}", *steps),
            *("labeled_episodes=2", "out=runs/vla_finetuned"),
        ),
        ("inspect", "runs/lam", "--data", red_ball, "--max-transitions", "32"),
        (
            *("precompute", "--lam-model-path", "runs/lam", "--dataset-root", red_ball),
            *("--output", "both", "--output-dir", "data/tokens"),
        ),
        (
            *("precompute", "--lam-model-path", "noise/lam", "--dataset-root", "noise/plain"),
            *("--output-dir", "noise/tokens"),
        ),
        (
            *("train-with-tokens", "--policy", "lam_act", "--dataset-root", "noise/tokens"),
            *("--output-dir", "runs/act", "--num-epochs", "1", "--batch-size", "64"),
            *(word for setting in act for word in ("--policy-override", setting)),
        ),
        (
            *("imitate", "--video-path", "runs/rollout/episode_*.mp4", "--lam-model-path", "runs/lam"),
            *("--policy-path", "runs/ground", "--env-name", "babyai/GoToLocal", "--max-steps", "4"),
            *("--output-dir", "runs/imitate"),
        ),
        ("convert-lam", "runs/lam", "--out", "runs/converted"),
        ("demo", "--out", "runs/demo", "--episodes", "8", "--k", "2", "env=babyai/GoToLocal", *TINY_DEMO),
        ("report", "runs"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("LATENTACT_CACHE", str(root / "cache"))
        recorder.active = True
        for command in commands:
            done = cli(*(next(root.glob(word)) if "*" in str(word) else word for word in command))
            assert done.returncode == 0, done.stderr
        recorder.active = False
        paths = {str(path.relative_to(root)) for path in root.rglob("*")}
        yield paths | {path.removeprefix(f"{root}/") for path in recorder.paths}


def named_paths(text: str) -> list[str]:
    """Return the files and folders that the inline code of a text names, with `*` for variable parts."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for code in re.findall(r"`([^`\n]+)`", text):
        is_path = code.endswith(SUFFIXES) or (code.startswith(FOLDERS) and "/" in code)
        if is_path and PATH.fullmatch(code) and code not in SUFFIXES and "my_" not in code:
            found |= {re.sub(r"<\w+>", "*", name) for name in expanded(code)}
    return sorted(name for name in found if Path(name).name not in INPUTS)


def table_claims(text: str) -> list[str]:
    """Return the paths in tables with a column of folders and a column of files relative to them."""
    found, folder = [], ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        first = re.match(r"`((?:runs|data)/[^`]+)`", cells[0]) if cells else None
        folder = first[1] if first else folder if cells and not cells[0] else ""
        if folder and len(cells) > 1 and "as in" not in cells[1]:
            found += [f"{folder}/{name}" for name in named_paths(cells[1])]
    return found


def expanded(name: str) -> list[str]:
    """Expand braces: `a/{b,c}` names a/b and a/c."""
    braces = re.search(r"\{([^}]*)\}", name)
    if braces is None:
        return [name]
    before, after = name[: braces.start()], name[braces.end() :]
    return [path for part in braces[1].split(",") for path in expanded(before + part.strip() + after)]


def is_written(name: str, written: set[str]) -> bool:
    pattern = re.sub(r"(?<=[=/])N(?=/|$)", "*", name.removesuffix("/...").rstrip("/"))
    pattern = re.sub(r"_k\d", "_k*", pattern)
    return any(fnmatch(path, pattern) or fnmatch(path, f"*/{pattern}") for path in written)


def is_in_the_repository(name: str) -> bool:
    return any(next(folder.glob(name.strip("/")), None) for folder in (ROOT, ROOT / "src/latentact"))


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(document: Path, written: set[str]) -> None:
    names = {*named_paths(document.read_text()), *table_claims(document.read_text())}
    wrong = [
        name for name in sorted(names) if not is_in_the_repository(name) and not is_written(name, written)
    ]
    assert sorted(set(wrong) - TESTED_ELSEWHERE.keys()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data/red_ball_labels.partial", "runs/lam/no_such.json", "*/no_such"])
def test_wrong_names_are_noticed(name: str, written: set[str]) -> None:
    assert not is_written(name, written)


@pytest.mark.parametrize(("name", "test"), TESTED_ELSEWHERE.items())
def test_other_tests_check_the_rest(name: str, test: str) -> None:
    assert Path(name).name in (ROOT / test).read_text()


def test_names_are_found() -> None:
    text = "`<key>.partial`, `seed0/{a,b}`, `lam.json`, `data/red_ball`, `babyai/GoToLocal`, `data.path`"
    assert named_paths(f"{text}\n```bash\n`x.py`\n```\n") == [
        "*.partial",
        "data/red_ball",
        "lam.json",
        "seed0/a",
        "seed0/b",
    ]
    table = (
        "| folder | file |\n| `runs/lam` (train-lam) | `a.json` |\n| | `b/`, `c.npz` |\n| | as in `d.csv` |"
    )
    assert table_claims(table) == ["runs/lam/a.json", "runs/lam/b/", "runs/lam/c.npz"]
    assert sum(len(named_paths(document.read_text())) for document in DOCUMENTS) > 40
