"""Commands in the order of `latentact --help`, and the output of each."""

from __future__ import annotations

import time
from typing import Any

from latentact.cli.stage_command import app, hydra_command, stage_command

__all__ = ["NOT_RESUMABLE", "app"]

NOT_RESUMABLE = {
    "check-data",
    "check-guidance",
    "doctor",
    "guide",
    "imitate",
    "inspect",
    "plan",
    "preview-augment",
    "report",
    "rollout",
    "studio",
}
"""Commands that start over after an interruption."""


@stage_command("collect", "CollectConfig", argument="env")
def _collect(config: Any, result: Any) -> str:
    """Run a scripted expert and keep its successful episodes, or record random play.

    Example: latentact collect babyai/GoToRedBall --episodes 1500 --out data/red_ball
    """
    return (
        f"{result.episodes} episodes, {result.frames} frames, {result.failed} failed attempts: {result.path}"
    )


@stage_command("record", "RecordConfig", argument="env")
def _record(config: Any, result: Any) -> str:
    """Record demonstrations of your own by keyboard, gamepad or terminal; re-run to resume.

    Example: latentact record babyai/GoToLocal --episodes 5 --out data/mine
    """
    return f"{result.episodes} episodes, {result.frames} frames, {result.dropped} dropped: {result.path}"


@stage_command("relabel", "RelabelConfig", argument="data")
def _relabel(config: Any, result: Any) -> str:
    """Label the frames of a recorded dataset with your own actions; re-run to resume.

    Example: latentact relabel data/rollouts --out data/corrected
    """
    return f"{result.labels} labels, {result.changed} different from the executed action: {result.path}"


@stage_command("cache", "CacheConfig")
def _cache(config: Any, result: Any) -> str:
    """Show the cache of decoded frames, fill it for a dataset, or clear it.

    Examples: latentact cache; latentact cache --data DIR --resolution 56; latentact cache --clear all
    """
    lines = [f"removed {entry.key} ({entry.bytes / 1e6:.1f} MB)" for entry in result.removed]
    for entry in result.entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_use))
        content = f"{entry.frames} frames of {entry.resolution}" if entry.finished else "unfinished"
        lines.append(
            f"{entry.key}  {entry.bytes / 1e6:8.1f} MB  {used}  {content}  {entry.dataset} {entry.camera}"
        )
    return "\n".join([*lines, f"{result.folder}: {len(result.entries)} entries, {result.bytes / 1e6:.1f} MB"])


@stage_command("check-data", "CheckDataConfig", argument="path", ok=lambda result: result.usable)
def _check_data(config: Any, result: Any) -> str:
    """Check a dataset: its content, what readers reject, skip or repair, and whether it is fit for training.

    Example: latentact check-data data/red_ball --html check.html
    """
    from latentact.reporting.pages.data import summary

    lines = [summary(result), *(f"warning: {line}" for line in result.warnings)]
    lines += [f"unreadable: {name}: {reason}" for name, reason in [*result.unreadable.items()][:20]]
    lines += [f"skipped: {name}: {reason}" for name, reason in [*result.skipped.items()][:20]]
    return "\n".join([*lines, result.verdict])


@stage_command("shard", "ShardConfig", hidden=("drop_nonfinite", "cache_dir"))
def _shard(config: Any, result: Any) -> str:
    """Write a dataset as WebDataset shards; re-run to resume.

    Example: latentact shard --data my_videos --resolution 256 --target-fps 5 --out shards
    """
    found, dropped = result.manifest, result.manifest["dropped"]
    lines = [f"{name.replace('_', ' ')} dropped: {number}" for name, number in dropped.items() if number]
    lines += [f"unreadable: {name}: {reason}" for name, reason in [*found["unreadable"].items()][:20]]
    count = ", ".join(f"{found[name]} {name}" for name in ("shards", "scenes", "clips", "frames"))
    return "\n".join([*lines, f"{count} ({found['bytes'] / 1e6:.1f} MB): {result.path}"])


@stage_command("preview-augment", "PreviewAugmentConfig", hidden=("drop_nonfinite", "cache_dir"))
def _preview_augment(config: Any, result: Any) -> str:
    """Write a page with clips before and after augmentation.

    Example: latentact preview-augment --data data/red_ball --shift 4 --brightness 0.2 --out preview.html
    """
    return str(result)


hydra_command(
    "train-lam",
    "TrainLamConfig",
    help="Train a latent action model on video. Takes Hydra overrides; see --help.",
    example="latentact train-lam experiment=babyai data.path=data/red_ball",
)


@stage_command("convert-lam", "ConvertLamConfig", argument="where")
def _convert_lam(config: Any, result: Any) -> str:
    """Convert a published latent action model to latentact's format; its outputs stay the same.

    Example: latentact convert-lam microsoft/villa-x --out models/villa_x
    """
    return str(result)


@stage_command("label", "LabelConfig", hidden=("resize", "cache_dir"))
def _label(config: Any, result: Any) -> str:
    """Write latent actions for every frame of a dataset.

    Example: latentact label --lam runs/lam --data data/red_ball --out data/red_ball_labels
    """
    return str(result)


