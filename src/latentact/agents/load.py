"""Load the agent of a policy folder."""

from __future__ import annotations

from pathlib import Path

from latentact.agents.agent import GuidedPolicy
from latentact.agents.grounded import GroundedPolicyAdapter
from latentact.agents.lerobot import LeRobotPolicyAdapter
from latentact.agents.own import GuidedPolicyAdapter
from latentact.errors import UserError
from latentact.io.atomic import read_json
from latentact.io.hub import resolve_folder
from latentact.policies.contract import Policy


def load_guided_policy(where: str | Path, device: str = "cpu") -> GuidedPolicy:
    """Load a policy that can follow a guide, of any of the three kinds.

    Args:
        where: folder or hub id; a LeRobot training's output folder stands for its last checkpoint.
        device: cpu, cuda or mps.

    Raises:
        UserError: it is missing, damaged, or acts by observations alone.
    """
    last = Path(where) / "checkpoints" / "last" / "pretrained_model"
    folder = resolve_folder(last if last.is_dir() else where)
    values = read_json(folder / "config.json")
    if isinstance(values, dict) and "type" in values:
        return LeRobotPolicyAdapter(folder, device)
    policy = Policy.from_pretrained(folder, device)
    if policy.spec.guide is not None and policy.spec.action_space is not None:
        return GuidedPolicyAdapter(policy, policy.spec.guide, device)
    if policy.latent is not None and policy.decoder is None:
        raise UserError(f"{where} predicts latent actions; ground it first: latentact ground --help.")
    if policy.latent is None:
        raise UserError(
            f"{where} acts by what it sees alone and cannot follow a guide; give a grounded latent policy, "
            "one of policy=guided, or lam_diffusion or lam_act."
        )
    return GroundedPolicyAdapter(policy, device)
