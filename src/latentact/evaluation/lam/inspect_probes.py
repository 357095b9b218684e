"""Probes of an inspection: information about actions, states and nuisances in latents, with floors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.data.store import known_rows
from latentact.evaluation.lam import diagnostics
from latentact.evaluation.lam.metrics import FEWEST_PROBED, bootstrap_groups, halves_of, present_features
from latentact.evaluation.lam.probes import ProbeData, ProbeScore, linear_probe, mlp_probe

if TYPE_CHECKING:
    from jaxtyping import Float

    from latentact.evaluation.lam.inspect_model import Case

NUISANCE = "observation.nuisance"
"""Column with the state of the distractors, if recorded."""


class Probed:
    """Probes of one set of latents, all fitted on the same episodes and scored on the same others."""

    def __init__(
        self,
        case: Case,
        latents: Float[np.ndarray, "n f"],
        wrong: Float[np.ndarray, "n f"],
        found: dict[str, Any],
    ) -> None:
        store, rows = case.store, case.rows
        self.case, self.latents, self.wrong = case, latents, wrong
        self.probes: dict[str, Any] = dict(found)
        self.curve: dict[int, ProbeScore] = {}
        episode = store.episode[rows]
        self.fit, self.score = halves_of(episode, rows, case.gap, case.model.context, case.seed)
        self.enough = min(self.fit.sum(), self.score.sum()) >= FEWEST_PROBED
        if not self.enough:
            self.case.missing.append("Too few held-out transitions for probes; hold out more episodes.")
            return
        self.group = bootstrap_groups(episode, self.score)
        self.floor = present_features(store, rows, self.fit)
        if store.action_space is None:
            self.case.missing.append(
                "The data has no actions: no action probes, label-efficiency curve or lag curve, so the "
                "verdict rests on the label-free part."
            )
        elif found:
            self._with_present()
        else:
            self.case.missing.append(
                "All actions of the held-out episodes are the same, so actions are not evaluated."
            )
        self._state()
        self._nuisance()

    def _pair(
        self, features: np.ndarray, targets: np.ndarray, among: np.ndarray | None = None
    ) -> tuple[ProbeData, ProbeData]:
        fit, score = (p if among is None else p & among for p in (self.fit, self.score))
        return (
            ProbeData(features=features[fit], targets=targets[fit], episode=self.group[fit]),
            ProbeData(features=features[score], targets=targets[score], episode=self.group[score]),
        )

    def _both(self, name: str, features: np.ndarray, targets: np.ndarray, among: np.ndarray) -> None:
        pair = self._pair(features, targets, among)
        self.probes[f"{name}_linear"] = linear_probe(*pair, seed=self.case.seed).to_json()
        self.probes[f"{name}_mlp"] = mlp_probe(*pair, seed=self.case.seed).to_json()

    def _actions(self, lag: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the action `lag` rows after each transition's start, and whether its episode is the same."""
        store, rows = self.case.store, self.case.rows
        actions = store.actions(self.case.episodes)
        first = store.starts[store.episode[rows]]
        last = first + store.lengths[store.episode[rows]] - 2  # the final frame's action is never taken
        inside = (rows + lag >= first) & (rows + lag <= last)
        at = np.clip(rows + lag, first, np.maximum(first, last))
        known, taken = known_rows(actions[at]), np.ma.getdata(actions[at])
        if taken.ndim > 1 and store.state is not None:
            taken = diagnostics.without_state(taken, store.state[at], self.fit & known)
        return taken, inside & known

    def _with_present(self) -> None:
        """Return probes of latents with the current state, both of which actions that are positions need."""
        actions = self.case.store.actions(self.case.episodes)[self.case.rows]
        both = np.concatenate([self.latents, self.floor], axis=1)
        self._both("latent_and_present", both, np.ma.getdata(actions), known_rows(actions))

    def _state(self) -> None:
        store, rows, seed = self.case.store, self.case.rows, self.case.seed
        if store.state is None:
            self.case.missing.append("The data has no state, so state changes are not evaluated.")
            return
        change = store.state[rows + self.case.gap] - store.state[rows]
        sets = {
            "state": (self.latents, store.state[rows]),
            "state_change": (self.latents, change),
            "state_change_state_only": (self.floor, change),
            "state_change_shuffled_future": (self.wrong, change),
        }
        for name, (features, targets) in sets.items():
            self.probes[name] = linear_probe(*self._pair(features, targets), seed=seed).to_json()

    def _nuisance(self) -> None:
        """Return probes of the distractors' motion from latents, and from the action as a control."""
        column = self.case.store.column(NUISANCE)
        if column is None:
            self.case.missing.append(
                f"The data records no distractor ({NUISANCE}), so nuisances are not evaluated."
            )
            return
        column = column.reshape(len(column), -1).astype(np.float32)
        change = column[self.case.rows + self.case.gap] - column[self.case.rows]
        everywhere = np.ones(len(change), bool)
        self._both("nuisance", self.latents, change, everywhere)
        if self.case.store.action_space is not None:
            taken, known = self._actions()
            actions = np.eye(self.case.store.action_space.size)[taken] if taken.ndim == 1 else taken
            pair = self._pair(np.where(known[:, None], actions, 0.0), change, known)
            self.probes["nuisance_from_action"] = linear_probe(*pair, seed=self.case.seed).to_json()

    def label_efficiency(self) -> list[dict[str, Any]]:
        """Return the curve over k labeled episodes; empty without actions."""
        if not self.enough or "latent_linear" not in self.probes:
            return []
        taken, known = self._actions()
        return diagnostics.label_efficiency(
            *self._pair(self.latents, taken, known), *self._pair(self.floor, taken, known), self.case.seed
        )

    def lags(self) -> list[dict[str, Any]]:
        """Return the lag curve; empty without actions."""
        if not self.enough or "latent_linear" not in self.probes:
            return []
        span = range(-2, self.case.gap + 2)
        found = {lag: self._actions(lag) for lag in span}
        among = np.all([inside for _, inside in found.values()], axis=0)
        fit, score = self.fit & among, self.score & among
        if min(fit.sum(), score.sum()) < FEWEST_PROBED:
            return []
        self.curve = diagnostics.lag_curve(
            *(self.latents, {lag: taken for lag, (taken, _) in found.items()}),
            *(fit, score, self.group, self.case.seed),
        )
        return [{"lag": lag, **probe.to_json()} for lag, probe in self.curve.items()]

    def misaligned(self) -> int | None:
        """Return the lag at which actions fit best, if clearly not 0, else None; requires `lags`."""
        return diagnostics.misaligned(self.curve, self.case.gap) if self.curve else None
