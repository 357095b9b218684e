"""`latentact <command>`: what can be typed, and no logic. Stages are imported when their command runs."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from latentact.cli.flags import (
    ARGUMENT,
    BATCH,
    COUNT,
    LIMIT,
    NAME,
    PIXELS,
    RATE,
    SECONDS,
    SEED,
    WORKERS,
    Camera,
    Device,
    Distract,
    DropNonfinite,
    FrameGap,
    Precision,
    Resolution,
    Strict,
    TargetFps,
    View,
    between,
)
from latentact.errors import EXTRAS, UserError, missing_extra
from latentact.io.atomic import disk_full

app = typer.Typer(
    help="Robot policies from video without actions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="rich",
)


HYDRA = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command()
def collect(
    env: Annotated[str, ARGUMENT("Environment with an expert: babyai/LEVEL or pusht.")],
    out: Annotated[str, NAME("Folder of the new LeRobot v3 dataset.")],
    episodes: Annotated[int, COUNT("Successful episodes to collect.")] = 100,
    seed: Annotated[int, SEED("Seed of the first attempt; attempt i uses seed + i.")] = 0,
    resolution: Resolution = 0,
    view: View = "agent",
    workers: Annotated[int, WORKERS("Processes; 0: one per core. Changes nothing in the data.")] = 0,
    explore: Annotated[float, between(0.0, 1.0)("Share of steps with an exploring action.")] = 0.0,
    max_steps: Annotated[int, LIMIT("Steps after which an attempt failed; 0: the limit.")] = 0,
    distract: Distract = "",
) -> None:
    """Play a scripted expert and keep its successful episodes.

    Example: latentact collect babyai/GoToRedBall --episodes 1500 --out data/red_ball
    """
    given = {**locals()}
    from latentact.stages import collect as stage

    result = stage.run(stage.CollectConfig(**given))
    print(
        f"{result.episodes} episodes, {result.frames} frames, {result.failed} failed attempts: {result.path}"
    )


@app.command()
def cache(
    data: Annotated[str, typer.Option(help="Dataset, folder of videos or video to decode now.")] = "",
    camera: Camera = "",
    resolution: Resolution = 64,
    target_fps: TargetFps = 0.0,
    strict: Strict = False,
    clear: Annotated[str, typer.Option(help="'all', or the key of an entry, to remove.")] = "",
    cache_dir: Annotated[
        str, typer.Option(help="Where; empty: $LATENTACT_CACHE or ~/.cache/latentact.")
    ] = "",
) -> None:
    """Show the cache of decoded frames, fill it for a dataset, or clear it.

    Examples: latentact cache; latentact cache --data DIR --resolution 56; latentact cache --clear all
    """
    import time

    from latentact.data.cache import DataConfig
    from latentact.stages import cache as stage

    config = DataConfig(
        path=data,
        camera=camera,
        resolution=resolution,
        target_fps=target_fps,
        strict=strict,
        cache_dir=cache_dir,
    )
    found = stage.run(config if data else None, clear=clear, cache_dir=cache_dir)
    for entry in found.removed:
        print(f"removed {entry.key} ({entry.bytes / 1e6:.1f} MB)")
    for entry in found.entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_use))
        what = f"{entry.frames} frames of {entry.resolution}" if entry.finished else "unfinished"
        print(f"{entry.key}  {entry.bytes / 1e6:8.1f} MB  {used}  {what}  {entry.dataset} {entry.camera}")
    print(f"{found.folder}: {len(found.entries)} entries, {found.bytes / 1e6:.1f} MB")


@app.command(name="check-data")
def check_data(
    path: Annotated[str, ARGUMENT("Dataset, folder of videos, or one file.")],
    camera: Annotated[str, typer.Option(help="Camera key; empty: all of them.")] = "",
    max_frames: Annotated[
        int, LIMIT("Frames to decode of each camera, spread over episodes; 0: none.")
    ] = 20_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    html: Annotated[str, typer.Option(help="File of a page with a contact sheet; empty: none.")] = "",
) -> None:
    """Say what a dataset is, what readers refuse, skip or repair, and whether to train on it.

    Example: latentact check-data data/red_ball --html check.html
    """
    import json

    from latentact.reporting.pages.data import summary
    from latentact.stages import check_data as stage

    config = stage.CheckDataConfig(path=path, camera=camera, max_frames=max_frames, html=html)
    found = stage.run(config)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        files = [f"unreadable: {name}: {why}" for name, why in list(found.unreadable.items())[:20]]
        files += [f"skipped: {name}: {why}" for name, why in list(found.skipped.items())[:20]]
        print(
            summary(found), *(f"warning: {line}" for line in found.warnings), *files, found.verdict, sep="\n"
        )
    if not found.usable:
        raise typer.Exit(2)


@app.command(name="train-lam", context_settings=HYDRA)
def train_lam(context: typer.Context) -> None:
    """Learn a latent action model from video. Takes Hydra overrides; see --help."""
    _hydra(
        "train_lam",
        "TrainLamConfig",
        context,
        "latentact train-lam experiment=babyai data.path=data/red_ball",
    )


@app.command(name="convert-lam")
def convert_lam(
    where: Annotated[
        str,
        ARGUMENT("Folder, file or hub id of a villa-X, LAPO or LAPA model."),
    ],
    out: Annotated[str, NAME("Folder for the model.")],
    window: Annotated[str, typer.Option(help="villa-X: sliding or chunked; empty: sliding.")] = "",
    image_size: Annotated[int, PIXELS("LAPA: pixels it was trained at; 0: 256.")] = 0,
    code_seq_len: Annotated[int, between(0, 1 << 20)("LAPA: codes per transition; 0: 4.")] = 0,
) -> None:
    """Write a published latent action model in our format; it gives the same numbers.

    Example: latentact convert-lam microsoft/villa-x --out models/villa_x
    """
    from latentact.stages import convert_lam as stage

    given = {"window": window, "image_size": image_size, "code_seq_len": code_seq_len}
    print(stage.run(where, out, **{name: value for name, value in given.items() if value}))


@app.command()
def label(
    lam: Annotated[str, NAME("Folder or hub id of the latent action model.")],
    data: Annotated[str, NAME("Dataset, folder of videos, or one video.")],
    out: Annotated[str, NAME("Folder for the labels.")],
    camera: Camera = "",
    resolution: Annotated[
        int,
        between(-1, 4096)("Frame size in pixels; -1: the model's own; 0: the data's."),
    ] = -1,
    target_fps: TargetFps = 0.0,
    frame_gap_s: FrameGap = 0.0,
    strict: Strict = False,
    drop_nonfinite: DropNonfinite = False,
    batch_size: Annotated[int, BATCH("Transitions encoded together.")] = 256,
    device: Device = "cpu",
    precision: Precision = "fp32",
) -> None:
    """Write latent actions for every frame of a dataset.

    Example: latentact label --lam runs/lam --data data/red_ball --out data/red_ball_labels
    """
    from latentact.data.cache import DataConfig
    from latentact.stages import label as stage

    size = 0 if resolution == -1 else resolution
    config = DataConfig(
        path=data,
        camera=camera,
        resolution=size,
        target_fps=target_fps,
        strict=strict,
        drop_nonfinite=drop_nonfinite,
    )
    print(
        stage.run(
            stage.LabelConfig(
                lam=lam,
                data=config,
                out=out,
                lam_resolution=resolution == -1,
                frame_gap_s=frame_gap_s,
                batch_size=batch_size,
                device=device,
                precision=precision,
            )
        )
    )


@app.command()
def precompute(
    lam_model_path: Annotated[str, NAME("Folder or hub id of the latent action model.")],
    output_dir: Annotated[str, NAME("Folder of the new dataset, or of the token files.")],
    dataset_repo_id: Annotated[str, typer.Option(help="Hub id of a LeRobot dataset.")] = "",
    dataset_root: Annotated[
        str, typer.Option(help="Folder of a LeRobot dataset or of videos; empty: lerobot's own place.")
    ] = "",
    camera_key: Camera = "",
    batch_size: Annotated[int, BATCH("Transitions encoded together.")] = 256,
    device: Device = "cpu",
    precision: Precision = "fp32",
    tokens: Annotated[
        str, typer.Option(help="continuous: before the quantizer; vq: after it.")
    ] = "continuous",
    frame_gap_s: FrameGap = 0.0,
    output: Annotated[
        str, typer.Option(help="column: a LeRobot v3 dataset; file: .safetensors and .pt; both.")
    ] = "column",
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    num_workers: Annotated[int, WORKERS("Decoding threads; 0: one per core.")] = 0,
    drop_nonfinite: DropNonfinite = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Compute again, and replace.")] = False,
) -> None:
    """Write the LAM tokens of a dataset once, for every later run; torchrun shares the work.

    Example: latentact precompute --dataset-root data/pusht --lam-model-path runs/lam --output-dir data/tokens
    """
    given = {**locals()}
    from latentact.stages import precompute as stage

    print(stage.run(stage.PrecomputeConfig(**given)))


@app.command(name="train-with-tokens")
def train_with_tokens(
    output_dir: Annotated[str, NAME("Run folder; the same command goes on where it stopped.")],
    dataset_repo_id: Annotated[str, typer.Option(help="Hub id of a LeRobot v3 dataset.")] = "",
    dataset_root: Annotated[
        str, typer.Option(help="Its folder; empty: lerobot's own place, or the hub.")
    ] = "",
    lam_tokens_path: Annotated[
        str, typer.Option(help="Token file of precompute; empty: the dataset has the column.")
    ] = "",
    policy: Annotated[str, typer.Option(help="lam_diffusion or lam_act.")] = "lam_diffusion",
    num_epochs: Annotated[int, COUNT("Passes over the dataset.")] = 100,
    batch_size: Annotated[int, BATCH("Samples per step.")] = 8,
    learning_rate: Annotated[float, between(0.0, 100.0)("Peak learning rate; 0: the policy's own.")] = 0.0,
    device: Device = "cpu",
    seed: Annotated[int, SEED("Seed of weights, order and noise.")] = 1000,
    num_workers: Annotated[int, WORKERS("Processes that load data; 0: none besides this.")] = 0,
    policy_override: Annotated[
        list[str] | None, typer.Option(help="Setting of the policy as KEY=VALUE; may be repeated.")
    ] = None,
) -> None:
    """Train a LeRobot policy that is conditioned on LAM tokens.

    Example: latentact train-with-tokens --dataset-root data/pusht_tokens --output-dir runs/lam_diffusion
    """
    from latentact.stages import train_with_tokens as stage

    config = stage.TrainWithTokensConfig(
        out=output_dir,
        dataset_repo_id=dataset_repo_id,
        dataset_root=dataset_root,
        lam_tokens_path=lam_tokens_path,
        policy=policy,
        num_epochs=num_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        device=device,
        seed=seed,
        num_workers=num_workers,
        overrides=tuple(policy_override or ()),
    )
    print(stage.run(config))


@app.command(name="train-policy", context_settings=HYDRA)
def train_policy(context: typer.Context) -> None:
    """Learn a policy from latent labels or robot actions. Takes Hydra overrides; see --help."""
    _hydra("train_policy", "TrainPolicyConfig", context, "latentact train-policy labels=data/red_ball_labels")


@app.command(context_settings=HYDRA)
def ground(context: typer.Context) -> None:
    """Learn latent action -> robot action from few labeled episodes. Takes Hydra overrides; see --help."""
    example = "latentact ground policy=runs/policy labels=data/red_ball_labels labeled_episodes=5"
    _hydra("ground", "GroundConfig", context, example)


@app.command()
def rollout(
    policy: Annotated[str, NAME("Folder or hub id of a policy that ends in robot actions.")],
    env: Annotated[str, NAME("babyai/LEVEL, pusht, or a Gymnasium id.")],
    out: Annotated[str, NAME("Folder for rollout.json and videos.")],
    episodes: Annotated[int, COUNT("Episodes; episode i starts from seed + i.")] = 100,
    seed: Annotated[int, SEED("Reset seed of the first episode.")] = 100_000,
    view: View = "agent",
    distract: Distract = "",
    max_steps: Annotated[int, LIMIT("Steps that end an episode; 0: the environment's limit.")] = 0,
    record: Annotated[int, LIMIT("Episodes whose video is kept.")] = 3,
    device: Device = "cpu",
) -> None:
    """Run a policy in an environment and keep success, return and videos.

    Example: latentact rollout --policy runs/ground --env babyai/GoToRedBall --out runs/rollout
    """
    given = {**locals()}
    from latentact.stages import rollout as stage

    result = stage.run(stage.RolloutConfig(**given))
    print(f"{stage.summary(result)}: {out}")


@app.command()
def imitate(
    output_dir: Annotated[str, NAME("Folder for the guide, metrics, video and page.")],
    video_path: Annotated[str, typer.Option(help="Video of the demonstration.")] = "",
    latents_path: Annotated[
        str, typer.Option(help="Latents that an earlier run wrote, instead of a video.")
    ] = "",
    policy_path: Annotated[str, typer.Option(help="Policy that follows latent actions.")] = "",
    lam_model_path: Annotated[str, typer.Option(help="LAM that the policy was trained with.")] = "",
    device: Device = "cpu",
    target_fps: Annotated[float, RATE("Frames per second of the guide; 0: the LAM's.")] = 0.0,
    max_frames: Annotated[int, LIMIT("Frames of the video to use; 0: all.")] = 0,
    lam_resolution: Annotated[
        int, PIXELS("Size to which frames are resized before the LAM; 0: as they are.")
    ] = 224,
    mode: Annotated[str, typer.Option(help="extract_only, simulation or robot.")] = "simulation",
    env_name: Annotated[
        str, typer.Option(help="simulation: PushT-v0, babyai/LEVEL or any Gymnasium id.")
    ] = "PushT-v0",
    seed: Annotated[int, SEED("simulation: reset seed of the environment.")] = 0,
    robot_config: Annotated[str, typer.Option(help="robot: YAML file of the robot and its limits.")] = "",
    max_steps: Annotated[int, LIMIT("Actions after which it ends; 0: the guide's end.")] = 0,
    control_time_s: Annotated[float, SECONDS("Seconds after which it ends; 0: likewise.")] = 0.0,
    fps: Annotated[float, RATE("Control steps per second; 0: what the policy knows.")] = 0.0,
    time_base: Annotated[
        str, typer.Option(help="Guide and control at different rates: hold or resample.")
    ] = "hold",
    no_render: Annotated[bool, typer.Option("--no-render", help="Keep no pictures.")] = False,
    no_save_video: Annotated[bool, typer.Option("--no-save-video", help="Write no video.")] = False,
) -> None:
    """Let one demonstration video guide a policy, in simulation or on a robot.

    Example: latentact imitate --video-path demo.mp4 --lam-model-path runs/lam --policy-path runs/ground
    --env-name PushT-v0 --output-dir runs/imitate
    """
    given = {**locals()}
    from latentact.reporting.pages.imitate import headline
    from latentact.stages import imitate as stage

    render, save_video = not given.pop("no_render"), not given.pop("no_save_video")
    result = stage.run(stage.ImitateConfig(**given, render=render, save_video=save_video))
    print(f"{result['guide']['latent_actions']} latent actions: {output_dir}")
    if mode != "extract_only":
        print(headline(result))


@app.command(name="check-guidance")
def check_guidance(
    policy_path: Annotated[str, NAME("Folder or hub id of a policy that follows a guide.")],
    lam_model_path: Annotated[str, NAME("The LAM that turns demonstrations into guides.")],
    output_dir: Annotated[str, NAME("Folder for guidance.json.")],
    env_name: Annotated[str, typer.Option(help="Environment with an expert.")] = "pusht",
    demos: Annotated[int, COUNT("Demonstrations.")] = 30,
    seed: Annotated[int, SEED("Reset seed of the first demonstration.")] = 500_000,
    device: Device = "cpu",
) -> None:
    """Roll a guided policy out with the matching demonstration, a wrong one and none.

    Example: latentact check-guidance --policy-path runs/guided --lam-model-path runs/lam --output-dir check
    """
    from latentact.stages import check_guidance as stage

    config = stage.CheckGuidanceConfig(
        policy=policy_path,
        lam=lam_model_path,
        out=output_dir,
        env=env_name,
        demos=demos,
        seed=seed,
        device=device,
    )
    result = stage.run(config)
    for name, found in result["conditions"].items():
        numbers = [
            f"{k} {v['mean']:.3g} ({v['ci95'][0]:.3g} to {v['ci95'][1]:.3g})" for k, v in found.items()
        ]
        print(f"{name:9s} {', '.join(numbers)}")
    print(result["verdict"])


@app.command(context_settings=HYDRA)
def compare(context: typer.Context) -> None:
    """Judge latent policies beside BC, IDM and oracle. Takes Hydra overrides; see --help."""
    example = "latentact compare experiment=babyai data.path=data/red_ball env=babyai/GoToRedBall ks=[5]"
    _hydra("compare", "CompareConfig", context, example)


@app.command()
def inspect(
    lam: Annotated[str, ARGUMENT("Folder, file or hub id of the latent action model.")],
    data: Annotated[str, NAME("Dataset, folder of videos, or one video.")],
    out: Annotated[
        str, typer.Option(help="Folder for inspect.html and inspect.json; empty: the LAM's, or ./inspect.")
    ] = "",
    camera: Camera = "",
    frame_gap_s: FrameGap = 0.0,
    held_out: Annotated[
        float | None,
        between(0.0, 1.0)("Share of the episodes to judge on; empty: what its training held out, else all."),
    ] = None,
    seed: Annotated[
        int | None,
        SEED("Seed of that choice and of all draws; empty: its training's."),
    ] = None,
    device: Device = "cpu",
    max_transitions: Annotated[int, COUNT("Transitions looked at.")] = 2048,
    drop_nonfinite: DropNonfinite = False,
) -> None:
    """Say whether a latent action model is any good: go or no-go, why, and what to try next.

    Example: latentact inspect runs/lam --data data/red_ball
    """
    given = {**locals()}
    from latentact.stages import inspect_lam as stage

    result = stage.run(stage.InspectConfig(**given))
    cautions = [f"Caution: {said}" for said in result.cautions]
    print(result.verdict, *cautions, result.next, result.html, sep="\n")


@app.command()
def report(
    run_dir: Annotated[str, ARGUMENT("Folder of a LAM run, a comparison or a demo.")],
) -> None:
    """Write report.html and report.json for a run.

    Example: latentact report runs/demo
    """
    from latentact.stages import report as stage

    result = stage.run(Path(run_dir))
    print(f"{result.verdict}\n{result.html}")


@app.command()
def demo(
    out: Annotated[
        str, typer.Option(help="Run folder; the same command goes on where it stopped.")
    ] = "runs/demo",
    experiment: Annotated[str, typer.Option(help="Experiment of `compare`.")] = "babyai",
    episodes: Annotated[int, COUNT("Demonstrations to collect.")] = 1500,
    k: Annotated[int, COUNT("Labeled episodes.")] = 5,
    seed: Annotated[int, SEED("Seed of everything.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of `compare`, as KEY=VALUE.")
    ] = None,
) -> None:
    """From nothing to a page: collect, learn from video, ground, compare, report.

    Example: latentact demo
    """
    given = {**locals(), "overrides": tuple(overrides or ())}
    from latentact.stages import demo as stage

    result = stage.run(stage.DemoConfig(**given))
    print(f"\n{result.verdict}\n\nThe page: {result.html.absolute()}")


def _hydra(stage: str, config: str, context: typer.Context, example: str) -> None:
    import importlib

    from latentact.config import run_stage

    module = importlib.import_module(f"latentact.stages.{stage}")
    run_stage(stage, getattr(module, config), module.run, context.args, example)


_PLACES = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}
"""What is wrong with a path that was typed."""


def main() -> None:
    """Run the command line: exit code 2 and one sentence for bad input, 130 when interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _quiet()
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(error)
    except _USAGE as error:
        if not str(error):  # without arguments: the help has been shown
            sys.exit(2)
        _fail(UserError(_misused(error)))
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in EXTRAS:
            raise
        _fail(missing_extra(name, EXTRAS[name]))
    except OSError as error:
        if disk_full(error):
            _fail(UserError("the disk is full; free some space and run the same command again."))
        if error.errno not in _PLACES or not error.filename:
            raise
        _fail(UserError(f"{error.filename}: {error.strerror}; give another place."))
    if code == 130:  # what Typer makes of Ctrl-C
        resumes = sys.argv[1:2] not in (["imitate"], ["check-guidance"], ["rollout"], ["inspect"])
        more = "; the same command goes on where it stopped" if resumes else ""
        print(f"interrupted{more}", file=sys.stderr)
    sys.exit(code or 0)


