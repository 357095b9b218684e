"""latentact: robot policies from video without actions.

Public names are imported on first use, so that `import latentact` stays cheap and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentact.agents.own import PolicyActor
    from latentact.data.cache import DataConfig, FrameStore, open_store
    from latentact.errors import UserError
    from latentact.guidance.extractor import LatentActionExtractor
    from latentact.guidance.guide import Guide
    from latentact.guidance.inference import LatentGuidedInference
    from latentact.labeling.stream import TokenStream, camera_deltas
    from latentact.lams.contract import LatentActionModel, load_lam
    from latentact.nn.int8 import int8
    from latentact.policies.contract import Policy
    from latentact.types import ActionSpace, Clip, LatentActions, LatentActionSpec

_WHERE = {
    "ActionSpace": "types",
    "Clip": "types",
    "DataConfig": "data.cache",
    "FrameStore": "data.cache",
    "Guide": "guidance.guide",
    "LatentActionExtractor": "guidance.extractor",
    "LatentActionModel": "lams.contract",
    "LatentActionSpec": "types",
    "LatentActions": "types",
    "LatentGuidedInference": "guidance.inference",
    "Policy": "policies.contract",
    "PolicyActor": "agents.own",
    "TokenStream": "labeling.stream",
    "UserError": "errors",
    "camera_deltas": "labeling.stream",
    "int8": "nn.int8",
    "load_lam": "lams.contract",
    "open_store": "data.cache",
}
__all__ = [
    "ActionSpace",
    "Clip",
    "DataConfig",
    "FrameStore",
    "Guide",
    "LatentActionExtractor",
    "LatentActionModel",
    "LatentActionSpec",
    "LatentActions",
    "LatentGuidedInference",
    "Policy",
    "PolicyActor",
    "TokenStream",
    "UserError",
    "camera_deltas",
    "int8",
    "load_lam",
    "open_store",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'latentact' has no attribute {name!r}")
    return getattr(importlib.import_module(f"latentact.{_WHERE[name]}"), name)
