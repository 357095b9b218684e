"""Do latent actions pay? Latent policies, plain inverse dynamics and BC on several environments: one page.

Run: python benchmarks/pays.py --out runs/pays      (re-run an interrupted command to resume it)

Every cell is one environment, with or without distractors that move with the actions; each seed of a cell is
one run of `latentact compare` with equal numbers of updates per row, for every k. Commands with other cells
or seeds can run at the same time on the same folder, once a cell's demonstrations are collected; one with all
of them then writes the page. The page answers for every k whether the best latent row is ahead of the best
row without latent actions, both by their success in the evaluation, and first lists the cells where it is
not. `--quick` uses one k, one seed, fewer updates and episodes, and the cells with cheap environments.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

from latentact.composition import load_experiment
from latentact.evaluation.policy.comparison import BASELINES, LATENT, METHODS, Result, Row, aggregate
from latentact.io.atomic import atomic_write
from latentact.stages import collect, compare

log = logging.getLogger("pays")

ROWS = ("latent", "latent_joint", "bc_k", "bc_k_self_training", "idm_k", "idm_k_finetuned", "oracle")
ACT = ("act_k",)
"""Of environments with continuous actions; LeRobot's batch size, with as many updates as the other rows."""
CLEAN, DISTRACTED = "", "background=0.5,shake=0.3,correlation=0.8"
QUICK = 2
"""What `--quick` divides the numbers of updates by."""
TRAININGS = ("lam_training", "idm_training", "policy_training")


@dataclass(frozen=True)
class Cell:
    """One environment and its demonstrations."""

    env: str
    experiment: str
    """Of `latentact compare`."""
    demonstrations: int
    explore: float = 0.0
    """Of `collect`: exploratory actions, where the expert's actions follow from what is seen."""
    seed: int = 0
    """Of the first demonstration."""
    joint: bool = True
    """Whether the LAM of the experiment can have an action head."""
    continuous: bool = False
    """Whether actions are continuous, so that ACT can predict them."""
    settings: tuple[str, ...] = ()

    @property
    def pixels(self) -> bool:
        """Whether observations are images, so that distractors can be drawn."""
        return not self.env.startswith("xland")


CELLS = {
    "GoToRedBall": Cell("babyai/GoToRedBall", "babyai", 1500),
    "GoToRedBlueBall": Cell("babyai/GoToRedBlueBall", "babyai_redblue", 1500),
    "GoToLocal": Cell("babyai/GoToLocal", "babyai_gotolocal", 1500),
    "XLand": Cell("xland/R1-9x9/1", "xland", 10_000, explore=0.2, joint=False),
    "maze": Cell(
        "procgen/maze",
        "procgen_maze",
        1500,
        explore=0.1,
        seed=10_000,
        joint=False,
        settings=("max_steps=40",),
    ),
    "drawer-open": Cell(
        "metaworld/drawer-open-v3", "metaworld", 200, continuous=True, settings=("max_steps=200",)
    ),
    "button-press": Cell(
        "metaworld/button-press-topdown-v3", "metaworld", 200, continuous=True, settings=("max_steps=200",)
    ),
    "PushT": Cell("pusht", "pusht", 200, continuous=True),
}
CHEAP = ("GoToRedBall", "GoToRedBlueBall", "XLand")


def run(place: str, cell: Cell, distract: str, out: Path, given: argparse.Namespace) -> list[Result]:
    """Collect and compare what is missing of a cell, and return its results."""
    data = collect.CollectConfig(
        env=cell.env,
        out=str(out / "data" / f"{place}_{cell.demonstrations}"),
        episodes=cell.demonstrations,
        explore=cell.explore,
        seed=cell.seed,
        distract=distract,
    )
    collect.run(data)
    rows: list[Row] = []
    for seed in given.seeds:
        found = compare.run(settings(cell, distract, data.out, seed, given), folder(out, place, seed, given))
        rows += [Row.from_json(row) for row in found["rows"]]
    return aggregate(rows)


def folder(out: Path, place: str, seed: int, given: argparse.Namespace) -> Path:
    """Return the run folder of one seed of a cell."""
    return out / ("quick" if given.quick else "full") / place / f"seed{seed}"


def settings(
    cell: Cell, distract: str, data: str, seed: int, given: argparse.Namespace
) -> compare.CompareConfig:
    """Return the settings of one seed's comparison."""
    rows = [row for row in ROWS if cell.joint or row != "latent_joint"]
    if cell.continuous:
        rows += ACT
    overrides = [
        f"experiment={cell.experiment}",
        f"env={cell.env}",
        f"data.path={data}",
        f"methods=[{','.join(rows)}]",
        f"ks={given.ks}",
        f"seeds=[{seed}]",
        f"episodes={given.episodes}",
        f"distract='{distract}'",
        "record=0",
        *(["lerobot.batch_size=8"] if cell.continuous else []),
        *cell.settings,
        *given.overrides,
    ]
    config = load_experiment("compare", compare.CompareConfig, overrides)
    if not given.quick:
        return config
    shorter = [f"{group}.steps={getattr(config, group).steps // QUICK}" for group in TRAININGS]
    return load_experiment("compare", compare.CompareConfig, [*overrides, *shorter])


