"""The page Label: which episodes to label, and the robot actions that a person gives or accepts.

Labels are kept in one file in the output folder, by the content of each episode, and written into a copy of
the dataset, with the plan by which `ground` finds the labeled episodes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32

from latentact.agents.agent import STATE
from latentact.agents.grounded import DecoderAgent
from latentact.agents.load import load_agent
from latentact.data.lerobot.relabeled import SIDECAR, write_relabeled
from latentact.data.lerobot.source import lerobot_version
from latentact.data.lerobot.writer import require_lerobot
from latentact.data.plan import plan_entry
from latentact.data.splits import split_episodes
from latentact.data.store import FrameStore
from latentact.data.windows import Clips
from latentact.errors import UserError
from latentact.evaluation.lam.metrics import encode_rows
from latentact.evaluation.lam.selection import METHODS, Candidates, Coverage, means_of, standardized
from latentact.io.atomic import write_json
from latentact.io.records import Record, read_record
from latentact.policies.contract import Policy
from latentact.studio.images import sheet
from latentact.studio.look import rows_of
from latentact.studio.meaning import Survey
from latentact.studio.workspace import BATCH, LONGEST, Take, Work, WorkProgress, Workspace
from latentact.training.action_head import policy_features
from latentact.types import ActionSpace

FILE = "labels.json"
COPY = "labeled"
PLAN = "plan.json"
HELD_OUT = 0.1
"""Fraction of episodes that are never proposed: the default of all stages, with split_seed 0."""
MOST = 50_000
"""Transitions that are encoded for proposals; of more, evenly spaced ones."""
_SAVING, _WRITING = threading.Lock(), threading.Lock()


class SavedEpisode(Record):
    """Labels of one episode."""

    name: str
    actions: list[int | list[float] | None]
    """Class or values of each step; null without a label."""


class SavedLabels(Record):
    """`labels.json`: digest of an episode's content -> its labels, in the order of labeling."""

    episodes: dict[str, SavedEpisode]


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What a label is."""

    space: ActionSpace
    names: tuple[str, ...]
    agent: DecoderAgent | None
    """Decoder of a grounded policy, for pseudo-labels."""

    def name(self, action: int) -> str:
        """Return the name of a class."""
        return self.names[action] if action < len(self.names) else str(action)

    def parse(self, typed: str) -> Any:
        """Return the action that a person typed or chose.

        Raises:
            UserError: the text is not an action of the data.
        """
        if self.space.discrete:
            known = [self.name(action) for action in range(self.space.size)]
            if typed not in known:
                raise UserError(f"the action must be one of {', '.join(known)}, got {typed!r}. Choose one.")
            return known.index(typed)
        try:
            values = [float(each) for each in typed.replace(",", " ").split()]
        except ValueError:
            values = []
        if len(values) != self.space.size or not np.isfinite(values).all():
            example = ", ".join(["0.5"] * self.space.size)
            raise UserError(
                f"the action must be {self.space.size} numbers, such as {example}, got {typed!r}. Change it."
            )
        return values


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelDraft:
    """An episode and its labels so far."""

    take: Take
    values: Float32[np.ndarray, "n a"]
    """Labels of its steps; a class is one number."""
    given: Bool[np.ndarray, " n"]
    """Steps with a label."""
    pseudo: Float32[np.ndarray, "n a"] | None
    """Actions of the decoder; None without one."""

    def __len__(self) -> int:
        """Return the number of steps; the last action of an episode is not executed."""
        return len(self.given)

    def set(self, steps: range, values: Any) -> LabelDraft:
        """Return the draft with a label at these steps; None: without.

        Raises:
            UserError: there are no such steps.
        """
        if not 0 <= steps.start < steps.stop <= len(self):
            raise UserError(
                f"the first step and the end must be between 0 and {len(self)}, first before end, got "
                f"{steps.start} and {steps.stop}. Change them."
            )
        part = slice(steps.start, steps.stop)
        made = replace(self, values=self.values.copy(), given=self.given.copy())
        made.given[part] = values is not None
        if values is not None:
            made.values[part] = np.reshape(values, (-1, self.values.shape[1]))
        return made

    def accept(self, steps: range) -> LabelDraft:
        """Return the draft with the decoder's actions at these steps.

        Raises:
            UserError: there is no decoder.
        """
        if self.pseudo is None:
            raise UserError(
                "pseudo-labels need a policy that is grounded on the actions of the data, got none. Give one "
                "as --policy, or set the actions yourself."
            )
        return self.set(steps, self.pseudo[steps.start : steps.stop])


def actions_of(work: Workspace) -> Actions:
    """Return what the labels of the data are: its own actions, or those of a grounded policy.

    Raises:
        UserError: neither is there.
    """
    store = require_data(work)
    agent = load_agent(work.policy, work.lam.device, guided=True) if work.policy else None
    decoder = agent if isinstance(agent, DecoderAgent) else None
    space = store.action_space or (agent.spec.action_space if agent else None)
    if space is None:
        raise UserError(
            "labeling needs to know the robot's actions, which neither the data nor a policy has. Give "
            "--policy, or data with an action column."
        )
    if decoder is not None and decoder.spec.action_space != space:
        decoder = None
    return Actions(space=space, names=store.action_names, agent=decoder)


def require_data(work: Workspace) -> FrameStore:
    """Return the data.

    Raises:
        UserError: there is none.
    """
    if work.store is None:
        raise UserError("this page needs data, got none. Give --data.")
    return work.store


def saved_file(work: Workspace) -> Path:
    """Return the file of the labels."""
    return work.out / FILE


def read_saved(work: Workspace) -> dict[str, SavedEpisode]:
    """Return the saved labels, by the content of the episode.

    Raises:
        UserError: the file is damaged.
    """
    file = saved_file(work)
    return read_record(SavedLabels, file).episodes if file.exists() else {}


def draft(work: Workspace, actions: Actions, number: int) -> LabelDraft:
    """Return an episode with its saved labels and the decoder's actions.

    Raises:
        UserError: there is no such episode, or a saved label does not fit.
    """
    take, store = work.episode(number), require_data(work)
    steps, width = len(take.frames) - 1, 1 if actions.space.discrete else actions.space.size
    values, given = np.zeros((steps, width), np.float32), np.zeros(steps, bool)
    if saved := read_saved(work).get(store.episode_contents[number]):
        _check_saved(work, actions, saved, number)
        given = np.array([each is not None for each in saved.actions])
        values[given] = [np.reshape(each, -1) for each in saved.actions if each is not None]
    return LabelDraft(take=take, values=values, given=given, pseudo=_pseudo(work, actions, take, steps))


def _check_saved(work: Workspace, actions: Actions, saved: SavedEpisode, number: int) -> None:
    """Raise a UserError unless saved labels are actions for the steps of an episode."""
    space, steps = actions.space, min(int(require_data(work).lengths[number]), LONGEST) - 1
    known = [each for each in saved.actions if each is not None]
    if space.discrete:
        fits = all(isinstance(each, int) and 0 <= each < space.size for each in known)
    else:
        fits = all(isinstance(each, list) and len(each) == space.size for each in known)
    if len(saved.actions) != steps or not fits:
        raise UserError(
            f"{saved_file(work)} must have actions ({space}) for the {steps} steps of {saved.name}, got "
            "others. Delete the file, or choose another --out."
        )


def _pseudo(work: Workspace, actions: Actions, take: Take, steps: int) -> Float32[np.ndarray, "n a"] | None:
    """Return the decoder's action of each step; the last latent action gives those of the last gap."""
    if actions.agent is None:
        return None
    latents, needs = take.guide, actions.agent.spec
    assert needs.latent is not None
    found: dict[str, Any] = {"vectors": latents.vectors, "continuous": latents.continuous}
    found["codes"] = latents.codes
    inputs = np.array(found[needs.latent.kind]).reshape(len(latents), 1, -1)
    observation = {} if take.states is None else {STATE: take.states[: len(latents)].astype(np.float32)}
    actions.agent.reset(len(latents))
    ahead = [actions.agent.act(observation, inputs) for _ in range(needs.latent.stride)]
    rows = np.minimum(np.arange(steps), len(latents) - 1)
    later = np.minimum(np.arange(steps) - rows, len(ahead) - 1)
    taken = np.stack(ahead)[later, rows]
    if actions.space.values:
        taken = np.searchsorted(actions.space.values, taken)
    return taken.reshape(steps, -1).astype(np.float32)


