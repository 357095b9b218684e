"""Every latent action model, with and without distractors, with and without k labeled episodes: one table.

Run: python benchmarks/lam_table.py --out runs/lam_table        (re-run an interrupted command to resume it)

All rows use the same episodes and the same k labels and are scored on the same held-out episodes:
- probe: R2 of the best of a linear and a small MLP probe of the action, fitted on half of them;
- motion: R2 of the best probe of the change of the robot state;
- k labels: R2 on all of them of a linear decoder fitted on the k labeled training episodes alone;
- nuisance: R2 of the best probe of the motion of background and camera; lower is better.
BC-k and IDM-k are scored alike, by the actions that they predict.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from latentact.composition import load_experiment
from latentact.data.cache import open_store
from latentact.data.mixture import TrainingDataConfig
from latentact.data.samples import PolicySamples
from latentact.data.splits import choose_labeled, split_episodes
from latentact.data.store import FrameStore
from latentact.data.windows import Clips
from latentact.evaluation.lam.inspect_probes import NUISANCE
from latentact.evaluation.lam.metrics import encode_rows
from latentact.evaluation.lam.probes import ProbeData, linear_probe, mlp_probe
from latentact.io.atomic import atomic_write, read_json, write_json
from latentact.lams.contract import LAMS, load_lam
from latentact.policies.bc import BcConfig
from latentact.policies.contract import Policy
from latentact.policies.network import NetworkConfig
from latentact.stages import collect, train_lam, train_policy
from latentact.training.settings import TrainingConfig

log = logging.getLogger("lam_table")

PATCHES = ("lam.backbone=patch", "lam.size=64", "lam.patch=4", "lam.channels=[64,128,128]")
MODELS: dict[str, tuple[str, ...]] = {
    "lapo": ("experiment=pusht",),
    "laq": ("experiment=laq_debug",),
    "villa_x": ("experiment=villa_x_debug",),
    "laom": ("experiment=laom_debug",),
    "clam": ("experiment=clam_debug",),
    "idm": ("lam=idm", *PATCHES, "lam.difference_input=4.0", "training.lr=5e-4"),
}
"""Model -> its settings of train-lam at a size for a laptop."""
NETWORK = NetworkConfig(backbone="patch", patch=4, channels=(64, 128, 128), n_obs_steps=2)
"""Network of BC: images only, as for the models."""
NAMES = {"idm": "IDM-k (supervised)", "bc": "BC-k"}
COLUMNS = ("probe", "motion", "k_labels", "nuisance")


@dataclass(frozen=True)
class Cell:
    """One model on one data set with k labels (0: none) and one seed."""

    data: str
    model: str
    k: int
    seed: int


def main() -> None:
    """Make what is missing, then the table."""
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out, kinds = Path(options.out), {"clean": "", "distractors": options.distract}
    _refuse_other_settings(out / "settings.json", options)
    data = {}
    for kind in options.kinds:
        config = collect.CollectConfig(
            env=options.env,
            out=str(out / "data" / kind),
            episodes=options.episodes,
            resolution=options.resolution,
            explore=options.explore,
            distract=kinds[kind],
        )
        data[kind] = collect.run(config).path
    cells = [
        Cell(kind, model, k, seed)
        for seed in range(options.seeds)
        for kind in options.kinds
        for model in options.models
        for k in (0, options.k)
        if _exists(model, k)
    ]
    rows = []
    for i, cell in enumerate(cells):
        log.info("--- %d of %d: %s", i + 1, len(cells), cell)
        rows.append({**vars(cell), **_measured(cell, data[cell.data], out, options)})
        write_json(out / "lam_table.json", rows)
        text = page(rows, options)
        with atomic_write(Path(options.page) if i + 1 == len(cells) else out / "lam_table.md") as partial:
            partial.write_text(text)
    print(page(rows, options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="runs/lam_table", help="run folder")
    parser.add_argument("--page", default="docs/lam_table.md", help="file of the finished table")
    parser.add_argument("--env", default="pusht")
    parser.add_argument("--episodes", type=int, default=150)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--explore", type=float, default=0.2)
    parser.add_argument("--distract", default="background=0.5,shake=0.3,correlation=0.8")
    parser.add_argument("--models", nargs="+", default=[*MODELS, "bc"], choices=[*MODELS, "bc"])
    parser.add_argument("--k", type=int, default=8, help="labeled episodes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--kinds", nargs="+", default=["clean", "distractors"], choices=["clean", "distractors"]
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps of every model")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--action-weight", type=float, default=1.0, help="of the labels in training a model")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the episodes that are scored")
    parser.add_argument("--set", nargs="*", default=[], help="further settings of every train-lam run")
    return parser.parse_args()


def _refuse_other_settings(path: Path, options: argparse.Namespace) -> None:
    """Rows of one folder are made with the same settings; more models, seeds and kinds of data may join."""
    free = ("out", "page", "models", "seeds", "kinds")
    settings = {name: value for name, value in vars(options).items() if name not in free}
    if path.is_file() and read_json(path) != settings:
        raise SystemExit(f"{path.parent} holds a table with other settings. Choose another --out.")
    write_json(path, settings)


def _exists(model: str, k: int) -> bool:
    """Whether a model can be trained with k labels; those that need labels have no row without."""
    if model in ("idm", "bc"):
        return k > 0
    if model not in LAMS.names():
        log.warning("lam=%s does not exist; skipping its rows", model)
        return False
    return not k or "action_weight" in {field.name for field in fields(LAMS.get(model))}  # type: ignore[arg-type]


def _measured(cell: Cell, path: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train, unless finished, and return the scores of a row."""
    folder = out / f"seed{cell.seed}" / cell.data / f"{cell.model}_k{cell.k}"
    if (folder / "row.json").is_file():
        return read_json(folder / "row.json")
    train = _train_bc if cell.model == "bc" else _train_lam
    features, rows, store = train(cell, path, folder, options)
    scores = _scores(features, rows, store, cell.seed, options)
    write_json(folder / "row.json", scores)
    return scores