def best(results: list[Result], k: int, methods: tuple[str, ...]) -> Result | None:
    """Return the result with the highest score among some methods at one k."""
    known = [r for r in results if r.k == k and r.method.removesuffix("_decoder_only") in methods]
    return max(known, key=lambda r: r.score, default=None)


def relation(latent: Result, plain: Result) -> str:
    """Return whether a latent row is ahead of another one, and whether their intervals are apart."""
    if latent.interval[0] > plain.interval[1]:
        return "ahead"
    if latent.interval[1] < plain.interval[0]:
        return "behind"
    if latent.score == plain.score:
        return "equal"
    return "ahead, intervals overlap" if latent.score > plain.score else "behind, intervals overlap"


def write(out: Path, results: dict[str, list[Result]]) -> None:
    """Write the page: where latent actions do not pay, then all rows."""
    ks = sorted({r.k for rows in results.values() for r in rows if r.k is not None})
    verdicts, lines = [], []
    for k in ks:
        pairs = {
            cell: (latent, plain)
            for cell, rows in results.items()
            if (latent := best(rows, k, LATENT)) and (plain := best(rows, k, BASELINES))
        }
        found = {cell: relation(*pair) for cell, pair in pairs.items()}
        losing = [f"{cell} ({found[cell]})" for cell in found if found[cell] != "ahead"]
        apart = sum(value == "ahead" for value in found.values())
        shares = [
            latent.score / oracle.score
            for cell, (latent, _) in pairs.items()
            if (oracle := next((r for r in results[cell] if r.method == "oracle"), None)) and oracle.score > 0
        ]
        if losing:
            first = f"With k = {k}, latent actions do not clearly pay on {', '.join(losing)}"
        else:
            first = f"With k = {k}, latent actions are clearly ahead in every cell"
        verdict = f"{first}; they are ahead with non-overlapping intervals in {apart} of {len(found)} cells"
        if shares:
            verdict += (
                f"; the best latent row reaches {sum(shares) / len(shares):.2f} of the oracle on average"
            )
        verdicts += [f"{verdict}.", ""]
        lines += [f"## k = {k}", "", "| method | " + " | ".join(results) + " |"]
        lines += ["| --- |" + " --- |" * len(results)]
        for method, label in METHODS.items():
            cells = {
                c: next((r for r in rows if r.method == method and r.k in (k, None)), None)
                for c, rows in results.items()
            }
            if any(cells.values()):
                lines += [f"| {label} | " + " | ".join(_cell(r) for r in cells.values()) + " |"]
        lines += ["| best latent row | " + " | ".join(found.get(cell, "") for cell in results) + " |", ""]
    text = "\n".join(["# Do latent actions pay?", "", *verdicts, *lines])
    with atomic_write(out / "does_it_pay.md") as partial:
        partial.write_text(text + "\n")


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    low, high = result.interval
    return f"{result.score:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="runs/pays", help="run folder; re-run to resume")
    parser.add_argument("--cells", nargs="+", choices=CELLS, help="default: all; with --quick the cheap ones")
    parser.add_argument("--ks", type=int, nargs="+", help="default: 2 5 20; with --quick 5")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; with --quick 0")
    parser.add_argument("--episodes", type=int, default=0, help="per row; default: 200, with --quick 100")
    parser.add_argument("--clean", action="store_true", help="without the cells with distractors")
    parser.add_argument("--quick", action="store_true", help="30 minutes instead of a day")
    parser.add_argument("overrides", nargs="*", help="settings of latentact compare; before the flags")
    given = parser.parse_args()
    quick, out, results = given.quick, Path(given.out), {}
    given.cells = given.cells or [*(CHEAP if quick else CELLS)]
    given.ks = given.ks or ([5] if quick else [2, 5, 20])
    given.seeds = given.seeds or ([0] if quick else [0, 1, 2])
    given.episodes = given.episodes or (100 if quick else 200)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for distract in (CLEAN,) if given.clean or quick else (CLEAN, DISTRACTED):
        for name in given.cells:
            if distract and not CELLS[name].pixels:
                continue
            place = f"{name}{'_distracted' if distract else ''}"
            log.info("=== %s", place)
            results[place] = run(place, CELLS[name], distract, out, given)
            write(out, results)
    print((out / "does_it_pay.md").read_text())


if __name__ == "__main__":
    main()