def save(work: Workspace, drawn: LabelDraft) -> str:
    """Save the labels of an episode beside those of others, or remove it without any; return what was saved.

    Raises:
        UserError: the file of the others is damaged.
    """
    store, number = require_data(work), drawn.take.episode
    assert number is not None
    discrete = drawn.values.shape[1] == 1 and actions_of(work).space.discrete
    values = [int(row[0]) if discrete else row.tolist() for row in drawn.values]
    kept = [value if given else None for value, given in zip(values, drawn.given, strict=True)]
    entry = SavedEpisode(name=drawn.take.name, actions=kept)
    with _SAVING:  # of several users
        episodes = {**read_saved(work), store.episode_contents[number]: entry}
        if not drawn.given.any():
            del episodes[store.episode_contents[number]]
        write_json(saved_file(work), {"episodes": {key: vars(each) for key, each in episodes.items()}})
    return f"{int(drawn.given.sum())} of {len(drawn)} steps of {drawn.take.name}"


def write_copy(work: Workspace) -> str:
    """Write the dataset with all saved labels, and the plan of its labeled episodes; return what was written.

    Raises:
        UserError: nothing is saved, the data is no LeRobot v3 dataset with actions, saved labels do not fit,
            or the folder holds something else.
    """
    require_lerobot()
    store, actions = require_data(work), actions_of(work)
    root, out = Path(store.path), work.out / COPY
    version = lerobot_version(root) if (root / "meta/info.json").is_file() else ""
    if not version.startswith("v3") or store.action_space is None:
        raise UserError(
            f"the data must be a LeRobot v3 dataset with actions for a copy with labels, got {root}. The "
            f"labels are in {saved_file(work)}."
        )
    if out.exists() and not (out / "meta" / SIDECAR).is_file():
        raise UserError(f"{out} must be new or an earlier copy, got something else. Choose another --out.")
    known = dict(zip(store.episode_contents, range(store.num_episodes), strict=True))
    train, _ = split_episodes(store, held_out=HELD_OUT, seed=0)
    labels: dict[int, Any] = {}
    chosen, held_out = [], 0
    for content, saved in read_saved(work).items():
        if (number := known.get(content)) is None:
            continue
        _check_saved(work, actions, saved, number)
        start = int(store.starts[number])
        labels |= {start + i: each for i, each in enumerate(saved.actions) if each is not None}
        if number in train:
            chosen.append(number)
        else:
            held_out += 1
    if not labels:
        raise UserError("there are no saved labels of this data. Save an episode first.")
    with _WRITING:
        write_relabeled(root, store, labels, out, {"data": str(root), "digest": store.digest})
        write_json(out / PLAN, {"episodes": [plan_entry(store, number) for number in chosen]})
    more = f"; {held_out} held-out episodes are not in the plan" if held_out else ""
    return f"{len(chosen) + held_out} episodes, {len(labels)} labels: {out}; their plan: {out / PLAN}{more}"


