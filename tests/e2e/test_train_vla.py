"""train-vla through the command line: what it leaves, resuming, several processes, and bad input."""

import csv
import json
import os
import shutil
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import latentact
from conftest import TINY_LAM, ok, ranks, refused, start
from latentact.agents.load import load_agent
from latentact.data.latents import read_labels
from latentact.data.splits import split_episodes
from latentact.io.video_writer import write_video
from latentact.policies.vla.backbone import load_vlm
from latentact.policies.vla.model import Vla
from latentact.stages.train_vla import read_frames

CODES = ("lam.bottleneck.kind=fsq", "lam.bottleneck.positions=2", "lam.bottleneck.levels=[4,4]")
SMALL = (
    *("experiment=vla_debug", "training.steps=6", "training.batch_size=8", "training.checkpoint_every=3"),
    *("training.log_every=1", "training.eval_every=0", "held_out=0.25", "eval_rows=16"),
    *("training.device=cpu", "training.precision=32-true"),
)

FINETUNE = (
    *("experiment=vla_debug", "labeled_episodes=3", "held_out=0.25", "training.steps=4"),
    *("training.batch_size=8", "training.log_every=1", "training.device=cpu", "training.precision=32-true"),
)


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file)}


def tensors(folder):
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "vlm/model.safetensors")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, blocks):
    """The folders `lam`, `labels` (16 codes, two per step), `vla` and `finetuned`."""
    root = tmp_path_factory.mktemp("vla")
    small = [word for word in TINY_LAM if "bottleneck" not in word]
    ok("train-lam", f"data.path={blocks}", *small, *CODES, "training.steps=10", f"out={root}/lam")
    ok("label", "--lam", root / "lam", "--data", blocks, "--out", root / "labels")
    shown = ok("train-vla", *SMALL, f"labels={root}/labels", f"out={root}/vla").stdout
    ok("finetune-vla", *FINETUNE, f"vla={root}/vla", f"labels={root}/labels", f"out={root}/finetuned")
    return root, shown


def test_run_folder_and_scores(runs):
    root, shown = runs
    out = root / "vla"
    numbers = json.loads((out / "vla.json").read_text())
    assert set(numbers["baselines"]) == {"majority", "majority_of_task", "previous"}
    assert set(numbers["controls"]) == {"shuffled_images", "blank_prompt"}
    assert (numbers["metric"], numbers["rows"], len(numbers["by_position"])) == ("accuracy", 22, 2)
    assert numbers["score"] == pytest.approx(sum(numbers["by_position"]) / 2)
    best = max(numbers["baselines"].values())
    assert shown.startswith("A baseline wins: ") == (best >= numbers["score"])
    assert shown.splitlines()[-1] == str(out)
    assert f"majority           accuracy {numbers['baselines']['majority']:.3f}" in shown
    # The baselines, from the labels alone.
    labels, store = read_labels(root / "labels")
    train, held_out = split_episodes(store, held_out=0.25, seed=0)
    codes, valid = labels.codes, labels.valid
    usual = np.array([np.bincount(each).argmax() for each in codes[valid & np.isin(store.episode, train)].T])
    rows = np.flatnonzero(valid & np.isin(store.episode, held_out))
    first = np.isin(rows, store.starts)
    before = np.where(first[:, None], usual, codes[rows - 1])
    assert numbers["baselines"]["majority"] == pytest.approx((codes[rows] == usual).mean())
    assert numbers["baselines"]["majority_of_task"] == numbers["baselines"]["majority"]  # there is one task
    assert numbers["baselines"]["previous"] == pytest.approx((codes[rows] == before).mean())
    assert [*losses(out)] == [1, 2, 3, 4, 5, 6]
    assert yaml.safe_load((out / "config.yaml").read_text())["model"]["vlm"] == "tiny"
    # Both parts load, ours and the vision-language model alone.
    model = Vla.from_pretrained(out)
    assert (model.latent.tokens, model.latent.codebook_size, model.spec.resolution) == (2, 16, 32)
    vlm = AutoModelForImageTextToText.from_pretrained(out / "vlm")
    assert torch.equal(vlm.get_input_embeddings().weight, model.vlm.get_input_embeddings().weight)
    assert AutoProcessor.from_pretrained(out / "vlm").tokenizer.padding_side == "left"
    again = ok("train-vla", *SMALL, f"labels={root}/labels", f"out={out}").stdout
    assert again == shown


def test_report(runs):
    root, _ = runs
    ok("report", root / "vla")
    page = (root / "vla/report.html").read_text()
    assert "Latent actions from image and text" in page
    assert "majority of task" in page
    assert json.loads((root / "vla/report.json").read_text())["vlas"]["."]["metric"] == "accuracy"


