"""`latentact <command>`: what can be typed, and no logic. Stages are imported when their command runs."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from latentact.checkpoint import disk_full
from latentact.errors import EXTRAS, UserError, missing_extra

app = typer.Typer(
    help="Robot policies from video without actions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="rich",
)
HYDRA = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

Resolution = Annotated[int, typer.Option(help="Height and width of frames in pixels; 0: as they are.")]
View = Annotated[str, typer.Option(help="agent: what the agent sees; full: the whole world.")]
Camera = Annotated[str, typer.Option(help="Camera key; empty: the only one there is.")]
TargetFps = Annotated[float, typer.Option(help="Frames per second to resample to; 0: the data's own.")]
Strict = Annotated[bool, typer.Option("--strict", help="An unreadable file is an error instead of skipped.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps.")]


@app.command()
def collect(
    env: Annotated[str, typer.Argument(help="Environment with an expert: babyai/LEVEL or pusht.")],
    out: Annotated[str, typer.Option(help="Folder of the new LeRobot v3 dataset.")],
    episodes: Annotated[int, typer.Option(help="Successful episodes to collect.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the first attempt; attempt i uses seed + i.")] = 0,
    resolution: Resolution = 0,
    view: View = "agent",
    workers: Annotated[
        int, typer.Option(help="Processes; 0: one per core. Changes nothing in the data.")
    ] = 0,
    explore: Annotated[float, typer.Option(help="Share of steps with an exploring action.")] = 0.0,
    max_steps: Annotated[int, typer.Option(help="Steps after which an attempt failed; 0: the limit.")] = 0,
) -> None:
    """Play a scripted expert and keep its successful episodes.

    Example: latentact collect babyai/GoToRedBall --episodes 1500 --out data/red_ball
    """
    from latentact.stages import collect as stage

    result = stage.run(
        stage.CollectConfig(
            env=env,
            out=out,
            episodes=episodes,
            seed=seed,
            resolution=resolution,
            view=view,
            workers=workers,
            explore=explore,
            max_steps=max_steps,
        )
    )
    print(result)


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


@app.command(name="train-lam", context_settings=HYDRA)
def train_lam(context: typer.Context) -> None:
    """Learn a latent action model from video. Takes Hydra overrides; see --help."""
    _hydra(
        "train_lam",
        "TrainLamConfig",
        context,
        "latentact train-lam experiment=babyai data.path=data/red_ball",
    )


@app.command()
def label(
    lam: Annotated[str, typer.Option(help="Folder or hub id of the latent action model.")],
    data: Annotated[str, typer.Option(help="Dataset, folder of videos, or one video.")],
    out: Annotated[str, typer.Option(help="Folder for the labels.")],
    camera: Camera = "",
    resolution: Resolution = -1,
    target_fps: TargetFps = 0.0,
    strict: Strict = False,
    batch_size: Annotated[int, typer.Option(help="Transitions encoded together.")] = 256,
    device: Device = "cpu",
) -> None:
    """Write latent actions for every frame of a dataset.

    Example: latentact label --lam runs/lam --data data/red_ball --out data/red_ball_labels
    """
    from latentact.data.cache import DataConfig
    from latentact.stages import label as stage

    size = stage.default_resolution(lam) if resolution < 0 else resolution
    config = DataConfig(path=data, camera=camera, resolution=size, target_fps=target_fps, strict=strict)
    print(stage.run(stage.LabelConfig(lam=lam, data=config, out=out, batch_size=batch_size, device=device)))


@app.command(name="train-policy", context_settings=HYDRA)
def train_policy(context: typer.Context) -> None:
    """Learn a policy from latent labels or robot actions. Takes Hydra overrides; see --help."""
    _hydra("train_policy", "TrainPolicyConfig", context, "latentact train-policy labels=data/red_ball_labels")


@app.command(context_settings=HYDRA)
def ground(context: typer.Context) -> None:
    """Learn latent action -> robot action from few labelled episodes. Takes Hydra overrides; see --help."""
    example = "latentact ground policy=runs/policy labels=data/red_ball_labels labelled_episodes=5"
    _hydra("ground", "GroundConfig", context, example)


@app.command()
def rollout(
    policy: Annotated[str, typer.Option(help="Folder or hub id of a policy that ends in robot actions.")],
    env: Annotated[str, typer.Option(help="babyai/LEVEL, pusht, or a Gymnasium id.")],
    out: Annotated[str, typer.Option(help="Folder for rollout.json and videos.")],
    episodes: Annotated[int, typer.Option(help="Episodes; episode i starts from seed + i.")] = 100,
    seed: Annotated[int, typer.Option(help="Reset seed of the first episode.")] = 100_000,
    view: View = "agent",
    max_steps: Annotated[
        int, typer.Option(help="Steps that end an episode; 0: the environment's limit.")
    ] = 0,
    record: Annotated[int, typer.Option(help="Episodes whose video is kept.")] = 3,
    device: Device = "cpu",
) -> None:
    """Run a policy in an environment and keep success, return and videos.

    Example: latentact rollout --policy runs/ground --env babyai/GoToRedBall --out runs/rollout
    """
    from latentact.stages import rollout as stage

    result = stage.run(
        stage.RolloutConfig(
            policy=policy,
            env=env,
            out=out,
            episodes=episodes,
            seed=seed,
            view=view,
            max_steps=max_steps,
            record=record,
            device=device,
        )
    )
    print(f"success {result['success']} {result['ci95']}, return {result['return']:.3g}: {out}")


@app.command(context_settings=HYDRA)
def compare(context: typer.Context) -> None:
    """Judge latent policies beside BC, IDM and oracle. Takes Hydra overrides; see --help."""
    example = "latentact compare experiment=babyai data.path=data/red_ball env=babyai/GoToRedBall ks=[5]"
    _hydra("compare", "CompareConfig", context, example)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a LAM run, a comparison or a demo.")],
) -> None:
    """Write report.html and report.json for a run.

    Example: latentact report runs/demo
    """
    from latentact.stages import report as stage

    result = stage.run(run_dir)
    print(f"{result.verdict}\n{result.html}")


@app.command()
def demo(
    out: Annotated[
        str, typer.Option(help="Run folder; the same command goes on where it stopped.")
    ] = "runs/demo",
    experiment: Annotated[str, typer.Option(help="Experiment of `compare`.")] = "babyai",
    episodes: Annotated[int, typer.Option(help="Demonstrations to collect.")] = 1500,
    k: Annotated[int, typer.Option(help="Labelled episodes.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of `compare`, as KEY=VALUE.")
    ] = None,
) -> None:
    """From nothing to a page: collect, learn from video, ground, compare, report.

    Example: latentact demo
    """
    from latentact.stages import demo as stage

    result = stage.run(
        stage.DemoConfig(
            out=out,
            experiment=experiment,
            episodes=episodes,
            k=k,
            seed=seed,
            overrides=tuple(overrides or ()),
        )
    )
    print(f"\n{result.verdict}\n\nThe page: {result.html.absolute()}")


def _hydra(stage: str, config: str, context: typer.Context, example: str) -> None:
    import importlib

    from latentact.config import run_stage

    module = importlib.import_module(f"latentact.stages.{stage}")
    run_stage(stage, getattr(module, config), module.run, context.args, example)


def main() -> None:
    """Run the command line: exit code 2 and one sentence for bad input, 130 when interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _quiet()
    try:
        app()
    except UserError as error:
        _fail(error)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in EXTRAS:
            raise
        _fail(missing_extra(name, EXTRAS[name]))
    except OSError as error:
        if not disk_full(error):
            raise
        _fail(UserError("the disk is full; free some space and run the same command again."))
    except SystemExit as stop:
        if stop.code == 130:  # what Typer makes of Ctrl-C
            print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise


def _fail(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


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
