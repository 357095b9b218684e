"""Compare latent policies with the plain baselines: `latentact compare data.path=DIR env=NAME ks=[5]`.

For every seed and k, every row gets the same k labeled episodes, network and evaluation seeds: the latent
policy, the latent policy whose LAM had an action head on the k episodes, BC on k, BC on the pseudo-labels of
an inverse dynamics model trained on k (IDM-k), and BC on all labels (oracle). Latent policies are fine-tuned,
so the baselines have rows with as many updates: BC-k with self-training or fine-tuning, IDM-k and the oracle
with fine-tuning. Rows of a vision-language-action model (VLA) are included if `methods` lists them:
pretrained on the latent actions of the LAM, fine-tuned without pretraining, and trained on all labels for the
same total number of updates. Two rows that ignore observations are always included: uniformly random actions,
and those of random steps of the demonstrations. Every row is a chain of stages through artifacts on disk;
re-run the command to resume. With other methods, ks or seeds, it adds rows to the same folder and compares
those that it is given.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from latentact.agents.agent import Agent
from latentact.agents.blind import BLIND, BlindAgent
from latentact.config import choice
from latentact.data.cache import DataConfig, open_store
from latentact.data.mixture import TrainingDataConfig
from latentact.data.plan import read_plan
from latentact.data.splits import choose_labeled, split_episodes
from latentact.data.store import known_rows
from latentact.data.time_base import frames_in_gap
from latentact.envs.checks import check_compatible, check_ranges, check_step_limit, try_step
from latentact.envs.distract import Distraction
from latentact.envs.spec import env_spec
from latentact.errors import UserError, require_between, require_one_of
from latentact.evaluation.policy.comparison import Row
from latentact.io.atomic import read_object
from latentact.lams.contract import LAMS
from latentact.lams.models.idm import IdmConfig
from latentact.policies.contract import POLICIES
from latentact.policies.decoder import DecoderConfig
from latentact.policies.selection import SELECTIONS, Selection, Temperature
from latentact.policies.vla.backbone import load_config
from latentact.policies.vla.heads import HEADS
from latentact.reporting.comparison_plot import write_comparison
from latentact.stages import (
    finetune,
    finetune_vla,
    ground,
    label,
    precompute,
    rollout,
    train_lam,
    train_lerobot,
    train_policy,
    train_vla,
)
from latentact.training.cluster.contract import CLUSTERS, ClusterStage
from latentact.training.run_folder import begin_run, check_settings
from latentact.training.settings import TrainingConfig

log = logging.getLogger(__name__)

METHODS = (
    "latent",
    "latent_finetuned",
    "latent_joint",
    "bc_k",
    "bc_k_finetuned",
    "bc_k_self_training",
    "idm_k",
    "idm_k_finetuned",
    "oracle",
    "oracle_finetuned",
)
LEROBOT = ("act_k", "diffusion_k", "lam_act_k")
"""Rows of LeRobot's policies."""
VLA = ("vla", "vla_scratch", "vla_oracle")
"""Rows of a vision-language-action model."""
FINETUNED = {
    "latent_finetuned": "latent",
    "bc_k_finetuned": "bc_k",
    "bc_k_self_training": "bc_k",
    "idm_k_finetuned": "idm_k",
    "oracle_finetuned": "oracle",
}
"""Rows that fine-tune the policy of another row."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(ClusterStage):
    """Compare latent policies with BC-k, IDM-k and oracle BC at equal budgets, with a verdict."""

    ONE_PROCESS: ClassVar = True
    EXTENDS: ClassVar = ("methods", "ks", "seeds")

    out: str = "runs/compare"
    """Run folder; re-run the same command to resume, or with other methods, ks or seeds to add rows."""
    data: DataConfig
    """Demonstrations with robot actions."""
    env: str
    """Environment in which success is measured."""
    view: str = "agent"
    """View of the environment in which the data was collected: agent or full."""
    distract: str = ""
    """Distractors in the environment, as for `collect`: background=0.5,shake=0.3,correlation=0.8."""
    methods: tuple[str, ...] = METHODS
    """Rows; act_k, diffusion_k and lam_act_k (LeRobot's policies, for continuous actions), vla, vla_scratch
    and vla_oracle are also available. Rows that would equal another one are left out: `*_finetuned` and
    `bc_k_self_training` without finetune_steps; with self_training, `bc_k_finetuned`; without it,
    `latent_finetuned` and `bc_k_self_training`."""
    ks: tuple[int, ...] = (5,)
    """Numbers of labeled episodes."""
    plan: str = ""
    """File of `latentact plan` whose first k episodes are labeled in every row; empty: drawn by seed."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of weights, batches, and the choice of labeled and held-out episodes."""
    episodes: int = 200
    """Evaluation episodes per row."""
    eval_seed: int = 100_000
    """Reset seed of the first evaluation episode."""
    max_steps: int = 0
    """Steps after which an evaluation episode ends; 0: the environment's own limit, where it has one."""
    action_selection: Selection = "greedy"
    """Discrete actions: greedy takes the most likely one, sample draws from the predicted distribution."""
    temperature: Temperature = 1.0
    """sample: temperature of the softmax; below 1, likely actions are drawn more often."""
    record: int = 2
    """Evaluation episodes per row whose video is kept."""
    frame_gap_s: float = 0.0
    """Seconds between the two frames of a transition; 0: neighboring frames. The policy's chunk_size and
    n_action_steps count such gaps, also in rows of BC."""
    held_out: float = 0.1
    """Fraction of held-out episodes."""
    lam: Any = choice(LAMS, "lapo")
    """The latent action model."""
    lam_training: TrainingConfig = field(default_factory=TrainingConfig)
    """Its training."""
    joint_action_weight: float = 1.0
    """Weight of the action head in the row latent_joint."""
    idm: IdmConfig = field(default_factory=IdmConfig)
    """The inverse dynamics model of the row idm_k."""
    idm_training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=500, eval_every=0))
    """Its training."""
    policy: Any = choice(POLICIES, "latent")
    """The latent policy; its network serves every row."""
    policy_training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=60_000, lr=2e-4))
    """Training of every policy."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The decoder from latent to robot actions."""
    decoder_training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=1000, batch_size=64, lr=1e-3, eval_every=0)
    )
    """Its training."""
    finetune_steps: int = 200
    """Steps of the subsequent end-to-end fine-tuning; 0: none."""
    finetune_lr: float = 1e-4
    """Peak learning rate of those steps."""
    self_training: bool = False
    """Whether fine-tuning of `latent` and `latent_joint` uses all training episodes, as in ground."""
    lerobot: train_lerobot.LeRobotRecipe = field(default_factory=train_lerobot.LeRobotRecipe)
    """LeRobot's settings of the rows act_k, diffusion_k and lam_act_k; steps are those of policy_training."""
    vla: train_vla.TrainVlaRecipe = field(default_factory=train_vla.TrainVlaRecipe)
    """The vision-language-action model of the rows vla (latent actions first), vla_scratch (without them) and
    vla_oracle (all labels)."""
    vla_finetuning: finetune_vla.FinetuneVlaRecipe = field(default_factory=finetune_vla.FinetuneVlaRecipe)
    """Its fine-tuning to robot actions; vla_scratch and vla_oracle use labeled episodes only, vla_oracle with
    the updates of both stages."""
    cluster: Any = choice(CLUSTERS, "local")
    """Where to run it; in one process."""

    def __post_init__(self) -> None:
        """Validate the configuration."""
        Distraction.parse(self.distract)
        require_one_of("action_selection", self.action_selection, SELECTIONS)
        require_between("temperature", self.temperature, 1e-3, 1e3)
        for method in self.methods:
            if method not in (known := (*METHODS, *LEROBOT, *VLA)):
                raise UserError(f"methods must be among {', '.join(known)}, got {method!r}.")
        if not self.methods or (not self.ks and any("oracle" not in m for m in self.methods)):
            raise UserError(
                f"methods and ks must have at least one value each, got {[*self.methods]} and {[*self.ks]}."
            )
        if not self.seeds:
            raise UserError("seeds must have at least one value, got [].")
        if any(k < 1 for k in self.ks):
            raise UserError(f"ks must be at least 1, got {[*self.ks]}.")
        for seed in (*self.seeds, self.eval_seed):
            check_ranges(seed=seed)
        check_ranges(episodes=self.episodes, record=self.record, max_steps=self.max_steps)


