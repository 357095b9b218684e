"""Open a LAM in the browser: `latentact studio RUN_OR_LAM`, or write it as a page that works offline.

Saved guides, videos and labels are written to the output folder; nothing else is.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from latentact.agents.load import load_agent
from latentact.config import Between
from latentact.data.mixture import open_training_store
from latentact.data.store import FrameStore
from latentact.data.time_base import lam_frame_gap
from latentact.device import require_device
from latentact.errors import EXTRAS, UserError, missing_extra, require_between
from latentact.guidance.extractor import LatentActionExtractor
from latentact.studio.export import export
from latentact.studio.server import is_loopback, serve
from latentact.studio.workspace import (
    Workspace,
    find_env,
    find_lam,
    find_policy,
    matching_view,
    training_data,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StudioConfig:
    """Look at latent actions, edit guides, and drive a LAM, in the browser."""

    run: str
    """Folder of a run (`train-lam`, `compare`, `demo`), or folder, file or hub id of a LAM."""
    data: str = ""
    """Dataset, folder of videos, or one video; empty: the data of the LAM's training, if it is there."""
    policy: str = ""
    """Policy that follows guides, or a grounded one; empty: that of the run, if there is one."""
    env: str = ""
    """Environment for rollouts and driving; empty: that of the run, if there is one."""
    live: str = ""
    """Camera for the page Live: opencv:0, any TYPE:key=value,... of LeRobot, or a video file, which is played
    at its own rate; empty: none."""
    out: str = ""
    """Folder of saved guides, videos and labels; empty: `studio` in the folder of the run, or here without
    one."""
    export: str = ""
    """Folder for index.html, a page that works offline, instead of serving the studio."""
    camera: str = ""
    """Camera key of the data; empty: the only one."""
    host: str = "127.0.0.1"
    """Address to listen on; others than this machine's own need a token."""
    port: Annotated[int, Between(0, 65535)] = 7860
    """Port to listen on; 0: any free one."""
    token: str = ""
    """Secret that visitors must have, at least 8 letters and digits; empty: none."""
    device: str = "cpu"
    """cpu, cuda or mps."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        require_between("--port", self.port, 0, 65535)
        if self.token and not (len(self.token) >= 8 and self.token.isascii() and self.token.isalnum()):
            raise UserError("--token must be at least 8 letters and digits. Choose a long random one.")
        if not is_loopback(self.host) and not self.token:
            raise UserError(
                f"--token is required with --host {self.host}, which others can reach. Choose a long random "
                "one."
            )


def run(config: StudioConfig) -> dict[str, Any]:
    """Serve the studio until it is interrupted, or export it; return where it is.

    Raises:
        UserError: LAM, data, policy or environment cannot be read or do not match, or the address is taken.
    """
    require_device(config.device)
    for flag, path in (("--out", config.out), ("--export", config.export)):
        if path and Path(path).exists() and not Path(path).is_dir():
            raise UserError(f"{flag} must be a folder, got the file {path}. Choose another.")
    if not config.export and importlib.util.find_spec("gradio") is None:
        raise missing_extra("gradio", EXTRAS["gradio"])
    work = open_workspace(config)
    if config.export:
        page = export(work, Path(config.export))
        return {"path": page, "bytes": page.stat().st_size}
    found: list[str] = []

    def ready(address: str) -> None:
        found.append(address)
        log.info("The studio is at %s; stop it with Ctrl-C.", address)

    serve(work, config.host, config.port, config.token, ready)
    return {"path": work.out, "address": found[0]}


def open_workspace(config: StudioConfig) -> Workspace:
    """Load the LAM and open its data."""
    lam = find_lam(config.run)
    extractor = LatentActionExtractor(lam, 0, config.device)
    spec = extractor.model.spec
    extractor.model.requires_grad_(False)
    extractor.resolution = spec.resolution
    if extractor.model.config.integers:
        raise UserError(
            f"the LAM {lam} must have images as frames, got grids of integers. Use latentact inspect."
        )
    env, folder = config.env or find_env(config.run), Path(config.run)
    policy = config.policy or find_policy(config.run, lam)
    if policy:
        load_agent(policy, config.device, guided=True)  # a policy that does not fit fails here
    return Workspace(
        lam=extractor,
        name=config.run,
        store=_store(config, lam, extractor),
        policy=policy,
        env=env,
        view=matching_view(env, spec.camera) if env else "agent",
        out=Path(config.out or (folder / "studio" if folder.is_dir() else "studio")),
        live=config.live,
    )


def _store(config: StudioConfig, lam: str, extractor: LatentActionExtractor) -> FrameStore | None:
    """Open the data at the LAM's resolution; None if there is none."""
    data, where = training_data(config.run, lam, config.data)
    spec = extractor.model.spec
    if data is None:
        if where:
            log.warning("the data of the LAM's training, %s, is not there; give it with --data", where)
        return None
    camera = config.camera or data.camera
    store = open_training_store(replace(data, camera=camera, resolution=spec.resolution, resize=spec.resize))
    lam_frame_gap(spec, store.fps, store.path)
    if extractor.model.state_size and store.state is None:
        raise UserError(
            f"{where} must have observation.state, which the LAM {spec.model} uses, got none. Give other "
            "data."
        )
    return store