@stage_command("precompute", "PrecomputeConfig", names={"role": "as"})
def _precompute(config: Any, result: Any) -> str:
    """Write the LAM tokens of a dataset once, for all later runs; torchrun splits the work.

    Example: latentact precompute --dataset-root data/pusht --lam-model-path runs/lam --output-dir data/tokens
    """
    return str(result)


@stage_command(
    "train-with-tokens",
    "TrainWithTokensConfig",
    names={"out": "output-dir", "overrides": "policy-override"},
)
def _train_with_tokens(config: Any, result: Any) -> str:
    """Train a LeRobot policy that is conditioned on LAM tokens.

    Example: latentact train-with-tokens --dataset-root data/pusht_tokens --output-dir runs/lam_diffusion
    """
    return str(result)


@stage_command("adapt-policy", "AdaptPolicyConfig")
def _adapt_policy(config: Any, result: Any) -> str:
    """Fit a LeRobot policy that was pretrained on latent actions to the actions of a robot.

    Example: latentact adapt-policy --policy runs/act --data data/labeled --out runs/act_robot
    """
    new = result.numbers["initialized"]
    lines = [f"{result.numbers['copied']} tensors copied, {len(new)} initialized{':' if new else ''}"]
    return "\n".join([*lines, *(f"  {name}" for name in new), str(result.path)])


hydra_command(
    "train-policy",
    "TrainPolicyConfig",
    help="Train a policy on latent labels or robot actions. Takes Hydra overrides; see --help.",
    example="latentact train-policy labels=data/red_ball_labels",
)


hydra_command(
    "train-vla",
    "TrainVlaConfig",
    help="Train a vision-language-action model on latent labels. Takes Hydra overrides; see --help.",
    example="latentact train-vla experiment=vla_debug labels=data/red_ball_labels",
    show=str,
)


def _show_finetuned_vla(result: Any) -> str:
    """Return the errors on held-out episodes and the folder."""
    return "\n".join([*(f"{name}: {value}" for name, value in result.numbers.items()), str(result.path)])


hydra_command(
    "finetune-vla",
    "FinetuneVlaConfig",
    help="Fine-tune a vision-language-action model to robot actions. Takes Hydra overrides; see --help.",
    example="latentact finetune-vla experiment=vla_debug vla=runs/vla labels=data/red_ball_labels",
    show=_show_finetuned_vla,
)


@stage_command("plan", "PlanConfig")
def _plan(config: Any, result: Any) -> str:
    """Choose the episodes whose labels help most, and predict success by their number.

    Example: latentact plan --lam runs/lam --data data/red_ball --budget 5 --out plan.json
    """
    from latentact.stages.plan import summary

    return f"{summary(result.content)}\n{result.path}"


hydra_command(
    "ground",
    "GroundConfig",
    help="Learn latent action -> robot action from few labeled episodes. Takes Hydra overrides; see --help.",
    example="latentact ground policy=runs/policy labels=data/red_ball_labels labeled_episodes=5",
)


def _show_learner(result: Any) -> str:
    """Return what was learned, beside its baselines, and the verdict."""
    from latentact.stages.learn import summary

    return "\n".join([*summary(result), result["verdict"]])


for _command, _help, _presets in (
    ("dagger", "Train a policy on an expert's labels of the states that it visits (DAgger).", ()),
    (
        "gail",
        "Train a policy with PPO to look like demonstrations (GAIL).",
        ("policy=bc", "policy.network.backbone=state"),
    ),
    ("learn", "Run any learner: learner=NAME.", ()),
):
    hydra_command(
        _command,
        "LearnConfig",
        stage="learn",
        help=f"{_help} Takes Hydra overrides; see --help.",
        example=f"latentact {_command} env=Pendulum-v1 policy.network.backbone=state",
        show=_show_learner,
        presets=_presets if _command == "learn" else (f"learner={_command}", *_presets),
    )


@stage_command("export", "ExportConfig")
def _export(config: Any, result: Any) -> str:
    """Write robot actions for video without any, with intervals and a mask of trusted frames.

    Example: latentact export --policy runs/ground --labels data/red_ball_labels --out data/pseudo
    """
    numbers = result.numbers
    lines = [f"{numbers['trusted_frames']} of {numbers['frames']} frames are trusted"]
    if scores := numbers["held_out"]:
        lines.append(
            "on held-out episodes: "
            + ", ".join(f"{k} {v:.3g}" for k, v in scores.items() if isinstance(v, float))
        )
    return "\n".join([*lines, str(result.path)])


@stage_command("rollout", "RolloutConfig")
def _rollout(config: Any, result: Any) -> str:
    """Run a policy in an environment and write success, return and videos.

    Example: latentact rollout --policy runs/ground --env babyai/GoToRedBall --out runs/rollout
    """
    from latentact.stages.rollout import summary

    return f"{summary(result)}: {config.out}"


