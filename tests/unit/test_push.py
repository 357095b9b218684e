"""`latentact push`: cards whose numbers are those of the json files, and uploads to a stand-in of the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from conftest import cli
from latentact import Policy
from latentact.policies.bc import BcConfig
from latentact.policies.latent import LatentConfig
from latentact.policies.network import NetworkConfig
from latentact.policies.spec import PolicySpec, Target
from latentact.types import ActionSpace
from toy_lerobot import write_demonstrations, write_lam

REPO = "someone/model"
NETWORK = NetworkConfig(backbone="patch", patch=8, channels=(8,))
ROLLOUT = {
    "env": "pusht",
    "episodes": 20,
    "seed": 7,
    "success": 0.625,
    "return": 1.5,
    "ci95": [0.4375, 0.75],
    "return_ci95": [1.0, 2.0],
}


class Hub:
    """Stands for the hub: repositories as dicts of files, commits only where something changes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None
        self.repo_type, self.tags, self.commits = "", [], 0
        self.error: Exception | None = None

    def create_repo(self, repo_id: str, *, private: bool, repo_type: str, exist_ok: bool) -> str:
        if self.error:
            raise self.error
        self.private = private if self.private is None else self.private
        self.repo_type = repo_type
        return f"https://hub.example/{repo_id}"

    def repo_info(self, repo_id: str, *, repo_type: str) -> Any:
        return type("Info", (), {"private": self.private})

    def create_commit(
        self, repo_id: str, operations: list[Any], *, commit_message: str, repo_type: str
    ) -> None:
        before = dict(self.files)
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        self.commits += before != self.files

    def delete_tag(self, repo_id: str, *, tag: str, repo_type: str) -> None:
        if tag not in self.tags:
            raise RevisionNotFoundError("no such tag", response=_response(404))
        self.tags.remove(tag)

    def create_tag(self, repo_id: str, *, tag: str, repo_type: str) -> None:
        self.tags.append(tag)


def _response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.example"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    for name in ("create_repo", "repo_info", "create_commit", "delete_tag", "create_tag"):
        monkeypatch.setattr(HfApi, name, getattr(stand_in, name))
    return stand_in