_USAGE: type[Exception] = typer.BadParameter.__mro__[1]
"""What Typer raises for flags and arguments that a command does not have or take."""


def _misused(error: Any) -> str:
    """Describe an unknown command or flag, or a value that is not of the flag's type."""
    command = error.ctx.info_name if error.ctx and error.ctx.parent else ""
    said, typed = error.format_message(), getattr(error, "param", None)
    if typed and error.message:
        wanted = error.message.partition(", unable")[0].removeprefix("Input should be ")
        said = f"{typed.opts[0]} must be {wanted}, got another value"
    return (
        f"{' '.join(said.split()).rstrip('.')}; see {' '.join(filter(None, ('latentact', command)))} --help."
    )


def _fail(error: Exception) -> NoReturn:
    """Print one line, without the middle of what was given where that is long, and exit."""
    said = " ".join(str(error).split())
    said = said if len(said) <= _LONGEST else f"{said[: _LONGEST - 300]} [...] {said[-290:]}"
    print(f"error: {said}", file=sys.stderr)
    sys.exit(2)


_LONGEST = 1000
"""Characters of a message."""


def _quiet() -> None:
    """Keep libraries' greetings off the terminal."""
    import warnings

    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|pygame|gymnasium|lerobot)(\.|$)")


if __name__ == "__main__":
    main()
