"""A LeRobot dataset of any version as a `Source`: tables, with videos beside them or pictures inside."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8

from latentact.data.decode.video import at_times, decode
from latentact.data.digest import Memo, blake2b, file_digest
from latentact.data.format import Episode, Unreadable
from latentact.data.lerobot.tables import Tables, action_space
from latentact.errors import UserError, missing_extra

logger = logging.getLogger(__name__)


class Recording(NamedTuple):
    """Where an episode's frames are."""

    episode: int
    """Its `episode_index`."""
    task: str
    video: str = ""
    """Video file relative to the dataset; empty where pictures are in the table."""
    start: float = 0.0
    """Seconds into the video at which it begins."""
    stop: float = np.inf
    """Seconds into the video at which it ends."""


def lerobot_version(path: Path) -> str:
    """Return the `codebase_version` of a LeRobot dataset; empty when `path` is none.

    Raises:
        UserError: `meta/info.json` is there and is not json.
    """
    file = path / "meta" / "info.json"
    if not file.is_file():
        return ""
    try:
        return str(json.loads(file.read_text()).get("codebase_version", ""))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is not json ({error}); copy the dataset again.") from error


def local_dataset(repo_id: str, root: str) -> Path:
    """Return the folder of a dataset, downloaded from the Hugging Face hub where it is not here yet.

    Args:
        repo_id: hub id; empty: `root` says it all.
        root: folder; empty: where lerobot keeps datasets ($HF_LEROBOT_HOME) and downloads.

    Raises:
        UserError: it is not here and cannot be downloaded.
    """
    if root and (Path(root).exists() or not repo_id):
        return Path(root)
    try:
        from lerobot.utils.constants import HF_LEROBOT_HOME, HF_LEROBOT_HUB_CACHE
    except ModuleNotFoundError as error:
        raise missing_extra("lerobot", "lerobot") from error
    if not root and (HF_LEROBOT_HOME / repo_id / "meta/info.json").is_file():
        return HF_LEROBOT_HOME / repo_id
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoSuchRevision

    where: dict[str, Any] = {"local_dir": root} if root else {"cache_dir": HF_LEROBOT_HUB_CACHE}
    try:
        try:
            folder = huggingface_hub.snapshot_download(repo_id, repo_type="dataset", revision="v3.0", **where)
        except NoSuchRevision:  # an older dataset
            folder = huggingface_hub.snapshot_download(repo_id, repo_type="dataset", **where)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{repo_id} is not in {HF_LEROBOT_HOME} and cannot be downloaded ({reason}); check the name and "
            f"the connection, or give --dataset-root."
        ) from error
    return Path(folder)


class LeRobotSource:
    """An opened LeRobot dataset.

    Args:
        path: its folder.
        camera: key of the camera.
        fps: frames per second.
        tables: its parquet files.
        recordings: its episodes, in order.
        memo: remembers digests of videos and pictures.
    """

    uneven = False
    resizable = True

    def __init__(
        self, path: Path, camera: str, fps: float, tables: Tables, recordings: Sequence[Recording], memo: Memo
    ) -> None:
        """Look at what is there."""
        self.camera, self.fps = camera, fps
        self._path = path
        self.tables = tables
        """Its parquet files."""
        self.action_space, self.action_names = action_space(tables)
        self.unreadable: dict[str, str] = {}
        present = [r for r in recordings if self._is_here(r)]
        if not present:
            raise UserError(
                f"{path} lists {len(recordings)} episodes and none of their files is there; copy them too."
            )
        if len(present) < len(recordings):
            logger.warning(
                "%s lists %d episodes, of which %d are there: those are used",
                path,
                len(recordings),
                len(present),
            )
        digests = tables.image_digests(camera, memo) if any(not r.video for r in present) else {}
        self.recordings = present
        """Where the frames of each of `episodes` are."""
        self.episodes = [self._describe(r, digests, memo) for r in present]
        self.first_rows = [tables.spans[r.episode].first_row for r in present]

    def frames(self, number: int) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
        """Yield (seconds, frame), one for each row of the episode's table."""
        recording = self.recordings[number]
        times = self.tables.timestamps(recording.episode)
        times = times - times[0]
        if not recording.video:
            yield from zip(times.tolist(), self.tables.images(self.camera, recording.episode), strict=True)
            return
        half = 0.5 / self.fps
        video = decode(self._path / recording.video, recording.start - half, recording.stop - half)
        shifted = ((seconds - recording.start, frame) for seconds, frame in video)
        count = 0
        for time, _, frame in at_times(shifted, times.tolist(), half):
            yield time, frame
            count += 1
        if count < len(times):
            raise Unreadable(f"its video has {count} of the {len(times)} frames of its table")

    def column(self, name: str) -> Shaped[np.ndarray, " rows *shape"] | None:
        """Return a numeric column of the tables, all rows."""
        return self.tables.column(name)

    def _is_here(self, recording: Recording) -> bool:
        there = recording.episode in self.tables.spans
        return there and (not recording.video or (self._path / recording.video).is_file())

    def _describe(self, recording: Recording, digests: dict[int, str], memo: Memo) -> Episode:
        times = self.tables.timestamps(recording.episode)
        if recording.video:
            frames = memo.get(self._path / recording.video, "file", file_digest)
            content = blake2b(
                frames.encode(), np.array([recording.start, recording.stop]).tobytes(), times.tobytes()
            )
        else:
            content = blake2b(digests[recording.episode].encode(), times.tobytes())
        span = self.tables.spans[recording.episode]
        return Episode(
            name=f"episode {recording.episode}",
            file=recording.video or self.tables.files[span.file].relative_to(self._path).as_posix(),
            task=recording.task,
            frames=len(times),
            content=content,
        )