def write_policy(folder: Path) -> Path:
    space = ActionSpace(kind="continuous", size=2)
    spec = PolicySpec(
        resolution=32,
        target=Target(kind="continuous", size=2),
        action_space=space,
        fps=10.0,
        camera="observation.images.top",
    )
    BcConfig(network=NETWORK).build(spec).save_pretrained(folder)
    return folder


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def push(*arguments: Any) -> str:
    done = cli("push", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dry_run_uploads_nothing(hub: Hub, tmp_path: Path) -> None:
    shown = push(write_policy(tmp_path / "policy"), REPO, "--dry-run")
    card, files = shown.split("Files:")
    assert files.split() == [
        "README.md",
        "config.json",
        "model.safetensors",
        "policy_postprocessor.json",
        "policy_preprocessor.json",
    ]
    data = metadata(card)
    assert (data["library_name"], data["pipeline_tag"]) == ("lerobot", "robotics")
    assert {"lerobot", "latentact", "bc"} <= {*data["tags"]}
    assert not {"license", "datasets", "model-index"} & data.keys()
    assert "No evaluation results were found next to this policy." in card
    assert hub.private is None
    assert hub.files == {}


def test_a_policy_is_private_and_a_second_upload_changes_nothing(hub: Hub, tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "policy")
    (folder / "config.yaml").write_text("data: /home/someone/data\n")
    (folder / "policy.json").write_text(json.dumps({"samples": 320, "episodes": 5, "val/loss": 0.75}))
    for _ in range(2):
        assert push(folder, REPO).strip() == f"https://hub.example/{REPO}"
    assert (hub.private, hub.repo_type, hub.commits) == (True, "model", 1)
    assert "config.yaml" not in hub.files
    card = hub.files["README.md"].decode()
    assert "320 steps of 5 episodes, loss on held-out episodes 0.75" in card
    for name, content in hub.files.items():
        (tmp_path / "downloaded").mkdir(exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(content)
    assert Policy.from_pretrained(tmp_path / "downloaded").spec == Policy.from_pretrained(folder).spec


def test_a_public_repository_needs_the_flag(hub: Hub, tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "policy")
    hub.private = False
    refused = cli("push", folder, REPO)
    assert refused.returncode == 2
    assert "must be private, got a public repository" in refused.stderr
    assert hub.files == {}
    push(folder, REPO, "--public")
    assert hub.files


def test_results_of_a_rollout_stand_in_card_and_metadata(hub: Hub, tmp_path: Path) -> None:
    folder, run = write_policy(tmp_path / "policy"), tmp_path / "rollout"
    run.mkdir()
    (run / "rollout.json").write_text(json.dumps({**ROLLOUT, "config": {"policy": str(folder)}}))
    named = ("--license", "mit", "--dataset", "someone/data")
    push(folder, REPO, "--results", run, *named)
    card = hub.files["README.md"].decode()
    assert "| `pusht` | 0.625 | 0.438 to 0.75 | 20 | 7 |" in card
    data = metadata(card)
    assert (data["license"], data["datasets"], data["metrics"]) == ("mit", ["someone/data"], ["success_rate"])
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.625
    assert json.loads(hub.files["rollout_0.json"]) == ROLLOUT
    other = write_policy(tmp_path / "other")
    refused = cli("push", other, REPO, "--results", run)
    assert refused.returncode == 2
    assert "must be a rollout of" in refused.stderr


def test_a_row_of_a_comparison_stands_beside_its_baselines(hub: Hub, tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "compare/seed0/bc_k_k5/policy")
    shared = {"episodes": 50, "seed": 0, "return": 1.0, "return_ci95": [0.5, 1.5]}
    own = {"method": "bc_k", "k": 5, "success": 0.25, "ci95": [0.125, 0.375], "run": "seed0/bc_k_k5/rollout"}
    oracle = {
        "method": "oracle",
        "k": None,
        "success": 0.875,
        "ci95": [0.75, 1.0],
        "run": "seed0/oracle/rollout",
    }
    fewer = {**own, "k": 2, "success": 0.0625, "run": "seed0/bc_k_k2/rollout"}
    rows = [shared | row for row in (own, oracle, fewer)]
    (tmp_path / "compare/comparison.json").write_text(json.dumps({"env": "pusht", "rows": rows}))
    push(folder, REPO)
    card = hub.files["README.md"].decode()
    assert "(this policy)** | 5 | 0.25 | 0.125 to 0.375 | 50 |" in card
    assert "| all | 0.875 | 0.75 to 1 | 50 |" in card
    assert "0.0625" not in card
    metric = metadata(card)["model-index"][0]["results"][0]["metrics"][0]
    assert metric["value"] == 0.25
    assert "0.875" in metric["name"]


def test_a_lam_with_its_probes_and_their_floors(hub: Hub, tmp_path: Path) -> None:
    folder = write_lam(tmp_path / "lam")
    bare = push(folder, REPO, "--dry-run")
    assert "No evaluation results were found next to this model." in bare
    probe = {"metric": "accuracy", "ci95": [0.5, 0.75]}
    evaluation = {
        "recon_mse": 0.125,
        "copy_mse": 0.5,
        "shuffled_mse": 0.25,
        "probes": {"latent_linear": {"score": 0.625, **probe}, "state_only": {"score": 0.375, **probe}},
        "warnings": ["few transitions"],
    }
    (folder / "lam.json").write_text(json.dumps(evaluation))
    push(folder, REPO)
    assert sorted(hub.files) == ["README.md", "config.json", "lam.json", "model.safetensors", "spec.json"]
    card = hub.files["README.md"].decode()
    for line in (
        "| reconstruction | 0.125 |",
        "copy of the last frame | 0.5 |",
        "| accuracy | 0.625 | 0.5 to 0.75 |",
    ):
        assert line in card
    assert "few transitions" in card
    metric = metadata(card)["model-index"][0]["results"][0]["metrics"][0]
    assert (metric["value"], "state_only 0.375" in metric["name"]) == (0.625, True)


def test_a_dataset_with_lerobots_tag(hub: Hub, tmp_path: Path) -> None:
    data = write_demonstrations(tmp_path)
    for _ in range(2):
        push(data, REPO)
    assert (hub.repo_type, hub.private, hub.tags, hub.commits) == ("dataset", True, ["v3.0"], 1)
    card = hub.files["README.md"].decode()
    assert "3 episodes, 36 frames, 10 fps" in card
    assert "LeRobot" in metadata(card)["tags"]
    (tmp_path / "copy").mkdir()
    for name, content in hub.files.items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    assert LeRobotDataset("someone/data", root=tmp_path / "copy", video_backend="pyav").num_episodes == 3


def test_unusable_input_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "policy")
    spec = PolicySpec(resolution=32, target=Target(kind="continuous", size=6))
    LatentConfig(network=NETWORK).build(spec).save_pretrained(tmp_path / "latent")
    shutil.copytree(policy, tmp_path / "foreign")
    (tmp_path / "foreign/config.json").write_text('{"type": "act"}')
    (tmp_path / "empty").mkdir()
    for folder, repo, message in (
        (policy, "model", "REPO must be a hub id"),
        (policy, "some one/model", "REPO must be a hub id"),
        (tmp_path / "empty", REPO, "must hold config.json"),
        (tmp_path / "latent", REPO, "must output robot actions"),
        (tmp_path / "foreign", REPO, "must be a LAM, a policy or a dataset"),
    ):
        done = cli("push", folder, repo)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    hub.error = HfHubHTTPError("401 Client Error", response=_response(401))
    done = cli("push", policy, REPO)
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