def page(drawn: LabelDraft, actions: Actions, found: Survey) -> dict[str, Any]:
    """Return the data of the widget."""
    rows = rows_of(drawn.take.guide, found)
    recorded = drawn.take.labels
    shown = [("label", drawn.values, drawn.given)]
    if drawn.pseudo is not None:
        shown.append(("pseudo-label", drawn.pseudo, np.ones(len(drawn), bool)))
    if recorded is not None and not np.ma.getmaskarray(recorded)[: len(drawn)].any():
        values = np.ma.getdata(recorded)[: len(drawn)].reshape(len(drawn), -1)
        shown.append(("recorded", values, np.ones(len(drawn), bool)))
    scale = max(float(np.abs(values).max()) for _, values, _ in shown) or 1.0
    tracks = [
        {"name": name if width == 1 else f"{name} {dim + 1}", **_track(actions, values[:, dim], given, scale)}
        for name, values, given in shown
        for width, dim in ((values.shape[1], dim) for dim in range(values.shape[1]))
    ]
    return rows | {
        "frames": sheet(drawn.take.frames),
        "fps": drawn.take.fps,
        "n": len(drawn),
        "tracks": tracks,
        "labeled": int(drawn.given.sum()),
    }


def _track(actions: Actions, values: np.ndarray, given: np.ndarray, scale: float) -> dict[str, Any]:
    """Return a row of the timeline: classes as colors with names, numbers as heat; -1 or null: no label."""
    if not actions.space.discrete:
        shades = np.round(values / scale, 3).tolist()
        return {
            "kind": "heat",
            "values": [v if g else None for v, g in zip(shades, given, strict=True)],
            "texts": [f"{v:.4g}" if g else "" for v, g in zip(values.tolist(), given, strict=True)],
        }
    classes = values.astype(int).tolist()
    return {
        "kind": "blocks",
        "values": [v if g else None for v, g in zip(classes, given, strict=True)],
        "texts": [actions.name(v) if g else "" for v, g in zip(classes, given, strict=True)],
    }