def _split(store: FrameStore, seed: int, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """The k labeled episodes and the held-out ones, as `train-lam` and `train-policy` draw them."""
    train, held_out = split_episodes(store, held_out=options.held_out, seed=seed)
    if len(held_out) < 2:
        raise SystemExit(
            f"--held-out must leave at least 2 episodes, got {len(held_out)} with {options.held_out}."
        )
    return choose_labeled(train, options.k, seed), held_out


def _train_lam(
    cell: Cell, path: Path, folder: Path, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, FrameStore]:
    labels = [f"labeled_episodes={cell.k}"] if cell.k else []
    if cell.k and cell.model != "idm":
        labels.append(f"lam.action_weight={options.action_weight}")
    size = [
        f"training.steps={options.steps}",
        f"training.batch_size={options.batch_size}",
        "training.eval_every=0",
        f"training.seed={cell.seed}",
    ]
    fixed = [f"data.path={path}", f"held_out={options.held_out}", f"split_seed={cell.seed}"]
    config = load_experiment(
        "train_lam",
        train_lam.TrainLamConfig,
        [*MODELS[cell.model], *fixed, *size, *labels, *options.set],
    )
    model = load_lam(train_lam.run(config, folder))
    store = open_store(config.data)
    gap = model.spec.frame_gap
    clips = Clips(
        store,
        episodes=np.concatenate(_split(store, cell.seed, options)),
        frame_gap=gap,
        context=model.context,
    )
    latents = encode_rows(model, clips, clips.rows, "cpu")[0]
    return latents.flatten(1).detach().numpy(), clips.rows, store


def _train_bc(
    cell: Cell, path: Path, folder: Path, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, FrameStore]:
    data = TrainingDataConfig(path=str(path), resolution=options.resolution)
    config = train_policy.TrainPolicyConfig(
        data=data,
        policy=BcConfig(network=NETWORK),
        training=TrainingConfig(
            steps=options.steps, batch_size=options.batch_size, seed=cell.seed, lr=5e-4, eval_every=0
        ),
        held_out=options.held_out,
        split_seed=cell.seed,
        labeled_episodes=cell.k,
    )
    policy = Policy.from_pretrained(train_policy.run(config, folder))
    store = open_store(data)
    chosen = np.isin(store.episode, np.concatenate(_split(store, cell.seed, options)))
    chosen[store.starts + store.lengths - 1] = False
    rows = np.flatnonzero(chosen)
    samples = PolicySamples(
        store,
        target=np.zeros((len(store.episode), policy.spec.target.size), np.float32),
        exists=chosen,
        frames=NETWORK.n_obs_steps,
        chunk=NETWORK.chunk_size,
        stride=policy.spec.stride,
        words=policy.spec.words,
    )
    parts = [policy.actions(samples.batch(rows[i : i + 256]))[:, 0] for i in range(0, len(rows), 256)]
    actions = np.concatenate(parts)
    return (actions if actions.ndim > 1 else np.eye(policy.spec.target.size)[actions]), rows, store


def _scores(
    features: np.ndarray, rows: np.ndarray, store: FrameStore, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    labeled, held_out = _split(store, seed, options)
    episode = store.episode[rows]
    action = np.ma.getdata(store.actions(np.concatenate([labeled, held_out])))[rows]

    def data(targets: np.ndarray, episodes: np.ndarray) -> ProbeData:
        part = np.isin(episode, episodes)
        return ProbeData(features=features[part], targets=targets[part], episode=episode[part])

    def best(targets: np.ndarray) -> float:
        order = np.random.default_rng(seed).permutation(held_out)
        halves = [data(targets, part) for part in np.array_split(order, 2)]
        return max(probe(*halves, seed=seed).score for probe in (linear_probe, mlp_probe))

    found: dict[str, Any] = {
        "probe": best(action),
        "k_labels": linear_probe(data(action, labeled), data(action, held_out), seed=seed).score,
        "motion": None,
        "nuisance": None,
    }
    after = np.minimum(rows + 1, len(store.episode) - 1)
    if store.state is not None:
        found["motion"] = best((store.state[after] - store.state[rows]).astype(np.float64))
    nuisance = store.column(NUISANCE)
    if nuisance is not None:
        found["nuisance"] = best((nuisance[after] - nuisance[rows]).astype(np.float64))
    return found


def page(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the table and who wins as Markdown."""
    command = "python benchmarks/lam_table.py"
    lines = [
        "# Latent action models with and without distractors",
        "",
        f"Produced by `{command}`: {options.env}, {options.episodes} episodes, {options.steps} training "
        f"steps with batch size {options.batch_size} per model, k = {options.k} labeled episodes; distractors"
        f" `{options.distract}`. Mean over seeds (minimum to maximum); a complete table has {options.seeds} "
        f"seeds per row, and the column shows how many are included.",
        "",
        "**Probe**: R2 of actions predicted from latents by probes fitted on half of the held-out episodes. "
        "**Motion**: the same for the change of the robot's state in the step, which a position does not "
        "determine. **k labels**: R2 on held-out episodes of a linear decoder fitted on the k labeled "
        "episodes only. **Nuisance**: R2 of the motion of background and camera predicted from latents; "
        "lower is better. BC-k and IDM-k are scored in the same way, on the actions that they predict.",
        "",
        "PushT's actions are positions: a high probe score needs no motion, so compare both columns. All "
        "models get the same few steps, which are too few for models without labels: the table compares "
        "models, and does not show the best result of each. LAQ and villa-X predict the whole next frame, "
        "without a shortcut from the current one; scores near 0 in both columns mean that they do not use "
        "their latents yet.",
        "",
        "| data | model | labels | seeds | probe | motion | k labels | nuisance |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["model"], row["k"]), []).append(row)
    for (data, model, k), found in sorted(groups.items()):
        cells = " | ".join(_cell([row[column] for row in found]) for column in COLUMNS)
        lines.append(f"| {data} | {NAMES.get(model, model)} | {k} | {len(found)} | {cells} |")
    return "\n".join([*lines, "", *_winners(groups), ""])


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{np.mean(known):.2f} ({min(known):.2f} to {max(known):.2f})"


def _winners(groups: dict[tuple[str, str, int], list[dict[str, Any]]]) -> list[str]:
    """Return a sentence per dataset: the best method with k labels."""
    sentences = []
    for data in sorted({key[0] for key in groups}):
        scores = {
            key: float(np.mean([row["k_labels"] for row in rows]))
            for key, rows in groups.items()
            if key[0] == data
        }
        latent = {key: score for key, score in scores.items() if key[1] not in NAMES}
        plain = {key: score for key, score in scores.items() if key[1] in NAMES}
        if not latent or not plain:
            continue
        best, rival = max(latent, key=lambda key: latent[key]), max(plain, key=lambda key: plain[key])
        name = f"{best[1]} ({'with' if best[2] else 'without'} labels in training, {latent[best]:.2f})"
        other = f"{NAMES[rival[1]]} ({plain[rival]:.2f})"
        first, second = (name, other) if latent[best] > plain[rival] else (other, name)
        sentences.append(f"- **{data}**: with k labels {first} beats {second}.")
    return sentences


if __name__ == "__main__":
    main()
