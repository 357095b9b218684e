"""The plot of a comparison as one small SVG: methods with interval bars, over k if there are several.

Colors are CSS variables with a light fallback: the SVG works as a separate file and follows the report's dark
mode.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentact.evaluation.policy.comparison import Row, aggregate, verdict
from latentact.io.atomic import atomic_write, write_json

if TYPE_CHECKING:
    from latentact.evaluation.policy.comparison import Result

WIDTH = 470
COLORS = {
    "latent": "#0d8a72",
    "latent_joint": "#8b5cf6",
    "bc_k": "#d9730d",
    "idm_k": "#2f7fd8",
    "vla": "#c2407a",
    "vla_scratch": "#a6801a",
    "oracle": "#8a8f98",
    "vla_oracle": "#8a8f98",
}
INK, SOFT, LINE, CARD = "var(--ink,#22262e)", "var(--soft,#666d78)", "var(--line,#e3e5ea)", "var(--card,#fff)"
FONT = "font-family:ui-sans-serif,system-ui,-apple-system,'Segoe UI',sans-serif;font-size:14px"


Length = int | float  # pixels


def color(method: str) -> str:
    """Return the color of a method and its variants."""
    base = max((name for name in COLORS if method.startswith(name)), key=len, default="oracle")
    return COLORS[base]


def comparison_svg(results: Sequence[Result], *, title: str) -> str:
    """Draw score against k per method with 95 % interval bars, the oracle dashed; text is escaped."""
    limited = [r for r in results if r.k is not None]
    oracle = next((r for r in results if r.method == "oracle"), None)
    ks = sorted({r.k for r in limited if r.k is not None})
    if len(ks) > 1:
        plain = [r for r in limited if not r.method.endswith("_decoder_only")]
        body, height = _over_k(plain, oracle, ks)
    else:
        body, height = _one_k(results, oracle)
    measure = "return" if any(r.success is None for r in results) else "success"
    description = "; ".join(
        f"{r.label}{f', k = {r.k}' if r.k is not None else ''}: {r.score:.2f}" for r in results
    )
    name = f"{measure.capitalize()} of every method on {title}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" style="{FONT}">'
        f"<title>{escape(name)}</title><desc>{escape(description)}</desc>"
        f'<rect width="{WIDTH}" height="{height}" fill="{CARD}"/>{body}</svg>'
    )


def _scale(
    results: Sequence[Result], start: Length, end: Length
) -> tuple[Callable[[Length], float], list[float]]:
    """Return a function from score to pixels, and ticks: 0..1 for success, round numbers for returns."""
    if all(r.success is not None for r in results):
        low, high, step = 0.0, 1.0, 0.25
    else:
        low, high = min(r.interval[0] for r in results), max(r.interval[1] for r in results)
        step = 10.0 ** math.floor(math.log10(max(high - low, 1e-6)))
        step = step / 2 if (high - low) / step < 2 else step * 2 if (high - low) / step > 5 else step
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
    span = max(high - low, 1e-9)
    return lambda value: start + (end - start) * (value - low) / span, ticks


def _text(x: Length, y: Length, text: str, *, anchor: str = "start", fill: str = INK) -> str:
    style = f'text-anchor="{anchor}" fill="{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _line(x1: Length, y1: Length, x2: Length, y2: Length, stroke: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" {more}/>'


def _dot(x: Length, y: Length, radius: Length, fill: str, more: str = "") -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" {more}/>'


def _one_k(results: Sequence[Result], oracle: Result | None) -> tuple[str, int]:
    """Draw one line per method: name and score above, interval below; hollow dots: before fine-tuning."""
    place, ticks = _scale(results, 16, WIDTH - 16)
    row, top = 52, 12
    bottom = top + row * len(results)
    parts = [_line(place(t), top, place(t), bottom, LINE) for t in ticks]
    for tick in ticks:
        anchor = "start" if tick == ticks[0] else "end" if tick == ticks[-1] else "middle"
        parts.append(_text(place(tick), bottom + 20, f"{tick:g}", anchor=anchor, fill=SOFT))
    if oracle is not None:
        x = place(oracle.score)
        parts.append(_line(x, top, x, bottom, color("oracle"), 'stroke-dasharray="4 4" stroke-width="1.5"'))
    for i, result in enumerate(results):
        y, paint = top + row * i, color(result.method)
        low, high = (place(value) for value in result.interval)
        number = f"{result.score:.2f} ({result.interval[0]:.2f} to {result.interval[1]:.2f})"
        halo = f'fill="{INK}" style="paint-order:stroke;stroke:{CARD};stroke-width:5px"'
        name = f'<tspan font-weight="600">{escape(result.label)}</tspan>'
        parts.append(
            f'<text x="16" y="{y + 18}" {halo}>{name}<tspan dx="10" fill="{SOFT}">{number}</tspan></text>'
        )
        parts.append(
            _line(low, y + 36, high, y + 36, paint, 'stroke-width="8" stroke-linecap="round" opacity=".3"')
        )
        if result.seeds > 1:
            parts += [_dot(place(score), y + 36, 2.5, paint, 'opacity=".75"') for score in result.per_seed]
        hollow = result.method.endswith("_decoder_only")
        ring = f'stroke="{paint}" stroke-width="2.5"'
        parts.append(_dot(place(result.score), y + 36, 6, CARD if hollow else paint, ring))
    return "".join(parts), bottom + 32


def _over_k(results: Sequence[Result], oracle: Result | None, ks: Sequence[int]) -> tuple[str, int]:
    """Draw one line per method over k, offset at every k so that no interval hides another."""
    methods = list(dict.fromkeys(r.method for r in results))
    legend = 24 * math.ceil((len(methods) + (oracle is not None)) / 2)
    top, bottom, left, right = legend + 24, legend + 284, 44, WIDTH - 16
    place, ticks = _scale([*results, *([oracle] if oracle else [])], bottom, top)
    slot = (right - left) / len(ks)
    parts = [_line(left, place(t), right, place(t), LINE) for t in ticks]
    parts += [_text(left - 8, place(t) + 5, f"{t:g}", anchor="end", fill=SOFT) for t in ticks]
    parts += [
        _text(left + slot * (i + 0.5), bottom + 22, f"k = {k}", anchor="middle") for i, k in enumerate(ks)
    ]
    parts.append(_text((left + right) / 2, bottom + 44, "labeled episodes", anchor="middle", fill=SOFT))
    names = [(method, next(r.label for r in results if r.method == method)) for method in methods]
    if oracle is not None:
        names.append(("oracle", oracle.label))
        y = place(oracle.score)
        parts.append(_line(left, y, right, y, color("oracle"), 'stroke-dasharray="4 4" stroke-width="2"'))
    for i, (method, name) in enumerate(names):
        x, y = 16 + (i % 2) * WIDTH / 2, 20 + 24 * (i // 2)
        parts += [_dot(x + 6, y - 5, 6, color(method)), _text(x + 20, y, name)]
    for i, method in enumerate(methods):
        shift = (i - (len(methods) - 1) / 2) * min(18, slot / (len(methods) + 1))
        points = [
            (left + slot * (ks.index(r.k) + 0.5) + shift, r) for r in results if r.method == method and r.k
        ]
        path = " ".join(f"{x:.1f},{place(r.score):.1f}" for x, r in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color(method)}" stroke-width="2" opacity=".5"/>'
        )
        for x, r in points:
            low, high = (place(value) for value in r.interval)
            parts.append(
                _line(x, low, x, high, color(method), 'stroke-width="6" stroke-linecap="round" opacity=".3"')
            )
            parts.append(_dot(x, place(r.score), 5, color(method)))
    return "".join(parts), bottom + 58


COLUMNS = (
    *("env", "distract", "method", "k", "seed", "episodes", "success", "success_low", "success_high"),
    *("return", "return_low", "return_high", "decoder_only_success", "decoder_only_return", "updates"),
)


_DRAWN = " Discrete actions were sampled (temperature {:g})."


def write_comparison(
    folder: Path, env: str, rows: Sequence[Row], distract: str = "", temperature: float | None = None
) -> dict[str, Any]:
    """Write `comparison.json`, `.csv` and `.svg` into `folder` and return the content of the first.

    Args:
        folder: run folder.
        env: environment.
        rows: rollouts of all methods.
        distract: distractors in the frames.
        temperature: temperature at which discrete actions were sampled; None: greedy actions.
    """
    content = {
        "env": env,
        "distract": distract,
        "rows": [row.to_json() for row in rows],
        "temperature": temperature,
        "verdict": verdict(rows) + ("" if temperature is None else _DRAWN.format(temperature)),
    }
    with atomic_write(folder / "comparison.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({"env": env, "distract": distract} | _csv_row(row) for row in rows)
    with atomic_write(folder / "comparison.svg") as partial:
        title = f"{env}, {distract}" if distract else env
        partial.write_text(comparison_svg(aggregate(rows), title=title))
    write_json(folder / "comparison.json", content)
    return content


def _csv_row(row: Row) -> dict[str, Any]:
    plain = row.decoder_only or {}
    low, high = row.ci95 or (None, None)
    values = (
        *(row.method, row.k, row.seed, row.episodes, row.success, low, high),
        *(row.mean_return, *row.return_ci95, plain.get("success"), plain.get("return"), row.updates),
    )
    return dict(zip(COLUMNS[2:], values, strict=True))