def candidates(work: Workspace, actions: Actions) -> Work[Candidates]:
    """Return the episodes as `latentact plan` chooses among them.

    They are compared by the features of a grounded policy, or else by their latent actions.
    """
    store, model = require_data(work), work.model
    gap, policy = work.gap(store.fps), None
    if actions.agent is not None:
        policy = Policy.from_pretrained(work.policy)
        policy = policy if policy.spec.resolution == store.frames.shape[1] else None
    clips = Clips(store, episodes=np.arange(store.num_episodes), frame_gap=gap, context=model.context)
    rows = clips.rows[np.unique(np.linspace(0, len(clips) - 1, min(len(clips), MOST)).astype(int))]
    found: list[np.ndarray] = []
    for i in range(0, len(rows), BATCH):
        part = rows[i : i + BATCH]
        with torch.inference_mode():
            values = (
                policy_features(policy, store, part)
                if policy
                else encode_rows(model, clips, part, work.lam.device)[0].flatten(1)
            )
        found.append(values.numpy())
        yield WorkProgress(what="comparing episodes", done=i + len(part), total=len(rows))
    train, _ = split_episodes(store, held_out=HELD_OUT, seed=0)
    values, episode = np.concatenate(found), store.episode[rows]
    points = means_of(values if policy else standardized(values), episode, store.num_episodes)
    steps = np.bincount(episode, minlength=store.num_episodes)
    return Candidates(
        coverage=Coverage.fit(points, train[steps[train] > 0]),
        points=points,
        steps=steps,
        train=train,
        labeled=np.zeros(0, np.int64),
    )


def proposals(work: Workspace, given: Candidates, budget: int, method: str) -> list[tuple[int, float]]:
    """Return the episodes to label next, and the coverage of latent actions with each.

    Raises:
        UserError: the method is unknown, or the budget larger than the number of episodes without labels.
    """
    store = require_data(work)
    if method not in METHODS:
        raise UserError(f"the method must be one of {', '.join(METHODS)}, got {method!r}. Choose one.")
    saved = read_saved(work)
    labeled = np.array([n for n, key in enumerate(store.episode_contents) if key in saved], np.int64)
    given = replace(given, labeled=labeled)
    if not 1 <= budget <= len(given.left):
        raise UserError(
            f"the budget must be between 1 and {len(given.left)}, the number of training episodes without "
            f"labels, got {budget}. Change it."
        )
    chosen = METHODS[method](given, budget)
    covered = [given.coverage.of(np.concatenate([labeled, chosen[: i + 1]])) for i in range(len(chosen))]
    return list(zip(chosen.tolist(), covered, strict=True))