@pytest.mark.slow
def test_two_sharded_processes_equal_one_and_resume_on_one(runs, tmp_path):
    root, _ = runs

    def run(out, count):
        command = ("train-vla", *SMALL, f"labels={root}/labels", "training.strategy=fsdp", f"out={out}")
        logs = [tmp_path / f"{out.name}{number}.txt" for number in range(count)]
        settings = (*command, f"training.devices={count}")
        return [start(*settings, log=log, **rank) for log, rank in zip(logs, ranks(count), strict=True)]

    def wait(processes):
        for number, process in enumerate(processes):
            process.join()
            assert process.exitcode == 0, [*tmp_path.glob("*.txt")][number].read_text()

    both, middle = run(tmp_path / "two", 2), tmp_path / "two/checkpoints/step=00000003"
    while both[0].is_alive() and not middle.exists():
        time.sleep(0.005)
    shutil.copytree(middle, tmp_path / "one/checkpoints" / middle.name)
    wait(both)
    assert losses(tmp_path / "two") == pytest.approx(losses(root / "vla"), rel=1e-4)
    for name, tensor in tensors(root / "vla").items():
        assert torch.allclose(tensors(tmp_path / "two")[name], tensor, atol=1e-3)
    assert not {path.suffix for path in (tmp_path / "one").rglob("*.*")} - {".safetensors", ".json"}
    assert len([*(tmp_path / "one").rglob("*.safetensors")]) == 2
    # A checkpoint that lacks a shard, or a part of one, is refused.
    for name, damage in {"lacking": lambda p: p.unlink(), "cut": lambda p: p.write_bytes(b"1" * 99)}.items():
        shutil.copytree(tmp_path / "one", tmp_path / name)
        damage(next((tmp_path / name).rglob("*.safetensors")))
        with mock.patch.dict(os.environ):
            message = refused(
                *("train-vla", *SMALL, f"labels={root}/labels", "training.strategy=fsdp"),
                f"out={tmp_path}/{name}",
            )
        torch.distributed.destroy_process_group()
        assert {
            "lacking": "one safetensors file of each process that wrote it, got 1 of 2",
            "cut": "is not a complete safetensors file",
        }[name] in message
    # One process reads the shards of two and ends as they did.
    wait(run(tmp_path / "one", 1))
    resumed = losses(tmp_path / "one")
    assert [*resumed] == [4, 5, 6]
    assert resumed == pytest.approx({k: v for k, v in losses(tmp_path / "two").items() if k > 3}, rel=1e-4)


def test_finetuned_model_acts_and_is_a_lerobot_policy(runs, tmp_path):
    root, _ = runs
    numbers = json.loads((root / "finetuned/finetune_vla.json").read_text())
    assert (numbers["labeled_steps"], numbers["labeled_episodes"]) == (33, 3)
    assert {"held_out_accuracy", "majority_accuracy"} < set(numbers)
    agent = load_agent(root / "finetuned")
    assert (agent.spec.action_space.size, agent.spec.fps) == (4, 10.0)
    frames = np.random.default_rng(0).integers(256, size=(3, 40, 40, 3), dtype=np.uint8)
    agent.reset(3)
    acted = [agent.act({"observation.image": frames, "task": ["go", "stop now", ""]}) for _ in range(3)]
    assert all(action.shape == (3,) and action.dtype == np.int64 for action in acted)

    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import get_policy_class, make_pre_post_processors
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    folder = root / "finetuned"
    for _ in range(2):  # as finetune-vla wrote it, and as LeRobot writes it again
        config = PreTrainedConfig.from_pretrained(folder)
        config.device = "cpu"
        policy = get_policy_class("lam_vla").from_pretrained(folder, config=config)
        before, after = make_pre_post_processors(config, pretrained_path=str(root / "finetuned"))
        image = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        batch = before({"observation.image": image, "task": ["go", "stop now", ""]})
        assert after(policy.select_action(batch))[:, 0].tolist() == acted[0].tolist()
        policy.save_pretrained(tmp_path / "saved")
        assert load_agent(tmp_path / "saved").spec == agent.spec
        folder = tmp_path / "saved"
    policy.train()
    actions = torch.randint(0, 4, (3, config.head.chunk_size))
    loss, metrics = policy.forward(
        {
            **batch,
            "action": actions,
            "observation.lam_codes": torch.ones(3, 2),
            "observation.lam_valid": torch.ones(3),
        }
    )
    loss.backward()
    assert loss.item() == pytest.approx(metrics["action_loss"] + 0.1 * metrics["latent_loss"], rel=1e-5)


