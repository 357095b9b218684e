"""latentact: robot policies from video without actions.

Public names are imported on first use, so that `import latentact` stays cheap and does not import torch.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentact.agents.agent import Agent, AgentSpec
    from latentact.agents.load import load_agent
    from latentact.agents.own import PolicyActor
    from latentact.data.cache import DataConfig, open_store
    from latentact.data.conformance import check_format
    from latentact.data.store import FrameStore
    from latentact.envs.conformance import check_env
    from latentact.errors import UserError
    from latentact.guidance.extractor import LatentActionExtractor
    from latentact.guidance.guide import Guide
    from latentact.guidance.inference import LatentGuidedInference
    from latentact.labeling.stream import TokenStream, camera_deltas
    from latentact.lams.conformance import check_lam
    from latentact.lams.contract import LatentActionModel, load_lam
    from latentact.nn.int8 import int8
    from latentact.policies.conformance import check_policy
    from latentact.policies.contract import Policy
    from latentact.types import ActionSpace, Clip, LatentActions, LatentActionSpec

_WHERE = {
    "ActionSpace": "types",
    "Agent": "agents.agent",
    "AgentSpec": "agents.agent",
    "Clip": "types",
    "DataConfig": "data.cache",
    "FrameStore": "data.store",
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
    "check_format": "data.conformance",
    "check_lam": "lams.conformance",
    "check_policy": "policies.conformance",
    "check_env": "envs.conformance",
    "int8": "nn.int8",
    "load_agent": "agents.load",
    "load_lam": "lams.contract",
    "open_store": "data.cache",
}
__all__ = [
    "ActionSpace",
    "Agent",
    "AgentSpec",
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
    "check_env",
    "check_format",
    "check_lam",
    "check_policy",
    "int8",
    "load_agent",
    "load_lam",
    "open_store",
]


def __getattr__(name: str) -> Any:
    if name == "PolicyActor":
        warnings.warn(
            "latentact.PolicyActor is deprecated; use latentact.load_agent(folder, device).",
            DeprecationWarning,
            stacklevel=2,
        )
    if name not in _WHERE:
        raise AttributeError(f"module 'latentact' has no attribute {name!r}")
    return getattr(importlib.import_module(f"latentact.{_WHERE[name]}"), name)