def run(config: CompareConfig, out: Path) -> dict[str, Any]:
    """Run every method and seed, and write and return the comparison."""
    env = env_spec(config.env, view=config.view)
    check_step_limit(env, config.max_steps)
    store = open_store(config.data)
    if store.action_space is None:
        raise UserError(
            f"{config.data.path} must have robot actions, got none. Give demonstrations of {config.env}."
        )
    vla = any(method in VLA for method in config.methods)
    uses_state = config.policy.network.use_state or config.decoder.use_state
    uses_state |= vla and config.vla.model.use_state
    if config.decoder.use_state and store.state is None:
        raise UserError(
            f"decoder.use_state must be false for {config.data.path}, which has no observation.state, got "
            "true."
        )
    check_compatible(
        env,
        config.data.path,
        actions=store.action_space,
        cameras=(store.camera,),
        channels=store.frames.shape[3],
        state_size=store.state.shape[1] if uses_state and store.state is not None else 0,
    )
    if lerobot := [method for method in config.methods if method in LEROBOT]:
        train_lerobot.check(store, lerobot)
    if vla:
        load_config(config.vla.model.vlm)
        HEADS[config.vla_finetuning.head.kind](config.vla_finetuning.head, store.action_space, 8)
    distract = Distraction.parse(config.distract)
    try_step(config.env, view=config.view, distract=distract, seed=config.eval_seed)
    for seed in config.seeds:
        train, _ = split_episodes(store, held_out=config.held_out, seed=seed)
        choose_labeled(train, max(config.ks, default=0), seed, read_plan(config.plan, store))
    if "latent_joint" in config.methods and _joint_lam(config) is None:
        others = ",".join(method for method in config.methods if method != "latent_joint")
        raise UserError(
            f"lam must support an action head for the row latent_joint, got lam={config.lam.kind} with "
            f"settings without one. Set methods=[{others}], or choose a LAM with an action head, such as "
            "lapo with lam.bottleneck.kind=none."
        )
    _steps(config)
    check_settings(out, config)
    begin_run(out, config)
    rows = []
    for seed in config.seeds:
        for method, k in _rows(config):
            log.info("--- %s, k = %s, seed %d", method, "all" if k is None else k, seed)
            rows.append(_Row(config, out, method, k, seed).make())
    drawn = config.temperature if config.action_selection == "sample" else None
    comparison = write_comparison(out, config.env, rows, config.distract, drawn)
    log.info(comparison["verdict"])
    return comparison


