"""latentact: robot policies from video without actions.

Public names are imported on first use, so that `import latentact` stays cheap and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentact.data.cache import DataConfig, FrameStore, open_store
    from latentact.errors import UserError
    from latentact.guidance import LatentActionExtractor, LatentGuidedInference
    from latentact.guide import Guide
    from latentact.lams.model import LatentActionModel, load_lam
    from latentact.lams.token_stream import TokenStream, camera_deltas
    from latentact.nn.int8 import int8
    from latentact.policies.actor import PolicyActor
    from latentact.policies.policy import Policy
    from latentact.types import ActionSpace, Clip, LatentActions, LatentActionSpec

_WHERE = {
    "ActionSpace": "types",
    "Clip": "types",
    "DataConfig": "data.cache",
    "FrameStore": "data.cache",
    "Guide": "guide",
    "LatentActionExtractor": "guidance",
    "LatentActionModel": "lams.model",
    "LatentActionSpec": "types",
    "LatentActions": "types",
    "LatentGuidedInference": "guidance",
    "Policy": "policies.policy",
    "PolicyActor": "policies.actor",
    "TokenStream": "lams.token_stream",
    "UserError": "errors",
    "camera_deltas": "lams.token_stream",
    "int8": "nn.int8",
    "load_lam": "lams.model",
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
