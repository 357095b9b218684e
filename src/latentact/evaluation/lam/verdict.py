"""Go or no-go: what the numbers of an inspection mean, in plain words, and what to try next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

FEWEST = 8  # transitions
COLLAPSED_SPREAD = 1e-3  # deviation of latents over their size
COLLAPSED_CODES = 1.5  # perplexity of the codes
FEW_CODES = 0.1  # perplexity over codebook size
BLIND_BELOW = 0.05  # how far a wrong future moves a latent, in distances between latents
IGNORED_BELOW = 0.02  # change of a prediction by another latent, over what changes in the video
MATTERS_ABOVE = 1.2  # prediction error with another's latent over that with its own
GAIN = 0.02  # by which a probe must pass its floor, besides its interval
LEAKS_BELOW = 0.5  # error across a cut over that of copying
REPLACES_BELOW = 0.2  # the same, where a latent replaces the picture
MIRROR_ABOVE = 0.9  # centered cosine of forward and backward latents of one frame
MIRROR_REPLACES = 0.8  # the same, where a latent replaces the picture
MIRROR_WITH_CUTS = 0.5  # the same, where pictures across cuts are good


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a person should know."""

    name: str
    """What it is called in `inspect.json`: collapsed, ignored, off_by_one, shuffled_future, ..."""
    level: Literal["no-go", "caution"]
    """Whether it alone forbids to go on."""
    said: str
    """What was found."""
    next: str
    """What to try."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgment of a latent action model."""

    go: bool
    """Whether to go on with it."""
    name: str
    """`healthy`, or the name of the finding that forbids to go on."""
    headline: str
    """One sentence."""
    next: str
    """What to do now."""
    findings: tuple[Finding, ...]
    """The worst first."""

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as it stands in `inspect.json`."""
        return {**asdict(self), "findings": [asdict(finding) for finding in self.findings]}


def judge(numbers: dict[str, Any]) -> Verdict:
    """Return what the numbers of an inspection mean."""
    findings = sorted(_findings(numbers), key=lambda finding: finding.level != "no-go")
    worst = findings[0] if findings and findings[0].level == "no-go" else None
    if worst:
        return Verdict(
            go=False,
            name=worst.name,
            headline=f"No-go: {worst.said}",
            next=worst.next,
            findings=tuple(findings),
        )
    limits = "" if "latent_linear" in numbers["probes"] else " as far as can be told without actions"
    return Verdict(
        go=True,
        name="healthy",
        headline=f"Go{limits}: {_praise(numbers)}",
        next=findings[0].next if findings else "Label data with it and train a latent policy.",
        findings=tuple(findings),
    )


def _findings(numbers: dict[str, Any]) -> Iterator[Finding]:
    """Yield findings in the order in which one explains the next, so that the first names the cause."""
    if numbers["transitions"] < FEWEST:
        yield Finding(
            name="too_few",
            level="no-go",
            said=f"{numbers['transitions']} held-out transition(s) are too few to judge anything by.",
            next=f"Give data with at least {FEWEST} transitions in episodes that the model was not trained "
            "on, or hold out more.",
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
            said="latents do not depend on the future frame: with a wrong future they stay the same.",
            next="Check that the model is given the next frame, not the current one twice, and that pairs "
            "come from the same video.",
        )
    elif _replaces(numbers["leakage"]):
        yield Finding(
            name="shuffled_future",
            level="no-go",
            said="latents hold the whole next picture, also that of another video: the model was trained on "
            "wrong futures, or its bottleneck is so wide that it need not look at the present.",
            next="Check that current and next frame of every training pair belong together; else make the "
            "bottleneck smaller.",
        )
    ignored = (change := numbers["prediction_change"]) is not None and change < IGNORED_BELOW
    if ignored:
        yield Finding(
            name="ignored",
            level="no-go",
            said="the model ignores its latents: with another moment's latent it predicts the same frame.",
            next="Give the forward model fewer past frames, feed latents to more of its layers, or weight "
            "the loss where something moves.",
        )
    if lag := numbers["misaligned"]:
        rows = "row" if abs(lag) == 1 else "rows"
        way = "late" if lag > 0 else "early"
        yield Finding(
            name="off_by_one",
            level="no-go",
            said=f"actions in the data are off by {'one' if abs(lag) == 1 else abs(lag)}: they are recorded "
            f"{abs(lag)} {rows} too {way}, because latents tell the action {abs(lag)} {rows} "
            f"{'later' if lag > 0 else 'before'} best.",
            next="The model may be fine. Shift the action column by as many rows within each episode, and "
            "inspect again.",
        )
    elif not (blind or ignored):
        yield from _unread(numbers)
    yield from _cautions(numbers)


def _collapsed(numbers: dict[str, Any]) -> Finding | None:
    health, spread = numbers["codebook"], numbers["latents"]["spread"]
    if health and health["size"] > 1 and health["perplexity"] < COLLAPSED_CODES:
        said = f"codes collapsed: of {health['size']} codes the model really uses {health['perplexity']:.1f}."
    elif spread < COLLAPSED_SPREAD:
        said = "latents collapsed: they are the same for every transition."
    else:
        return None
    return Finding(
        name="collapsed",
        level="no-go",
        said=said,
        next="Restart dead codes or take a bottleneck without codes (none, fsq), lower the learning rate, "
        "and check that something moves between the two frames.",
    )


def _unread(numbers: dict[str, Any]) -> Iterator[Finding]:
    """What it means that latents vary and neither the picture nor a probe can make use of them."""
    matters, read = _matters(numbers), _read(numbers)
    if read is False and matters:
        worse = _tells_nuisance(numbers)
        yield Finding(
            name="nuisance" if worse else "no_action",
            level="no-go",
            said="latents explain the picture, but tell "
            + ("the moving background or camera instead of" if worse else "nothing about")
            + " the action.",
            next="Train with the actions of a few labeled episodes (labeled_episodes=K with an action "
            "head), or weight the loss towards what the robot moves.",
        )
    elif read and matters is False:
        yield Finding(
            name="unused",
            level="caution",
            said="latents tell the action, but the prediction is no better with the right one than with "
            "another's.",
            next="Train longer, give the forward model fewer past frames, or weight the loss where something "
            "moves.",
        )
    elif not _tells_future(numbers) and (matters is False or (matters is None and read is False)):
        yield Finding(
            name="shuffled_future",
            level="no-go",
            said="latents do not say which future came true: they are worth no more than those of another "
            "moment or of a wrong future.",
            next="Check that current and next frame of every training pair belong together, then train "
            "longer.",
        )
    elif read is False:
        yield Finding(
            name="no_action",
            level="no-go",
            said="latents tell nothing about the action that the present does not tell already.",
            next="Add a few labeled episodes or try a larger frame gap; see the gap curve.",
        )


def _matters(numbers: dict[str, Any]) -> bool | None:
    """Whether a transition's own latent predicts its frame better than another's; None: nothing predicts."""
    if (recon := numbers["reconstruction"]) is None:
        return None
    return recon["shuffled_mse"] > MATTERS_ABOVE * recon["recon_mse"]


def _read(numbers: dict[str, Any]) -> bool | None:
    """Whether probes read from latents what controls cannot tell; None: there are no probes of actions."""
    return bool(_gains(numbers)) or (False if "latent_linear" in numbers["probes"] else None)


def _tells_future(numbers: dict[str, Any]) -> bool:
    """Whether latents tell the action better than those of a wrong future do, whatever the present tells."""
    probes = numbers["probes"]
    if "latent_linear" not in probes:
        return False
    right = max((probes[name] for name in ("latent_linear", "latent_mlp")), key=lambda probe: probe["score"])
    return right["ci95"][0] > max(0.0, probes["shuffled_future"]["score"]) + GAIN


def _gains(numbers: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What probes read from latents, how well, and how well without them; only what is clearly better."""
    probes, wrong, gains = numbers["probes"], "shuffled_future", []
    accuracy = "latent_linear" in probes and probes["latent_linear"]["metric"] == "accuracy"
    measure = "of actions" if accuracy else "R2 for actions"
    sets = (
        (f"latents tell {{}} {measure}", ("latent_linear", "latent_mlp"), ("state_only", wrong)),
        (
            f"latents and the present tell {{}} {measure}",
            ("latent_and_present_linear", "latent_and_present_mlp"),
            ("state_only", wrong),
        ),
        (
            "latents tell {} R2 for how the robot's state changes",
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


def _tells_nuisance(numbers: dict[str, Any]) -> bool:
    probes = numbers["probes"]
    said = [probes[name]["score"] for name in ("nuisance_linear", "nuisance_mlp") if name in probes]
    action = probes["latent_linear"]["score"] if "latent_linear" in probes else 0.0
    return bool(said) and max(said) > max(0.1, action)


def _cautions(numbers: dict[str, Any]) -> Iterator[Finding]:
    def caution(name: str, said: str, next_step: str) -> Finding:
        return Finding(name=name, level="caution", said=said, next=next_step)

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
            f"only about {health['perplexity']:.1f} of {health['size']} codes are in play.",
            "Take a smaller codebook, or restart dead codes.",
        )
    if leak and _mirrors(leak) and not _replaces(leak):
        cut = ""
        if _good_across_cuts(leak):
            cut = f"; across a cut the error is {leak['across_cuts']:.0%} of that of copying"
        told, remedy = "the next state", "Make the bottleneck smaller"
        if numbers["sees"]:
            told = "what the next frame looks like"
            remedy += (
                ", give the model the difference of the frames, or shift and crop both of a pair together"
            )
        yield caution(
            "leaks",
            f"latents tell {told} rather than what moved: from its past and back from its future they agree "
            f"({leak['centered']:.2f}){cut}.",
            f"{remedy}.",
        )
    if numbers["probes"] and _tells_nuisance(numbers):
        yield caution(
            "nuisance",
            "latents tell more about the moving background or camera than about the action.",
            "Train with the actions of a few labeled episodes, or mask the background in the loss.",
        )


def _replaces(leak: dict[str, Any] | None) -> bool:
    """Whether any picture comes out of a latent, whatever it is applied to."""
    if not leak or leak["across_cuts"] is None:
        return False
    return leak["across_cuts"] < REPLACES_BELOW and leak["centered"] > MIRROR_REPLACES


def _mirrors(leak: dict[str, Any]) -> bool:
    """Whether latents carry the picture: alone a cosine must be high, with good pictures across cuts less so.

    Cuts alone prove nothing: where scenes are alike, a jump across a cut is a motion too.
    """
    return leak["centered"] > (MIRROR_WITH_CUTS if _good_across_cuts(leak) else MIRROR_ABOVE)


def _good_across_cuts(leak: dict[str, Any]) -> bool:
    return leak["across_cuts"] is not None and leak["across_cuts"] < LEAKS_BELOW


def _praise(numbers: dict[str, Any]) -> str:
    said, recon = [], numbers["reconstruction"]
    if numbers["probes"] and (gains := _gains(numbers)):
        what, score, floor = gains[0]
        said.append(f"{what.format(f'{score:.2f}')} on held-out episodes, against {floor:.2f} without them")
    if recon and recon["recon_mse"] > 0 and _matters(numbers):
        times = recon["shuffled_mse"] / recon["recon_mse"]
        said.append(f"with another moment's latent the prediction error is {times:.1f} times as large")
    return "; ".join(said or ["latents vary, depend on the future and are used"]) + "."
