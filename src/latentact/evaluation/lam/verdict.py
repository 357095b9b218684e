"""Go or no-go: interpret the metrics of an inspection and recommend what to try next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

FEWEST = 8  # transitions
COLLAPSED_SPREAD = 1e-3  # standard deviation of latents over their magnitude
COLLAPSED_CODES = 1.5  # perplexity of the codes
FEW_CODES = 0.1  # perplexity over codebook size
BLIND_BELOW = 0.05  # distance that a wrong future moves a latent, over distances between latents
IGNORED_BELOW = 0.02  # change of a prediction with another latent, over the change in the video
MATTERS_ABOVE = 1.2  # prediction error with another's latent over that with its own
GAIN = 0.02  # minimum gain of a probe over its floor, in addition to its interval
LEAKS_BELOW = 0.5  # error across a cut over that of copying
REPLACES_BELOW = 0.2  # the same, where a latent determines the frame
MIRROR_ABOVE = 0.9  # centered cosine of forward and backward latents of one frame
MIRROR_REPLACES = 0.8  # the same, where a latent determines the frame
MIRROR_WITH_CUTS = 0.5  # the same, where predictions across cuts are good


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One property of the model that matters to users."""

    name: str
    """Identifier in `inspect.json`: collapsed, ignored, off_by_one, shuffled_future, ..."""
    level: Literal["no-go", "caution"]
    """Whether it rules out use of the model, or only calls for caution."""
    message: str
    """The finding, in one sentence."""
    recommendation: str
    """What to try."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether to use a latent action model, and why."""

    go: bool
    """Whether to use the model."""
    name: str
    """`healthy`, or the name of the first no-go finding."""
    headline: str
    """One sentence."""
    recommendation: str
    """What to do next."""
    findings: tuple[Finding, ...]
    """No-go findings first."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `inspect.json` under `verdict`."""
        return {**asdict(self), "findings": [asdict(finding) for finding in self.findings]}


def interpret(numbers: dict[str, Any]) -> Verdict:
    """Return the verdict on the metrics of an inspection."""
    findings = sorted(_findings(numbers), key=lambda finding: finding.level != "no-go")
    worst = findings[0] if findings and findings[0].level == "no-go" else None
    if worst:
        return Verdict(
            go=False,
            name=worst.name,
            headline=f"No-go: {worst.message}",
            recommendation=worst.recommendation,
            findings=tuple(findings),
        )
    limits = "" if "latent_linear" in numbers["probes"] else " as far as metrics without actions show"
    return Verdict(
        go=True,
        name="healthy",
        headline=f"Go{limits}: {_strengths(numbers)}",
        recommendation=findings[0].recommendation
        if findings
        else "Label data with it and train a latent policy.",
        findings=tuple(findings),
    )


def _findings(numbers: dict[str, Any]) -> Iterator[Finding]:
    """Yield findings from cause to consequence, so that the first one is the cause."""
    if numbers["transitions"] < FEWEST:
        yield Finding(
            name="too_few",
            level="no-go",
            message=f"{numbers['transitions']} held-out transition(s) are too few for an evaluation.",
            recommendation=f"Give data with at least {FEWEST} transitions in episodes that the model was not "
            "trained on, or hold out more.",
        )
        return
    if (collapsed := _collapsed(numbers)) is not None:
        yield collapsed
        return
    blind = numbers["latents"]["future_dependence"] < BLIND_BELOW
    if blind:
        yield Finding(
            name="shuffled_future",
            level="no-go",
            message="latents do not depend on the future frame: they stay the same with a wrong future.",
            recommendation="Check that the model gets the current and the next frame, not the current one "
            "twice, and that both come from the same video.",
        )
    elif _replaces(numbers["leakage"]):
        yield Finding(
            name="shuffled_future",
            level="no-go",
            message="latents encode the whole next frame, even one of another video: the model was trained "
            "on wrong futures, or its bottleneck is so wide that it ignores the current frame.",
            recommendation="Check that current and next frame of every training pair belong together; else "
            "make the bottleneck smaller.",
        )
    ignored = (change := numbers["prediction_change"]) is not None and change < IGNORED_BELOW
    if ignored:
        yield Finding(
            name="ignored",
            level="no-go",
            message="the model ignores its latents: it predicts the same frame with any latent.",
            recommendation="Give the forward model fewer past frames, feed latents to more of its layers, or "
            "weight the loss towards moving regions.",
        )
    if lag := numbers["misaligned"]:
        rows = "row" if abs(lag) == 1 else "rows"
        way = "late" if lag > 0 else "early"
        yield Finding(
            name="off_by_one",
            level="no-go",
            message=f"actions in the data are off by {'one' if abs(lag) == 1 else abs(lag)}: they are "
            f"recorded {abs(lag)} {rows} too {way}; latents predict the action {abs(lag)} {rows} "
            f"{'later' if lag > 0 else 'earlier'} best.",
            recommendation="The model may be fine. Shift the action column by as many rows within each "
            "episode, and inspect again.",
        )
    elif not (blind or ignored):
        yield from _unused(numbers)
    yield from _cautions(numbers)


