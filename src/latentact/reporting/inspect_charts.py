"""The charts of an inspection as plain Plotly figures; colors of text and lines come from the page."""

from __future__ import annotations

from typing import Any

import numpy as np

from latentact.evaluation.lam.probes import principal_components
from latentact.reporting.charts import MOST_DIMS, PALETTE

FLOOR = "#8d949e"


def labels(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the label-efficiency curve with a band per line."""
    ks, data = [row["k"] for row in curve], []
    for name, title, color in (("latent", "from latents", PALETTE[0]), ("floor", "from the present", FLOOR)):
        low, mean, high = ([_number(row[name][key]) for row in curve] for key in ("low", "score", "high"))
        band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        data.append({"type": "scatter", "x": ks, "y": low, **band})
        data.append({"type": "scatter", "x": ks, "y": high, "fill": "tonexty", **band})
        data[-1]["fillcolor"] = f"{color}22"
        data.append(_line(title, ks, mean, color))
    layout = {
        "xaxis": {"title": {"text": "labeled episodes"}, "type": "log", "tickvals": ks, "ticktext": ks},
        "yaxis": {"range": _range([row[n]["score"] for row in curve for n in ("latent", "floor")])},
    }
    return {"data": data, "layout": layout}


def lags(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the probe score by lag; the rows at which the action belongs are shaded."""
    x, y = [row["lag"] for row in curve], [_number(row["score"]) for row in curve]
    error = {
        "type": "data",
        "symmetric": False,
        "array": [_number(row["ci95"][1] - row["score"]) for row in curve],
        "arrayminus": [_number(row["score"] - row["ci95"][0]) for row in curve],
        "thickness": 1,
    }
    inside = {
        "type": "rect",
        "yref": "paper",
        "x0": -0.4,
        "x1": max(row["lag"] for row in curve) - 1.6,
        "y0": 0,
        "y1": 1,
    }
    shape = {**inside, "fillcolor": f"{PALETTE[0]}1c", "line": {"width": 0}}
    layout = {
        "xaxis": {"title": {"text": "rows after the transition's start"}, "tickvals": x},
        "yaxis": {"range": _range([end for row in curve for end in (row["score"], *row["ci95"])])},
        "shapes": [shape],
        "showlegend": False,
    }
    return {"data": [{**_line("probe", x, y, PALETTE[0]), "error_y": error}], "layout": layout}


def gaps(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Return probe score and share of moving pixels by frame gap."""
    x = [round(row["seconds"], 4) for row in curve]
    data = [_line("moving pixels", x, [_number(row["moving"]) for row in curve], FLOOR)]
    probed = [row for row in curve if "probe" in row]
    if probed:
        seconds = [round(row["seconds"], 4) for row in probed]
        scores = [_number(row["probe"]["score"]) for row in probed]
        data.insert(0, _line("action probe", seconds, scores, PALETTE[0]))
    span = _range([row["moving"] for row in curve] + [row["probe"]["score"] for row in probed])
    layout = {"xaxis": {"title": {"text": "frame gap (s)"}}, "yaxis": {"range": span}, "showlegend": True}
    return {"data": data, "layout": layout}


def control(delta: list[float]) -> dict[str, Any]:
    """Return delta PSNR by rollout step."""
    bars = {"type": "bar", "x": list(range(1, len(delta) + 1)), "y": [_number(value) for value in delta]}
    layout = {
        "xaxis": {"title": {"text": "step of the rollout"}, "dtick": 1},
        "yaxis": {"title": {"text": "dB"}},
        "bargap": 0.5,
        "showlegend": False,
    }
    return {"data": [{**bars, "marker": {"color": PALETTE[0]}}], "layout": layout}


def maps(arrays: dict[str, np.ndarray], names: list[str]) -> dict[str, dict[str, Any]]:
    """Return PCA and, if available, UMAP, each with a choice of colors: action, episode or time."""
    shown, vectors = arrays["shown"], arrays["vectors"]
    flat = principal_components(vectors, vectors, dims=2)
    flat = np.pad(flat, ((0, 0), (0, max(0, 2 - flat.shape[1]))))
    spread = np.square(vectors - vectors.mean(0)).sum()
    share = f"{np.square(flat).sum() / spread:.0%}" if spread > 0 else "none"
    places = {f"PCA: the first two components, {share} of the variance": flat[shown]}
    if "umap" in arrays:
        places["UMAP: neighbors stay neighbors, distances mean little"] = arrays["umap"]
    action, colors = arrays.get("action"), {}
    if action is not None and action.ndim == 1:
        colors["action"] = action[shown].astype(float)
    elif action is not None:
        for d in range(min(action.shape[1], MOST_DIMS)):
            colors[f"action {names[d] if d < len(names) else d}"] = action[shown, d]
    if len(np.unique(arrays["episode"][shown])) > 1:
        colors["episode"] = arrays["episode"][shown]
    colors["time in the episode (s)"] = arrays["time"][shown]
    labels = [
        f"episode {arrays['episode'][i]}, {arrays['time'][i]:.1f} s{_taken(action, int(i), names)}"
        for i in shown
    ]
    return {title: _scatter(points, labels, colors) for title, points in places.items()}


def _scatter(points: np.ndarray, labels: list[str], colors: dict[str, np.ndarray]) -> dict[str, Any]:
    marks = {
        "type": "scatter",
        "mode": "markers",
        "x": [_number(value) for value in points[:, 0]],
        "y": [_number(value) for value in points[:, 1]],
        "text": labels,
        "hoverinfo": "text",
        "marker": {"size": 7, "opacity": 0.7},
    }
    layout = {
        "xaxis": {"zeroline": False, "showticklabels": False},
        "yaxis": {"zeroline": False, "showticklabels": False},
        "hovermode": "closest",
        "showlegend": False,
    }
    values = {name: [_number(value) for value in column] for name, column in colors.items()}
    return {"data": [marks], "layout": layout, "colors": values}


def _taken(action: np.ndarray | None, row: int, names: list[str]) -> str:
    if action is None:
        return ""
    if action.ndim == 1:
        number = int(action[row])
        return f", {names[number] if 0 <= number < len(names) else f'action {number}'}"
    return ", action " + " ".join(f"{value:.2f}" for value in action[row][:MOST_DIMS])


def _line(name: str, x: list[Any], y: list[float | None], color: str) -> dict[str, Any]:
    style = {"mode": "lines+markers", "line": {"color": color, "width": 2}, "marker": {"size": 7}}
    return {"type": "scatter", "name": name, "x": x, "y": y, **style}


def _range(values: list[float]) -> list[float]:
    """Return an axis range that includes 0 and 1 and cuts off very bad scores."""
    return [max(min(*values, 0.0), -1.0) - 0.05, max(*values, 1.0) + 0.05]


def _number(value: float | np.number) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