@stage_command("imitate", "ImitateConfig")
def _imitate(config: Any, result: Any) -> str:
    """Guide a policy by one demonstration video or a live camera, in simulation or on a robot.

    Example: latentact imitate --video-path demo.mp4 --lam-model-path runs/lam --policy-path runs/ground
    --env-name PushT-v0 --output-dir runs/imitate
    """
    from latentact.reporting.pages.imitate import headline

    lines = [f"{result['guide']['latent_actions']} latent actions: {config.output_dir}"]
    if live := result.get("live"):
        found = live["latency_ms"]["capture_to_action"]
        late = f"{found['p50']:.0f} ms median, {found['p95']:.0f} ms p95" if found else "unknown"
        lines.append(
            f"capture to action: {late}; of {live['captured']} frames {live['dropped']} dropped, "
            f"{live['stale_steps']} stale steps"
        )
    return "\n".join(lines if config.mode == "extract_only" else [*lines, headline(result)])


@stage_command("guide", "GuideConfig", argument="action paths")
def _guide(config: Any, result: Any) -> str:
    """Describe guides, edit one, blend several or join them.

    Examples: latentact guide info runs/a; latentact guide edit runs/a --apply slice=10:60 --apply scale=0.5
    --out a.safetensors; latentact guide blend a.safetensors runs/b --weights 0.7,0.3 --out c.safetensors;
    latentact guide concat a.safetensors runs/b --transition 10 --out d.safetensors
    """
    from latentact.stages.guide import summary

    return "\n".join(line for guide in result["guides"] for line in summary(guide))


@stage_command(
    "check-guidance",
    "CheckGuidanceConfig",
    names={"policy": "policy-path", "lam": "lam-model-path", "out": "output-dir", "env": "env-name"},
)
def _check_guidance(config: Any, result: Any) -> str:
    """Roll out a guided policy with the matching demonstration, with a wrong one and with none.

    Example: latentact check-guidance --policy-path runs/guided --lam-model-path runs/lam --operations
    --output-dir check
    """
    lines = []
    for condition, metrics in result["conditions"].items():
        numbers = [
            f"{name} {value['mean']:.3g} ({value['ci95'][0]:.3g} to {value['ci95'][1]:.3g})"
            for name, value in metrics.items()
        ]
        lines.append(f"{condition:9s} {', '.join(numbers)}")
    edits = [
        f"{name:11s} {'pass' if found['passes'] else 'fail'}  {found['verdict']}"
        for name, found in result.get("operations", {}).items()
    ]
    return "\n".join([*lines, *edits, result["verdict"]])


hydra_command(
    "compare",
    "CompareConfig",
    help="Compare latent policies with BC, IDM and oracle. Takes Hydra overrides; see --help.",
    example="latentact compare experiment=babyai data.path=data/red_ball env=babyai/GoToRedBall ks=[5]",
)


@stage_command("inspect", "InspectConfig", stage="inspect_lam", argument="lam")
def _inspect(config: Any, result: Any) -> str:
    """Evaluate a latent action model: go or no-go, the reasons, and what to try next.

    Example: latentact inspect runs/lam --data data/red_ball
    """
    cautions = [f"Caution: {caution}" for caution in result.cautions]
    return "\n".join([result.verdict, *cautions, result.recommendation, str(result.html)])


@stage_command("studio", "StudioConfig", argument="run")
def _studio(config: Any, result: Any) -> str:
    """Open a LAM in the browser: look at latent actions, name, edit and drive them; or export a page.

    Examples: latentact studio runs/demo; latentact studio runs/lam --data data/pusht --policy runs/guided
    --env pusht; latentact studio runs/demo --export site
    """
    return f"{result['path']} ({result['bytes'] / 1e6:.1f} MB)" if config.export else "stopped"


@stage_command("report", "ReportConfig", argument="run_dir")
def _report(config: Any, result: Any) -> str:
    """Write report.html and report.json for a run.

    Example: latentact report runs/demo
    """
    return f"{result.verdict}\n{result.html}"


@stage_command("push", "PushConfig", argument="folder repo")
def _push(config: Any, result: Any) -> str:
    """Upload a LAM, policy or dataset with its card to the Hugging Face hub; private unless --public.

    Example: latentact push runs/ground/finetuned OWNER/NAME --results runs/rollout --dry-run
    """
    listed = [result.card, "Files:", *(f"  {name}" for name in sorted(result.files))]
    return "\n".join(listed) if config.dry_run else result.address


@stage_command("doctor", "DoctorConfig", ok=lambda result: result.ok, failure=1)
def _doctor(config: Any, result: Any) -> str:
    """Check this machine: Python, devices, what is installed, plugins, folders, the hub, the cluster.

    Example: latentact doctor
    """
    from latentact.stages.doctor import summary

    return summary(result)


@stage_command("demo", "DemoConfig", argument="overrides")
def _demo(config: Any, result: Any) -> str:
    """Run the whole pipeline: collect, learn from video, ground, compare, report.

    Example: latentact demo
    """
    return f"\n{result.verdict}\n\nReport: {result.html.absolute()}"
