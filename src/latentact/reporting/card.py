"""README.md of a hub repository: YAML metadata and tables, with every number from the run's JSON files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentact.evaluation.policy.comparison import METHODS
from latentact.evaluation.policy.latent_accuracy import BASELINES as PREDICTIONS
from latentact.evaluation.policy.latent_accuracy import CONTROLS
from latentact.evaluation.policy.rollout import conditions

PROBES = {
    "latent_linear": "linear probe of the latent action",
    "latent_mlp": "MLP probe of the latent action",
    "state_only": "baseline: MLP probe of the state alone",
    "shuffled_future": "control: the same LAM on shuffled futures",
}
NO_RESULTS = "No evaluation results were found next to this {what}."


@dataclass(frozen=True, kw_only=True)
class CardInfo:
    """Information about a repository from the user."""

    repo_id: str
    """Hub id."""
    license: str = ""
    """License id; empty: not stated."""
    datasets: tuple[str, ...] = ()
    """Hub ids of the training data."""


def policy_card(
    info: CardInfo,
    config: Mapping[str, Any],
    *,
    numbers: Mapping[str, Mapping[str, Any]],
    rollouts: Sequence[Mapping[str, Any]],
    comparison: Mapping[str, Any] | None,
    run: str,
) -> str:
    """Return the card of a policy or of a vision-language-action model.

    Args:
        info: information from the user.
        config: content of `config.json`.
        numbers: contents of the result files next to it, by name: `policy.json`, `ground.json`,
            `vla.json`, `finetune_vla.json`.
        rollouts: contents of `rollout.json` files of this policy.
        comparison: content of the `comparison.json` with this policy.
        run: folder of the policy's rollout, as in the rows of the comparison.
    """
    actions, vla = config["spec"]["action_space"], config.get("vla")
    kind = "vision-language-action" if vla else config["policy"]["kind"]
    rows = list((comparison or {}).get("rows", ()))
    own = next((row for row in rows if row["run"] == run), None)
    peers = [row for row in rows if own and row["seed"] == own["seed"] and row["k"] in (own["k"], None)]
    env = (comparison or {}).get("env", "")
    baselines = [f"{METHODS.get(row['method'], row['method'])} {_score(row)}" for row in peers if row != own]
    results = [_eval_result(env, own, baselines)] if own else []
    results += [_eval_result(_where(rollout), rollout, []) for rollout in rollouts]
    results += _code_results(numbers.get("vla.json", {}))
    around = f" around `{vla['vlm']}`" if vla else ""
    lines = [
        f"A `{kind}` {'model' if vla else 'policy'}{around} trained with latentact, as a "
        f"LeRobot policy of type `{config['type']}`.",
        "",
        *_interface_lines(config),
        *_training_lines(numbers),
    ]
    lines += ["", "## Results", ""]
    lines += _code_table(numbers.get("vla.json", {}))
    if own:
        lines += [f"`{env}`, same labels, seed and episodes for every method:", ""]
        lines += _table(
            ("method", "labeled episodes", "success or return", "95 % interval", "episodes"),
            [_comparison_cells(row, row is own) for row in peers],
        )
    if rollouts:
        cells = [(f"`{_where(r)}`", _score(r), _interval(r), r["episodes"], r["seed"]) for r in rollouts]
        lines += _table(
            ("environment", "success or return", "95 % interval", "episodes", "first reset seed"), cells
        )
    if lines[-1] == "":
        lines.append(NO_RESULTS.format(what="policy"))
    lines += ["", "## Use", "", "```bash"]
    lines += ["# Needs latentact and its plugins for LeRobot."]
    task = env or (rollouts[0]["env"] if rollouts else "")
    if not actions:
        lines.append(f"latentact finetune-vla vla={info.repo_id} labels=LABELS")
    if task:
        lines += [
            f"lerobot-eval --policy.path={info.repo_id} --env.type=latentact --env.task={task} "
            "--eval.n_episodes=100",
            f"latentact rollout --policy {info.repo_id} --env {task} --out runs/rollout",
        ]
    head = "" if actions else " --policy.head.kind=chunk"
    lines += [f"lerobot-train --policy.path={info.repo_id} --dataset.repo_id=OWNER/NAME{head}", "```"]
    tags = ["robotics", "lerobot", "latentact", "latent-action", kind]
    return _model_card(info, "lerobot", tags, results, lines)


def lam_card(info: CardInfo, spec: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    """Return the card of a latent action model.

    Args:
        info: information from the user.
        spec: content of `spec.json`.
        evaluation: content of `lam.json`.
    """
    codes = f", {spec['codebook_size']} codes" if spec["codebook_size"] else ""
    lines = [
        f"A latent action model (`{spec['model']}`) trained with latentact: {spec['tokens']} x "
        f"{spec['token_dim']} values per transition{codes}, {spec['frame_gap_s']:g} s between frames, "
        f"{spec['resolution']}x{spec['resolution']} frames.",
        "",
        "## Results",
        "",
    ]
    results = []
    probes = (evaluation or {}).get("probes", {})
    errors = {
        "recon_mse": "reconstruction",
        "copy_mse": "baseline: copy of the last frame",
        "shuffled_mse": "control: shuffled latent actions",
    }
    found = {key: text for key, text in errors.items() if isinstance((evaluation or {}).get(key), float)}
    if evaluation and found:
        cells = [(text, f"{evaluation[key]:.4g}") for key, text in found.items()]
        lines += [
            *_table(("prediction of the next frame, held-out episodes", "mean squared error"), cells),
            "",
        ]
    if probes:
        cells = []
        for name, probe in probes.items():
            low, high = probe.get("ci95") or ("", "")
            interval = f"{low:.3g} to {high:.3g}" if probe.get("ci95") else ""
            cells.append((PROBES.get(name, name), probe["metric"], f"{probe['score']:.3g}", interval))
            if name.startswith("latent_"):
                floor = [
                    f"{n} {probes[n]['score']:.3g}" for n in ("state_only", "shuffled_future") if n in probes
                ]
                results.append(_metric("robot action", name, probe["metric"], probe["score"], floor))
        lines += _table(("robot action from", "metric", "score", "95 % interval"), cells)
    if not found and not probes:
        lines.append(NO_RESULTS.format(what="model"))
    lines += [f"- Warning: {warning}" for warning in (evaluation or {}).get("warnings", ())]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import latentact",
        "",
        f'lam = latentact.load_lam("{info.repo_id}")',
    ]
    lines += ["latent_actions = lam.encode(frames)  # uint8 [b, t, 3, h, w]", "```"]
    tags = ["robotics", "latentact", "latent-action-model", spec["model"]]
    return _model_card(info, "latentact", tags, results, lines)


def dataset_card(
    info: CardInfo,
    meta: Mapping[str, Any],
    *,
    collected: Mapping[str, Any] | None,
    tokens: Mapping[str, Any] | None,
) -> str:
    """Return the card of a LeRobot dataset.

    Args:
        info: information from the user.
        meta: content of `meta/info.json`.
        collected: content of `meta/collect.json`.
        tokens: content of `meta/lam_tokens.json`.
    """
    from huggingface_hub import DatasetCardData

    data = DatasetCardData(
        license=info.license or None,
        task_categories=["robotics"],
        tags=["LeRobot", "robotics", "latentact", *(["latent-action"] if tokens else [])],
        source_datasets=list(info.datasets) or None,
        configs=[{"config_name": "default", "data_files": "data/*/*.parquet"}],
    )
    lines = [
        f"A LeRobot dataset ({meta['codebase_version']}): {meta['total_episodes']} episodes, "
        f"{meta['total_frames']} frames, {meta['fps']:g} fps.",
    ]
    if collected:
        lines += ["", "Collected with a scripted expert of latentact:", ""]
        lines += [f"- {name}: {value}" for name, value in collected.items()]
    if tokens:
        spec = tokens["spec"]
        column = "action" if tokens.get("asked", {}).get("as") == "action" else "observation.lam_tokens"
        lines += [
            "",
            f"`{column}` holds {tokens.get('tokens', 'latent')} tokens of `{spec['model']}`: "
            f"{spec['tokens']} x {spec['token_dim']} values over {spec['frame_gap_s']:g} s, weights "
            f"{spec['weights']}.",
        ]
    cells = [
        (f"`{name}`", feature["dtype"], " x ".join(map(str, feature["shape"])))
        for name, feature in meta["features"].items()
    ]
    lines += ["", *_table(("feature", "type", "shape"), cells), "", "## Use", "", "```python"]
    lines += ["from lerobot.datasets.lerobot_dataset import LeRobotDataset", ""]
    lines += [f'dataset = LeRobotDataset("{info.repo_id}")', "```"]
    return _card(data.to_yaml(), info.repo_id, lines)


def _interface_lines(config: Mapping[str, Any]) -> list[str]:
    """Return the inputs, the outputs and the latent actions of a policy."""
    spec, inputs, latent = config["spec"], config["input_features"], config["latent"]
    state = f" and {spec['state_size']} state values" if "observation.state" in inputs else ""
    output = "latent actions"
    if actions := spec["action_space"]:
        discrete = actions["kind"] == "discrete"
        output = f"{actions['size']} {'discrete actions' if discrete else 'continuous action values'}"
    lines = [
        f"- Input: {spec['resolution']}x{spec['resolution']} frames of `{next(iter(inputs))}`{state}, "
        f"{spec['fps']:g} fps.",
        f"- Output: {output}.",
    ]
    if latent:
        lines.append(
            f"- Latent actions: `{latent['model']}`, {latent['tokens']} x {latent['token_dim']} values over "
            f"{latent['frame_gap_s']:g} s."
        )
    return lines


def _training_lines(numbers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    training, grounding = numbers.get("policy.json"), numbers.get("ground.json")
    lines = []
    if vla := numbers.get("vla.json"):
        lines.append(
            f"- Training: {vla['samples']} steps of {vla['episodes']} episodes without robot actions."
        )
    if tuned := numbers.get("finetune_vla.json"):
        lines.append(f"- {finetuning(tuned)}")
    if training:
        loss = training.get("val/loss")
        held_out = "" if loss is None else f", loss on held-out episodes {loss:.4g}"
        lines.append(f"- Training: {training['samples']} steps of {training['episodes']} episodes{held_out}.")
    if grounding and "verdict" in grounding:  # mode=online
        lines.append(f"- Grounding by reward. {grounding['verdict']}")
    elif grounding:
        steps = grounding.get("labeled_steps", grounding.get("labelled_steps"))
        score = grounding.get("held_out_score")
        held_out = "" if score is None else f", decoder's score on held-out episodes {score:.3g}"
        lines.append(f"- Grounding: {steps} steps with robot actions{held_out}.")
    return lines


def finetuning(numbers: Mapping[str, Any]) -> str:
    """Return the content of `finetune_vla.json` as a sentence."""
    each = {"accuracy": ("held_out_accuracy", "majority_accuracy", "the majority action")}
    each |= {"L1": ("held_out_l1", "mean_action_l1", "the mean action")}
    scores = [
        f"{metric} on held-out episodes {_mean(numbers[own]):.3g}, of {name} {_mean(numbers[base]):.3g}"
        for metric, (own, base, name) in each.items()
        if own in numbers
    ]
    return (
        f"Fine-tuning: {numbers['labeled_steps']} steps with robot actions of "
        f"{numbers['labeled_episodes']} episodes; {', '.join(scores)}."
    )


def _mean(value: float | Sequence[float]) -> float:
    return sum(value) / len(value) if isinstance(value, Sequence) else value


def _code_table(numbers: Mapping[str, Any]) -> list[str]:
    """Return a table of the scores of `vla.json` with baselines and controls."""
    if "score" not in numbers:
        return []
    rows = [("the model", numbers["score"])]
    rows += [(f"baseline: {PREDICTIONS[name]}", value) for name, value in numbers["baselines"].items()]
    rows += [(f"control: the model {CONTROLS[name]}", value) for name, value in numbers["controls"].items()]
    head = ("prediction of latent actions, held-out episodes", numbers["metric"])
    return [numbers["verdict"], "", *_table(head, [(name, f"{value:.3f}") for name, value in rows])]


def _code_results(numbers: Mapping[str, Any]) -> list[Any]:
    if "score" not in numbers:
        return []
    floor = [f"{PREDICTIONS[name]} {value:.3f}" for name, value in numbers["baselines"].items()]
    return [_metric("latent action", "held-out episodes", numbers["metric"], numbers["score"], floor)]


def _score(row: Mapping[str, Any]) -> str:
    return f"return {row['return']:.3g}" if row["success"] is None else f"{row['success']:.3g}"


def _where(rollout: Mapping[str, Any]) -> str:
    """Return the environment of a `rollout.json`, with the settings that change it."""
    changed = conditions(rollout)
    return f"{rollout['env']} with {changed}" if changed else rollout["env"]


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["return_ci95"] if row["success"] is None else row["ci95"]
    return f"{low:.3g} to {high:.3g}"


def _comparison_cells(row: Mapping[str, Any], own: bool) -> tuple[Any, ...]:
    name = METHODS.get(row["method"], row["method"])
    k = "all" if row["k"] is None else row["k"]
    return f"**{name} (this policy)**" if own else name, k, _score(row), _interval(row), row["episodes"]


def _eval_result(env: str, row: Mapping[str, Any], baselines: Sequence[str]) -> Any:
    success = row["success"] is not None
    metric, value = ("success_rate", row["success"]) if success else ("return", row["return"])
    about = f"{metric}, {row['episodes']} episodes, 95 % interval {_interval(row)}"
    return _metric(env, about, metric, value, baselines)


def _metric(on: str, name: str, metric: str, value: float, baselines: Sequence[str]) -> Any:
    """Return an entry of the card's model index; its name includes the baseline."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="robotics",
        dataset_type=on,
        dataset_name=on,
        metric_type=metric,
        metric_value=value,
        metric_name=name + (f" (compared with {', '.join(baselines)})" if baselines else ""),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(str, cells))} |" for cells in lines]


def _model_card(
    info: CardInfo, library: str, tags: list[str], results: list[Any], lines: Sequence[str]
) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name=library,
        pipeline_tag="robotics",
        tags=tags,
        datasets=list(info.datasets) or None,
        license=info.license or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
        model_name=info.repo_id.partition("/")[2],
    )
    return _card(data.to_yaml(), info.repo_id, lines)


def _card(yaml: str, repo_id: str, lines: Sequence[str]) -> str:
    return "\n".join(["---", yaml.strip(), "---", "", f"# {repo_id.partition('/')[2]}", "", *lines, ""])