def _steps(config: CompareConfig) -> int:
    """Return the number of environment steps of a latent action."""
    if not config.frame_gap_s:
        return 1
    return frames_in_gap(
        config.frame_gap_s, open_store(config.data).fps, config.data.path, setting="frame_gap_s"
    )


def _joint_lam(config: CompareConfig) -> Any:
    """Return the settings of the LAM with an action head; None if it cannot have one."""
    return config.lam.with_action_head(config.joint_action_weight)


def _rows(config: CompareConfig) -> Iterator[tuple[str, int | None]]:
    left_out = set()
    if not config.finetune_steps:
        left_out |= FINETUNED.keys()
    left_out |= {"bc_k_finetuned"} if config.self_training else {"latent_finetuned", "bc_k_self_training"}
    for method in config.methods:
        if method in left_out:
            continue
        if "oracle" in method:
            yield method, None
        else:
            yield from ((method, k) for k in config.ks)
    yield from ((method, None) for method in BLIND)


@dataclass(frozen=True)
class _Row:
    """One row: the folders of its artifacts and the stages that create them."""

    config: CompareConfig
    out: Path
    method: str
    k: int | None
    seed: int

    @property
    def base(self) -> str:
        """The row whose policy this one fine-tunes, or the row itself."""
        return FINETUNED.get(self.method, self.method)

    def make(self) -> Row:
        """Run the unfinished stages of the row and return its results."""
        c = self.config
        more: dict[str, Any] = {"method": self.method, "k": self.k, "seed": self.seed}
        more["updates"] = c.policy_training.steps
        if self.method in BLIND:
            return Row.from_json(self._blind() | more | {"updates": 0, "run": self._run("rollout")})
        if self.method in VLA:
            folder, more["updates"] = self._vla()
        elif self.method in LEROBOT:
            folder, more["updates"] = self._lerobot()
        elif self.base in ("latent", "latent_joint"):
            folder = ground.run(self._ground(self._labels(self._latent_lam())), self._folder("grounded"))
        elif self.base == "idm_k":
            folder = self._policy(self._behavior_cloning(), labels=self._labels(self._idm()))
        else:
            folder = self._policy(self._behavior_cloning(), k=self.k)
        if (folder / "finetuned").is_dir():
            more["updates"] += c.finetune_steps
            if self.method == self.base:
                plain = self._rollout(folder, "rollout_decoder_only")
                keys = ("success", "return", "ci95", "return_ci95")
                more["decoder_only"] = {key: plain[key] for key in keys}
            folder = folder / "finetuned"
        elif self.method in FINETUNED:
            more["updates"] += c.finetune_steps
            folder = finetune.run(self._finetune(folder), self._folder("finetuned"))
        result = self._rollout(folder, "rollout")
        return Row.from_json(result | more | {"run": self._run("rollout")})

    @property
    def _plan(self) -> str:
        """The plan of the labeled episodes; none where all are labeled."""
        return "" if self.k is None else self.config.plan

    def _run(self, name: str) -> str:
        return str(self._folder(name).relative_to(self.out))

    def _folder(self, name: str) -> Path:
        """Return the folder of an artifact.

        Fine-tuned rows share the artifacts before fine-tuning with their base; the latent policy needs no
        labels before grounding, so all k share its artifacts, and a vision-language-action model learns from
        the same latent actions.
        """
        early = name in ("lam", "labels", "policy", "tokens")
        method = self.base if early else self.method
        if early and self.method in VLA:
            method = "vla" if name == "policy" else "latent"
        if early and self.method in LEROBOT and name != "policy":
            method = "latent"
        shared = early and method in ("latent", "vla")
        k = "" if shared or self.k is None else f"_k{self.k}"
        return self.out / f"seed{self.seed}" / f"{method}{k}" / name

    def _latent_lam(self) -> Path:
        lam, k = self.config.lam, 0
        if self.base == "latent_joint":
            lam, k = _joint_lam(self.config), self.k or 0
        return self._train_lam(lam, self.config.lam_training, k)

    def _idm(self) -> Path:
        return self._train_lam(self.config.idm, self.config.idm_training, self.k or 0)

    def _train_lam(self, lam: Any, training: TrainingConfig, k: int) -> Path:
        c = self.config
        settings = train_lam.TrainLamConfig(
            data=TrainingDataConfig(**vars(c.data)),
            lam=lam,
            training=replace(training, seed=self.seed),
            frame_gap_s=c.frame_gap_s if self.base != "idm_k" else 0.0,
            held_out=c.held_out,
            split_seed=self.seed,
            labeled_episodes=k,
            plan=c.plan if k else "",
        )
        return train_lam.run(settings, self._folder("lam"))

    def _labels(self, lam: Path) -> Path:
        return label.run(
            label.LabelConfig(
                lam=str(lam),
                data=self.config.data,
                resolution=self.config.data.resolution,
                out=str(self._folder("labels")),
            )
        )

    def _behavior_cloning(self) -> Any:
        """Return BC whose chunks last as long as the latent policy's, where a target lasts a frame gap."""
        policy, steps = self.config.policy.behavior_cloning(), _steps(self.config)
        if steps == 1:
            return policy
        network = policy.network
        chunk = {key: getattr(network, key) * steps for key in ("chunk_size", "n_action_steps")}
        return replace(policy, network=replace(network, **chunk))

    def _policy(self, policy: Any, labels: Path | None = None, k: int | None = None) -> Path:
        c = self.config
        settings = train_policy.TrainPolicyConfig(
            labels=str(labels or ""),
            data=TrainingDataConfig(**vars(c.data)),
            policy=policy,
            training=replace(c.policy_training, seed=self.seed),
            held_out=c.held_out,
            split_seed=self.seed,
            labeled_episodes=k,
            plan=self._plan if k else "",
        )
        return train_policy.run(settings, self._folder("policy"))

    def _ground(self, labels: Path) -> ground.GroundConfig:
        c = self.config
        return ground.GroundConfig(
            policy=str(self._policy(c.policy, labels=labels)),
            labels=str(labels),
            labeled_episodes=self.k or 0,
            plan=c.plan,
            decoder=c.decoder,
            training=replace(c.decoder_training, seed=self.seed),
            finetune_steps=c.finetune_steps,
            finetune_lr=c.finetune_lr,
            self_training=c.self_training and self.method == self.base,
            held_out=c.held_out,
            split_seed=self.seed,
        )

    def _finetune(self, policy: Path) -> finetune.FinetuneConfig:
        """Return the folder of a baseline after the training that a latent policy gets in `ground`."""
        c = self.config
        training = replace(c.decoder_training, seed=self.seed)
        return finetune.FinetuneConfig(
            policy=str(policy),
            data=c.data,
            labeled_episodes=self.k,
            plan=self._plan,
            training=replace(training, steps=c.finetune_steps, lr=c.finetune_lr),
            self_training=self.method == "bc_k_self_training",
            teacher_training=training,
            held_out=c.held_out,
            split_seed=self.seed,
        )

    def _lerobot(self) -> tuple[Path, int]:
        """Return the folder of a LeRobot policy, and its number of updates."""
        c, kind = self.config, self.method.removesuffix("_k")
        store = open_store(c.data)
        data = Path(store.path)
        if kind == "lam_act":
            tokens = precompute.PrecomputeConfig(
                lam_model_path=str(self._latent_lam()),
                dataset_root=str(data),
                camera_key=c.data.camera,
                output_dir=str(self._folder("tokens")),
            )
            data = precompute.run(tokens)
        train, _ = split_episodes(store, held_out=c.held_out, seed=self.seed)
        training = c.policy_training
        chosen = choose_labeled(train, self.k, self.seed, read_plan(self._plan, store))
        settings = train_lerobot.TrainLeRobotConfig(
            out=str(self._folder("policy")),
            dataset_root=str(data),
            policy=kind,
            episodes=tuple(chosen.tolist()),
            steps=training.steps,
            batch_size=c.lerobot.batch_size or training.batch_size,
            device=training.device,
            seed=self.seed,
            num_workers=training.num_workers,
            overrides=tuple(getattr(c.lerobot, kind).split()),
        )
        folder = train_lerobot.run(settings)
        return folder, int(read_object(folder / train_lerobot.RESULT)["steps"])

    def _vla(self) -> tuple[Path, int]:
        """Return the folder of a fine-tuned vision-language-action model, and its number of updates."""
        c, labels = self.config, str(self._labels(self._latent_lam()))
        pretraining = replace(c.vla.training, seed=self.seed)
        training = replace(c.vla_finetuning.training, seed=self.seed)
        both = pretraining.steps + training.steps
        if self.method == "vla_oracle":
            training = replace(pretraining, steps=both, eval_every=0)
        settings = train_vla.TrainVlaConfig(
            **vars(replace(c.vla, training=pretraining)),
            labels=labels,
            held_out=c.held_out,
            split_seed=self.seed,
        )
        train_vla.run(settings, self._folder("policy"))
        recipe = replace(
            c.vla_finetuning,
            training=training,
            decoder_training=replace(c.vla_finetuning.decoder_training, seed=self.seed),
            pseudo_labels=c.vla_finetuning.pseudo_labels and self.method == "vla",
        )
        tuned = finetune_vla.FinetuneVlaConfig(
            **vars(recipe),
            vla=str(self._folder("policy")),
            labels=labels,
            labeled_episodes=self.k,
            plan=self._plan,
            scratch=self.method != "vla",
            held_out=c.held_out,
            split_seed=self.seed,
        )
        folder = finetune_vla.run(tuned, self._folder("finetuned")).path
        return folder, both if self.method == "vla" else training.steps

    def _blind(self) -> dict[str, Any]:
        """Roll out an agent that draws from the actions of the training episodes without observing."""
        store = open_store(self.config.data)
        train, _ = split_episodes(store, held_out=self.config.held_out, seed=self.seed)
        actions = store.actions(train)
        known = known_rows(actions) & store.usable
        known[store.starts + store.lengths - 1] = False  # the last action is never taken
        assert store.action_space is not None
        taken = np.ma.getdata(actions)[known]
        agent = BlindAgent(self.method, store.action_space, taken, self.config.eval_seed + self.seed)
        return self._rollout(Path(self.method), "rollout", agent)

    def _rollout(self, policy: Path, name: str, agent: Agent | None = None) -> dict[str, Any]:
        c = self.config
        more = {"distract": c.distract, "temperature": c.temperature, "record": c.record}
        return rollout.evaluate(c, policy, self._folder(name), agent, **more)