def test_the_camera_is_that_of_the_labeled_episodes(runs, tmp_path, monkeypatch):
    """Stage 2 has seen plain video, without the name of a camera."""
    root, _ = runs

    def read(*given):
        labels, store = read_frames(*given)
        store.camera = "observation.images.top"
        return labels, store

    monkeypatch.setattr("latentact.stages.finetune_vla.read_frames", read)
    given = (f"vla={root}/vla", f"labels={root}/labels", "training.steps=1", f"out={tmp_path}/out")
    ok("finetune-vla", *FINETUNE, *given)
    config = json.loads((tmp_path / "out/config.json").read_text())
    images = [name for name, each in config["input_features"].items() if each["type"] == "VISUAL"]
    assert images == ["observation.images.top"]
    assert load_agent(tmp_path / "out").spec.cameras == ("observation.images.top",)


def test_scratch_begins_from_the_vlm(runs, tmp_path):
    root, _ = runs
    still = (*FINETUNE, f"labels={root}/labels", "training.steps=1", "training.lr=1e-12")
    ok("finetune-vla", *still, f"vla={root}/vla", f"out={tmp_path}/vla")
    ok("finetune-vla", *still, f"vla={root}/vla", "scratch=true", f"out={tmp_path}/scratch")
    pretrained = load_file(root / "vla/vlm/model.safetensors")
    torch.manual_seed(0)
    before, _ = load_vlm("tiny", 32)
    before.save_pretrained(tmp_path / "before")
    expected = {"vla": pretrained, "scratch": load_file(tmp_path / "before/model.safetensors")}
    for name, weights in expected.items():
        found = load_file(tmp_path / name / "vlm/model.safetensors")
        assert all(torch.allclose(found[key], weight, atol=1e-6) for key, weight in weights.items())
    assert not all(torch.allclose(expected["scratch"][key], w, atol=1e-6) for key, w in pretrained.items())


def test_cards_have_the_numbers_beside_their_baselines(runs, tmp_path):
    root, _ = runs
    shown = ok("push", root / "vla", "someone/vla", "--dry-run").stdout
    numbers = json.loads((root / "vla/vla.json").read_text())
    assert "A `vision-language-action` model around `tiny` trained with latentact, as a LeRobot" in shown
    assert "- Output: latent actions." in shown
    assert "- Latent actions: `lapo`, 2 x" in shown
    assert f"| the model | {numbers['score']:.3f} |" in shown
    assert f"| baseline: the previous latent action | {numbers['baselines']['previous']:.3f} |" in shown
    assert f"without the task text | {numbers['controls']['blank_prompt']:.3f} |" in shown
    assert "finetune-vla vla=someone/vla" in shown
    shown = ok("push", root / "finetuned", "someone/vla", "--dry-run").stdout
    tuned = json.loads((root / "finetuned/finetune_vla.json").read_text())
    assert "as a LeRobot policy of type `lam_vla`" in shown
    assert "33 steps with robot actions of 3 episodes" in shown
    assert (
        f"{tuned['held_out_accuracy']:.3g}, of the majority action {tuned['majority_accuracy']:.3g}" in shown
    )
    files = shown.split("Files:")[1].split()
    assert {"config.json", "policy_preprocessor.json", "vlm/model.safetensors", "vlm/config.json"} < {*files}
    assert not any("config.yaml" in name or "checkpoints" in name for name in files)
    shutil.copytree(root / "vla", tmp_path / "cut")
    whole = (tmp_path / "cut/vlm/model.safetensors").read_bytes()
    (tmp_path / "cut/vlm/model.safetensors").write_bytes(whole[:-100])
    assert "is not a complete safetensors file" in refused("push", tmp_path / "cut", "a/b", "--dry-run")


def test_a_guide_is_refused(runs, tmp_path):
    root, _ = runs
    video = np.zeros((8, 32, 32, 3), np.uint8)
    write_video(tmp_path / "demo.mp4", video, 10)
    guide = ("--video-path", tmp_path / "demo.mp4", "--lam-model-path", root / "lam")
    guide += ("--lam-resolution", 32, "--env-name", "babyai/GoToRedBall", "--output-dir", tmp_path / "out")
    for name in ("finetuned", "vla"):
        message = refused("imitate", "--policy-path", root / name, *guide)
        assert "is not conditioned on latent actions" in message
    assert not (tmp_path / "out").exists()


