"""Train three small reference LAMs, each with a model card: BabyAI, PushT and clips of a real robot.

Run: python benchmarks/reference_lams.py --clips DATA      (re-run an interrupted command to resume it)

DATA is anything that `data.path` takes, such as a folder of videos or a LeRobot dataset; no actions are used.
Without it, only the simulated ones are made. `models/NAME` holds what `latentact push models/NAME OWNER/NAME`
uploads: weights, settings, evaluation and card.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from latentact.composition import load_experiment
from latentact.io.atomic import atomic_write
from latentact.stages import collect, push, train_lam

log = logging.getLogger("reference_lams")


@dataclass(frozen=True)
class Reference:
    """A LAM and its data."""

    experiment: str
    """Of `train-lam`."""
    env: str = ""
    """Environment of the demonstrations; empty: the clips that are given."""
    demonstrations: int = 0
    settings: tuple[str, ...] = ()


HALF = ("lam.idm_channels=[32,64,64]", "lam.fdm_channels=[32,64]")
"""Half of the channels of the experiment `pusht`: weights of 4.1 MB instead of 14.4 MB."""
REFERENCES = {
    "babyai": Reference(
        "babyai", "babyai/GoToRedBall", 1500, ("lam.idm_channels=[48]", "lam.fdm_channels=[80]")
    ),
    "pusht": Reference("pusht", "pusht", 250, HALF),
    "robot_clips": Reference("pusht", settings=(*HALF, "frame_gap_s=0.2")),
}
"""Small enough to be released beside the code: at most 5 MB each."""


def make(name: str, reference: Reference, work: Path, given: argparse.Namespace) -> Path:
    """Collect and train what is missing, and return the folder of the LAM."""
    data = given.clips
    if reference.env:
        data = str(work / f"data_{name}_{given.demonstrations or reference.demonstrations}")
        collect.run(
            collect.CollectConfig(
                env=reference.env, out=data, episodes=given.demonstrations or reference.demonstrations
            )
        )
    settings = [f"experiment={reference.experiment}", f"data.path={data}", *reference.settings]
    settings += [f"training.steps={given.steps}", f"training.warmup_steps={given.steps // 5}"] * bool(
        given.steps
    )
    return train_lam.run(load_experiment("train_lam", train_lam.TrainLamConfig, settings), work / name)


def release(lam: Path, name: str, out: Path) -> int:
    """Write the files that `push` uploads, and return their size in bytes."""
    files = push.run(push.PushConfig(folder=str(lam), repo=f"latentact/{name}", dry_run=True)).files
    out.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        if isinstance(content, bytes):
            with atomic_write(out / file) as partial:
                partial.write_bytes(content)
        else:
            shutil.copyfile(content, out / file)
    return sum(path.stat().st_size for path in out.iterdir())


def main() -> None:
    """Make every LAM, and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", default="", help="videos or dataset of a real robot")
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder of the finished LAMs")
    parser.add_argument("--work", type=Path, default=Path("runs/reference_lams"), help="data and runs")
    parser.add_argument("--only", nargs="*", choices=REFERENCES, default=[*REFERENCES], help="names")
    parser.add_argument("--steps", type=int, default=0, help="fewer updates, to try it; 0: the experiment's")
    parser.add_argument("--demonstrations", type=int, default=0, help="fewer demonstrations, to try it")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in given.only:
        reference = REFERENCES[name]
        if not reference.env and not given.clips:
            log.info("%s needs --clips; skipped", name)
            continue
        lam = make(name, reference, given.work, given)
        size = release(lam, name, given.out / name)
        print(f"{given.out / name}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
