"""Write a copy of a LeRobot dataset with new labels: the actions that a person gave for some of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latentact.data.lerobot.columns import Column, add_columns
from latentact.data.lerobot.metadata import read_info
from latentact.data.lerobot.tables import Tables
from latentact.data.store import FrameStore
from latentact.io.atomic import atomic_dir, read_json, write_json

SIDECAR = "relabel.json"


def write_relabeled(
    root: Path,
    store: FrameStore,
    labels: Mapping[int, Any],
    out: Path,
    about: Mapping[str, Any],
) -> int:
    """Write the dataset with the labels; return how many differ from the executed action.

    `action` is the label where there is one, `executed_action` the recorded action, and `labeled` marks the
    rows with a label. Rows that the store lacks, such as those of unreadable episodes, stay as they are.

    Args:
        root: folder of a dataset with actions; videos are hard-linked.
        store: the data.
        labels: row of the store -> class index or values.
        out: folder of the new dataset.
        about: further entries of the sidecar `meta/relabel.json`.
    """
    tables = Tables(root, read_info(root).features, sorted((root / "data").glob("*/*.parquet")))
    feature = read_json(root / "meta/info.json")["features"]["action"]

    def values(name: str) -> np.ndarray | None:
        found = tables.column(name)
        return None if found is None else found.reshape(len(found), -1)

    def column(table: np.ndarray, dtype: str, names: Any) -> Column:
        table = table.astype(dtype)
        return Column(dtype=dtype, size=table.shape[1], read=lambda a, b: table[a:b], names=names)

    action, executed, labeled = values("action"), values("executed_action"), values("labeled")
    assert action is not None
    assert store.action_space is not None
    executed = action.copy() if executed is None else executed
    labeled = np.zeros((len(action), 1), bool) if labeled is None else labeled
    rows = np.array(sorted(labels))
    given = np.array([labels[row] for row in rows.tolist()])
    if store.action_space.values:
        given = np.array(store.action_space.values)[given]
    places = store.source_rows[rows]
    action[places] = given.reshape(len(rows), -1)
    labeled[places] = True
    columns = {
        "action": column(action, feature["dtype"], feature["names"]),
        "executed_action": column(executed, feature["dtype"], feature["names"]),
        "labeled": column(labeled, "bool", None),
    }
    changed = int((action[places] != executed[places]).any(1).sum())
    with atomic_dir(out) as folder:
        add_columns(root, folder, columns)
        write_json(folder / "meta" / SIDECAR, {**about, "labels": len(rows), "changed": changed})
    return changed
