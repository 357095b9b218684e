"""The page Live: latent actions of a camera or a played demonstration, and a policy that follows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from latentact.envs.episode import run_episodes
from latentact.envs.spec import make_env
from latentact.errors import UserError
from latentact.guidance.capture import Capture, Frame, FrameSource, open_source
from latentact.guidance.inference import LatentGuidedInference
from latentact.guidance.live import STAGES, LiveInference, StreamingExtractor, blank_guide
from latentact.reporting.html import text
from latentact.studio.images import image
from latentact.studio.workspace import Take, Work, Workspace, in_thread

LONGEST_S = 600
"""Seconds after which the page stops by itself."""


class TakeSource:
    """A demonstration in memory, played at its own rate."""

    endless = False

    def __init__(self, take: Take) -> None:
        self.name, self.fps, self.captured, self._frames = take.name, take.fps, 0, take.frames

    def frames(self) -> Iterator[Frame]:
        """Yield each frame at its time; the first one at once."""
        start = time.monotonic()
        for number, pixels in enumerate(self._frames):
            time.sleep(max(0.0, start + number / self.fps - time.monotonic()))
            self.captured += 1
            yield Frame(number=number, time=time.monotonic(), pixels=pixels)

    def close(self) -> None:
        """Do nothing."""


def open_live(work: Workspace, take: Take | None, camera: bool) -> FrameSource:
    """Return the studio's camera, or the demonstration.

    Raises:
        UserError: there is none, or the camera cannot be used.
    """
    if camera:
        if not work.live:
            raise UserError("there is no camera. Start the studio with --live, for example opencv:0.")
        return open_source(work.live, work.lam)
    if take is None:
        raise UserError("there is no demonstration to play. Open one on the page Look.")
    work.lam.require_rate(take.fps, take.fps, take.name)
    return TakeSource(take)


type Pages = Generator[str, None, None]
"""The page's HTML, after every step."""


def live(work: Workspace, source: FrameSource, seed: int, seconds: float) -> Pages:
    """Stream latent actions and, with a policy and an environment, follow them.

    Args:
        work: the workspace.
        source: of the demonstration.
        seed: reset seed of the environment.
        seconds: seconds of the demonstration after which it ends.

    Raises:
        UserError: policy, LAM and environment do not match, or the camera is lost.
    """
    if not 0 < seconds <= LONGEST_S or not 0 <= seed < 2**31:
        raise UserError(
            f"seconds must be more than 0 and at most {LONGEST_S}, and the seed at least 0, got {seconds:g} "
            f"and {seed}. Change them."
        )
    with contextlib.closing(Capture(source, max(1, int(seconds * source.fps)))) as capture:
        if work.policy and work.env:
            yield from _follow(work, capture, seed)
        else:
            yield from _stream(work, capture)


def _stream(work: Workspace, capture: Capture) -> Pages:
    stream, shown = StreamingExtractor(work.lam, capture.source.fps), [""]

    def run(step: Callable[[], None]) -> None:
        delays: list[float] = []
        while (frames := capture.take(0.5)) is not None:
            for frame in frames:
                latent = stream.push(frame)
                if latent is not None:
                    delays.append(1000 * (latent.extracted - latent.captured))
                found = {"latency_ms": {STAGES[0]: _quantiles(delays)}} if delays else {}
                about = {"captured": capture.source.captured, "dropped": capture.dropped, **found}
                shown[0] = _page([("camera", stream.newest)], about)
                step()

    yield from _newest(in_thread("live", 0, run), shown)


def _quantiles(values: list[float]) -> dict[str, float]:
    p50, p95 = np.percentile(values, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "max": max(values)}


def _follow(work: Workspace, capture: Capture, seed: int) -> Pages:
    spec, shown = work.env_spec(), [""]
    blank = blank_guide(work.lam, capture.source.fps)
    inference = LatentGuidedInference(work.policy, blank, fps=float(spec.fps), device=work.lam.device)
    inference.agent.spec.check_env(spec, work.policy)
    actor = LiveInference(inference, work.lam, capture)

    class Newest:
        frame: np.ndarray | None = None

        def append(self, frame: np.ndarray, /) -> None:
            self.frame = frame

    def run(step: Callable[[], None]) -> None:
        newest, env = Newest(), make_env(work.env, view=work.view)

        def on_step() -> None:
            newest_frames = [("demonstration", actor.newest_frame), ("policy", newest.frame)]
            shown[0] = _page(newest_frames, actor.to_json()["live"])
            step()

        try:
            (episode,) = run_episodes(
                actor, [env], [seed], camera=spec.camera, frames=[newest], on_step=on_step
            )
        finally:
            env.close()
        if episode.error or actor.error:
            raise episode.error or actor.error  # type: ignore[misc]  # one of them is set

    yield from _newest(in_thread("live", 0, run), shown)


def _newest(work: Work[None], shown: list[str]) -> Pages:
    with contextlib.closing(work):
        for _ in work:
            yield shown[0]


def _page(frames: list[tuple[str, np.ndarray | None]], about: dict[str, Any]) -> str:
    figures = "".join(
        f"<figure>{image(frame, label).replace('<img', '<img class=st-frame')}"
        f"<figcaption>{text(label)}</figcaption></figure>"
        for label, frame in frames
        if frame is not None
    )
    rows = "".join(
        f'<tr><th scope="row">{text(stage.replace("_", " "))}</th>'
        + "".join(f"<td>{found[name]:.0f} ms</td>" for name in ("p50", "p95", "max"))
        + "</tr>"
        for stage in STAGES
        if (found := about.get("latency_ms", {}).get(stage))
    )
    counts = f"{about['captured']} frames captured, {about['dropped']} dropped"
    if "stale_steps" in about:
        counts += f", {about['stale_steps']} steps with a stale frame"
    head = (
        '<tr><th></th><th scope="col">median</th><th scope="col">95 %</th><th scope="col">maximum</th></tr>'
    )
    return (
        f'<div class="st-html"><div class="st-films st-large">{figures}</div>'
        f'<p class="st-facts">{counts}</p><table class="st-table">{head}{rows}</table></div>'
    )
