"""The report's interactive charts as plain Plotly figures; colors of text and lines come from the page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from latentact.evaluation.lam.probes import principal_components

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped

    from latentact.reporting.run_data import Curves

PALETTE = (
    *("#0d8a72", "#d9730d", "#2f7fd8", "#8b5cf6", "#c2417c", "#7a8b1e", "#b4532a", "#1f9bb5"),
    *("#a37fd1", "#6b7280"),
)
MOST_POINTS = 1500  # points of the latent map: more would only overlap
MOST_STEPS = 300  # points of a learning curve
MOST_DIMS = 8  # action dimensions by which the map can be colored


def curve_panels(curves: Curves) -> dict[str, dict[str, Any]]:
    """Return one figure per metric; training and validation of a metric share a figure, as do all probes."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for name, points in curves.series.items():
        head, _, tail = name.partition("/")
        panel, trace = (tail, head) if tail and head in ("train", "val") else (head, tail or head)
        panels.setdefault(panel, {})[trace] = points
    order = {"loss": 0, "recon": 1, "probe": 2}
    names = sorted(panels, key=lambda panel: (order.get(panel, 3), panel))
    return {name: _curve_figure(panels[name]) for name in names}


def _curve_figure(traces: dict[str, tuple[list[float], list[float]]]) -> dict[str, Any]:
    data = []
    for color, (name, (steps, values)) in zip(_colors(len(traces)), sorted(traces.items()), strict=True):
        every = math.ceil(len(steps) / MOST_STEPS)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(steps) < 12 else "lines",
                "name": name,
                "x": steps[::every],
                "y": [float(f"{value:.5g}") for value in values[::every]],
                "line": {"color": color, "width": 2, "dash": "solid" if name != "val" else "dot"},
            }
        )
    values = [value for _, column in traces.values() for value in column]
    low, high = min(values), max(values)
    scale: dict[str, Any] = {"type": "log", "dtick": 1} if low > 0 and high > 20 * low else {}
    if low == high:
        scale = {"range": sorted((0.0, 2 * low or 1.0))}
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "step"}},
            "yaxis": scale,
            "showlegend": len(traces) > 1,
        },
    }


def latent_map(arrays: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
    """Return a scatter plot of two principal components, colored by action; `share`: explained variance."""
    vectors = arrays["vectors"]
    flat = principal_components(vectors, vectors, dims=2)
    share = float(np.square(flat).sum() / max(np.square(vectors - vectors.mean(0)).sum(), 1e-12))
    shown = np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), MOST_POINTS)).astype(int))
    x = flat[:, 0]
    y = flat[:, 1] if flat.shape[1] > 1 else np.zeros_like(x)
    action = arrays.get("action")
    labels = [
        f"episode {arrays['episode'][i]}, {arrays['time'][i]:.1f} s{_action_text(action, int(i), names)}"
        for i in shown
    ]
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "first component"}, "zeroline": False},
        "yaxis": {"title": {"text": "second component"}, "zeroline": False},
        "hovermode": "closest",
    }
    figure: dict[str, Any] = {"layout": layout, "share": share}
    if action is not None and action.ndim == 1:
        present = [int(c) for c in np.unique(action[shown]) if c >= 0]
        figure["data"] = [
            _points(
                x[part],
                y[part],
                [labels[j] for j in np.flatnonzero(action[shown] == c)],
                _name(names, c),
                color,
            )
            for color, c in zip(_colors(len(present)), present, strict=True)
            for part in [shown[action[shown] == c]]
        ]
        return figure
    colors = {"time in the episode (s)": arrays["time"][shown]}
    if action is not None:
        dims = {_name(names, d, "action "): action[shown, d] for d in range(min(action.shape[1], MOST_DIMS))}
        colors = {**dims, **colors}
    figure["data"] = [_points(x[shown], y[shown], labels, "", "")]
    figure["colors"] = {name: _rounded(values) for name, values in colors.items()}
    layout["showlegend"] = False
    return figure


def codebook_usage(codes: Int[np.ndarray, "m k"], size: int) -> dict[str, Any]:
    """Return a bar chart of code frequencies, the most frequent first."""
    counts = np.bincount(codes.reshape(-1), minlength=size)
    order = np.argsort(-counts, kind="stable")
    return {
        "data": [
            {
                "type": "bar",
                "x": list(range(size)),
                "y": (counts[order] / counts.sum()).round(5).tolist(),
                "hovertext": [f"code {code}: {counts[code]} times" for code in order],
                "hoverinfo": "text",
                "marker": {"color": PALETTE[0]},
            }
        ],
        "layout": {
            "xaxis": {
                "title": {"text": "codes, the most frequent first"},
                "showticklabels": False,
                "showgrid": False,
            },
            "yaxis": {"title": {"text": "share of tokens"}, "tickformat": ".0%"},
            "bargap": 0.15,
            "showlegend": False,
        },
    }


def _colors(count: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]


def _name(names: list[str], index: int, otherwise: str = "action ") -> str:
    return names[index] if index < len(names) else f"{otherwise}{index}"


def _action_text(action: Shaped[np.ndarray, "m *a"] | None, row: int, names: list[str]) -> str:
    if action is None:
        return ""
    if action.ndim == 1:
        return f", {_name(names, int(action[row]))}" if action[row] >= 0 else ""
    return ", action " + " ".join(f"{value:.2f}" for value in action[row][:MOST_DIMS])


def _rounded(values: np.ndarray) -> list[float | None]:
    return [round(float(value), 4) if np.isfinite(value) else None for value in values]


def _points(x: np.ndarray, y: np.ndarray, labels: list[str], name: str, color: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": _rounded(x),
        "y": _rounded(y),
        "text": labels,
        "hoverinfo": "text",
        "marker": {"size": 7, "opacity": 0.7, **({"color": color} if color else {})},
    }