def _collapsed(numbers: dict[str, Any]) -> Finding | None:
    health, spread = numbers["codebook"], numbers["latents"]["spread"]
    if health and health["size"] > 1 and health["perplexity"] < COLLAPSED_CODES:
        message = f"codes collapsed: the model uses {health['perplexity']:.1f} of {health['size']} codes."
    elif spread < COLLAPSED_SPREAD:
        message = "latents collapsed: they are the same for every transition."
    else:
        return None
    return Finding(
        name="collapsed",
        level="no-go",
        message=message,
        recommendation="Restart dead codes or use a bottleneck without codes (none, fsq), lower the learning "
        "rate, and check that something moves between the two frames.",
    )


def _unused(numbers: dict[str, Any]) -> Iterator[Finding]:
    """Yield findings on latents that vary but help neither the prediction nor a probe."""
    matters, read = _matters(numbers), _readable(numbers)
    if read is False and matters:
        worse = _encodes_nuisance(numbers)
        yield Finding(
            name="nuisance" if worse else "no_action",
            level="no-go",
            message="latents explain the frames, but they "
            + ("encode the moving background or camera instead of" if worse else "do not encode")
            + " the action.",
            recommendation="Train with the actions of a few labeled episodes (labeled_episodes=K with an "
            "action head), or weight the loss towards what the robot moves.",
        )
    elif read and matters is False:
        yield Finding(
            name="unused",
            level="caution",
            message="latents encode the action, but the prediction is no better with the right latent than "
            "with another one.",
            recommendation="Train longer, give the forward model fewer past frames, or weight the loss "
            "towards moving regions.",
        )
    elif not _predicts_future(numbers) and (matters is False or (matters is None and read is False)):
        yield Finding(
            name="shuffled_future",
            level="no-go",
            message="latents do not identify the actual future: they predict no better than latents of "
            "another timestep or of a wrong future.",
            recommendation="Check that current and next frame of every training pair belong together, then "
            "train longer.",
        )
    elif read is False:
        yield Finding(
            name="no_action",
            level="no-go",
            message="latents contain no information about the action beyond the current state.",
            recommendation="Add a few labeled episodes or try a larger frame gap; see the gap curve.",
        )


def _matters(numbers: dict[str, Any]) -> bool | None:
    """Whether a transition's own latent predicts its frame better than another's; None if unknown."""
    if (recon := numbers["reconstruction"]) is None:
        return None
    return recon["shuffled_mse"] > MATTERS_ABOVE * recon["recon_mse"]


def _readable(numbers: dict[str, Any]) -> bool | None:
    """Whether probes on latents beat their controls; None: there are no action probes."""
    return bool(_gains(numbers)) or (False if "latent_linear" in numbers["probes"] else None)


def _predicts_future(numbers: dict[str, Any]) -> bool:
    """Whether latents predict the action better than latents of a wrong future do."""
    probes = numbers["probes"]
    if "latent_linear" not in probes:
        return False
    right = max((probes[name] for name in ("latent_linear", "latent_mlp")), key=lambda probe: probe["score"])
    return right["ci95"][0] > max(0.0, probes["shuffled_future"]["score"]) + GAIN