def test_bad_input(runs, tmp_path):
    root, _ = runs
    labels = f"labels={root}/labels"
    assert "labels must be a folder that `latentact label` wrote" in refused("train-vla")
    assert "resolution" in refused("train-vla", *SMALL, labels, "resolution=-1")
    assert "must have observation.state, got none" in refused(
        "train-vla", *SMALL, labels, "model.use_state=true"
    )
    assert "vlm must be tiny, a folder or a hub id" in refused(
        "train-vla", *SMALL, labels, f"model.vlm={tmp_path}", f"out={tmp_path}/out"
    )
    assert not (tmp_path / "out").exists()
    assert "regression must be l1 or mse" in refused("train-vla", *SMALL, labels, "model.regression=huber")
    for wrong, message in {
        f"vla={root}/lam": "must be a vision-language-action model",
        "labeled_episodes=50": "number of training episodes, got 50",
        "head.kind=flow": "head.kind must be chunk for discrete actions",
        "head.chunk_size=0": "chunk_size must be between 1 and 1024",
    }.items():
        typed = ("finetune-vla", *FINETUNE, f"vla={root}/vla", labels, f"out={tmp_path}/out", wrong)
        assert message in refused(*typed)
    assert not (tmp_path / "out").exists()
    assert "must output robot actions" in refused(
        "rollout", "--policy", root / "vla", "--env", "babyai/GoToRedBall", "--out", tmp_path / "rollout"
    )


def test_labels_and_prompts_that_do_not_fit(runs, tmp_path, blocks):
    """One sentence each, before anything is written."""
    root, _ = runs
    shutil.copytree(root / "labels", tmp_path / "codes")
    file = tmp_path / "codes/lam_tokens.safetensors"
    tensors = load_file(file)
    tensors["codes"][3, 1] = 16
    save_file(tensors, file)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text('{"model_type": "llama"}')
    long, out = "long " * 500, f"out={tmp_path}/out"
    for settings, message in (
        ((f"labels={tmp_path}/codes",), "must hold codes from 0 to 15, got 0 to 16"),
        ((f"labels={root}/labels", f"model.vlm={tmp_path}/llama"), "an image-text-to-text model"),
        ((f"labels={root}/labels", f"model.prompt={long}{{task}}"), "must have at most 2048 tokens"),
    ):
        assert message in refused("train-vla", *SMALL, *settings, out)
    small = [word for word in TINY_LAM if "bottleneck" not in word]
    other = ("training.steps=1", "training.seed=1", f"out={tmp_path}/lam")
    ok("train-lam", f"data.path={blocks}", *small, *CODES, *other)
    ok("label", "--lam", tmp_path / "lam", "--data", blocks, "--out", tmp_path / "other")
    none = ("finetune-vla", *FINETUNE, f"vla={root}/vla", f"labels={root}/labels", "labeled_episodes=0", out)
    assert "labeled_episodes must be between 1 and" in refused(*none)
    gap = ("--frame-gap-s", 0.2, "--out", tmp_path / "gap")
    ok("label", "--lam", root / "lam", "--data", blocks, *gap)
    for name, field in (("other", "weights"), ("gap", "frame_gap")):
        message = refused("finetune-vla", *FINETUNE, f"vla={root}/vla", f"labels={tmp_path}/{name}", out)
        assert f"{field} of the latent actions must be the same in the model and the labels" in message
    assert not (tmp_path / "out").exists()


def test_dry_run_needs_no_labels_and_writes_nothing(tmp_path):
    eight = "cluster.compute.gpus_per_node=8"
    shown = ok("train-vla", "experiment=vla_7b", "--dry-run", eight, f"out={tmp_path}/run").stdout
    assert "132.7 GB if all were trained" in shown
    assert "on each of 8 devices" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "devices"),
    [
        (("training.devices=16",), 16),
        (("cluster=slurm", "cluster.compute.num_nodes=2", "cluster.compute.gpus_per_node=4"), 8),
        (("cluster=lrz_h100",), 4),
    ],
    ids=lambda given: str(given),
)
def test_dry_run_is_for_the_devices_of_the_cluster(given, devices):
    line = ok("train-vla", "experiment=vla_7b", "--dry-run", "--json", *given).stdout
    assert json.loads(line)["devices"] == devices


def test_no_experiment_sets_what_the_cluster_sets():
    """It would hide the cluster's value, and the stage would refuse to start."""
    conf = Path(latentact.__file__).parent / "conf"
    for file in conf.rglob("*.yaml"):
        training = (yaml.safe_load(file.read_text()) or {}).get("training") or {}
        assert not {"devices", "num_nodes"} & training.keys(), file
