"""Load the agent of a policy folder."""

from __future__ import annotations

from pathlib import Path

from latentact.agents.agent import Agent
from latentact.agents.grounded import DecoderAgent
from latentact.agents.lerobot import LeRobotAgent
from latentact.agents.own import PolicyAgent
from latentact.agents.vla import VlaAgent
from latentact.errors import UserError
from latentact.io.atomic import read_json
from latentact.io.hub import resolve_folder
from latentact.policies.contract import Policy
from latentact.policies.lerobot_files import TYPE, VLA_TYPE
from latentact.policies.selection import Choose, greedy
from latentact.policies.vla.model import Vla


def pretrained_folder(where: str | Path) -> Path:
    """Return the folder of a policy; for the output folder of a LeRobot training, its last checkpoint.

    Raises:
        UserError: `where` is neither a folder with `config.json` nor a hub id.
    """
    last = Path(where) / "checkpoints" / "last" / "pretrained_model"
    return resolve_folder(last if last.is_dir() else where)


def load_agent(
    where: str | Path, device: str = "cpu", *, guided: bool = False, choose: Choose = greedy
) -> Agent:
    """Load a policy of any kind: ours, or any LeRobot policy.

    Args:
        where: folder or hub id; for the output folder of a LeRobot training, its last checkpoint.
        device: cpu, cuda or mps.
        guided: whether the agent follows given latent actions. A grounded latent policy then decodes these
            instead of its own predictions.
        choose: selects the class of a discrete action; ignored by LeRobot policies of other types.

    Raises:
        UserError: the policy is missing, damaged or not grounded, or `guided` is set and it is not
            conditioned on latent actions.
    """
    folder = pretrained_folder(where)
    values = read_json(folder / "config.json")
    if isinstance(values, dict) and values.get("type", TYPE) not in (TYPE, VLA_TYPE):
        return LeRobotAgent(folder, device, guided=guided)
    if isinstance(values, dict) and "vla" in values:
        if guided:
            raise UserError(
                f"{where} is not conditioned on latent actions; it predicts its own. Run it without a guide, "
                "with `latentact rollout`."
            )
        return VlaAgent(Vla.from_pretrained(folder, device), device, choose)
    policy = Policy.from_pretrained(folder, device)
    if policy.spec.action_space is None:
        raise UserError(
            f"{where} must output robot actions, got latent actions. Ground it first: latentact ground "
            "--help."
        )
    if not guided or policy.spec.guide is not None:
        return PolicyAgent(policy, device, choose=choose)
    if policy.latent is None or policy.decoder is None:
        raise UserError(
            f"{where} is not conditioned on latent actions. Give a grounded latent policy, a guided policy "
            "(policy=guided), or a lam_diffusion or lam_act policy."
        )
    return DecoderAgent(policy, device, choose)