def _gains(numbers: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return (description, score, floor) of the probes that clearly beat their floors."""
    probes, wrong, gains = numbers["probes"], "shuffled_future", []
    accuracy = "latent_linear" in probes and probes["latent_linear"]["metric"] == "accuracy"
    measure = "of actions" if accuracy else "R2 for actions"
    sets = (
        (f"latents predict {{}} {measure}", ("latent_linear", "latent_mlp"), ("state_only", wrong)),
        (
            f"latents and the current state predict {{}} {measure}",
            ("latent_and_present_linear", "latent_and_present_mlp"),
            ("state_only", wrong),
        ),
        (
            "latents predict {} R2 for the change of the robot's state",
            ("state_change",),
            ("state_change_state_only", "state_change_shuffled_future"),
        ),
    )
    for what, names, floors in sets:
        found = [probes[name] for name in names if name in probes]
        if not found:
            continue
        best = max(found, key=lambda probe: probe["score"])
        floor = max(probes[name]["score"] for name in floors if name in probes)
        if best["ci95"][0] > floor and best["score"] > floor + GAIN:
            gains.append((what, best["score"], floor))
    return gains


def _encodes_nuisance(numbers: dict[str, Any]) -> bool:
    probes = numbers["probes"]
    scores = [probes[name]["score"] for name in ("nuisance_linear", "nuisance_mlp") if name in probes]
    action = probes["latent_linear"]["score"] if "latent_linear" in probes else 0.0
    return bool(scores) and max(scores) > max(0.1, action)


def _cautions(numbers: dict[str, Any]) -> Iterator[Finding]:
    def caution(name: str, message: str, recommendation: str) -> Finding:
        return Finding(name=name, level="caution", message=message, recommendation=recommendation)

    recon, health, leak = numbers["reconstruction"], numbers["codebook"], numbers["leakage"]
    if recon and recon["recon_mse"] >= recon["copy_mse"]:
        yield caution(
            "copies",
            "predictions are no better than copying the last frame.",
            "Train longer, or choose a larger frame gap if little moves between two frames.",
        )
    if health and health["perplexity"] < max(2, FEW_CODES * health["size"]):
        yield caution(
            "few_codes",
            f"only about {health['perplexity']:.1f} of {health['size']} codes are used.",
            "Use a smaller codebook, or restart dead codes.",
        )
    if leak and _mirrors(leak) and not _replaces(leak):
        cut = ""
        if _good_across_cuts(leak):
            cut = f"; across a cut the error is {leak['across_cuts']:.0%} of that of copying"
        content, remedy = "the next state", "Make the bottleneck smaller"
        if numbers["uses_images"]:
            content = "the appearance of the next frame"
            remedy += (
                ", give the model the difference of the frames, or shift and crop both of a pair together"
            )
        yield caution(
            "leaks",
            f"latents encode {content} rather than the motion: forward and backward latents of one step "
            f"agree ({leak['centered']:.2f}){cut}.",
            f"{remedy}.",
        )
    if numbers["probes"] and _encodes_nuisance(numbers):
        yield caution(
            "nuisance",
            "latents encode the moving background or camera more than the action.",
            "Train with the actions of a few labeled episodes, or mask the background in the loss.",
        )


def _replaces(leak: dict[str, Any] | None) -> bool:
    """Whether a latent determines the predicted frame regardless of the current frame."""
    if not leak or leak["across_cuts"] is None:
        return False
    return leak["across_cuts"] < REPLACES_BELOW and leak["centered"] > MIRROR_REPLACES


def _mirrors(leak: dict[str, Any]) -> bool:
    """Whether latents encode the next frame; good predictions across cuts lower the cosine that is required.

    Cuts alone prove nothing: in similar scenes, a jump across a cut is also a motion.
    """
    return leak["centered"] > (MIRROR_WITH_CUTS if _good_across_cuts(leak) else MIRROR_ABOVE)


def _good_across_cuts(leak: dict[str, Any]) -> bool:
    return leak["across_cuts"] is not None and leak["across_cuts"] < LEAKS_BELOW


def _strengths(numbers: dict[str, Any]) -> str:
    sentences, recon = [], numbers["reconstruction"]
    if numbers["probes"] and (gains := _gains(numbers)):
        what, score, floor = gains[0]
        sentences.append(
            f"{what.format(f'{score:.2f}')} on held-out episodes, compared with {floor:.2f} without them"
        )
    if recon and recon["recon_mse"] > 0 and _matters(numbers):
        times = recon["shuffled_mse"] / recon["recon_mse"]
        sentences.append(
            f"the prediction error is {times:.1f} times as large with the latent of another timestep"
        )
    return "; ".join(sentences or ["latents vary, depend on the future and are used"]) + "."
