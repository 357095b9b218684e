"""`check_lam`: check that a latent action model keeps its contract, as Gymnasium's `check_env` does."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentact.errors import UserError
from latentact.lams.contract import LAMS, LatentActionModel, load_lam
from latentact.types import Clip, LatentActions, LatentActionSpec

_CLOSE = 1e-4


def check_lam(model: LatentActionModel, clip: Clip | None = None) -> None:
    """Check that a latent action model keeps the contract of `LatentActionModel`; the model is not changed.

    Args:
        model: built from a registered config, on the CPU.
        clip: a batch of at least 4 clips of `context + 1 + horizon` frames, with all inputs of the model's
            loss; None: random color frames, states and actions.

    Raises:
        UserError: a rule is broken; the message names it.
    """
    kind = model.config.kind
    _require(
        kind in LAMS.names() and LAMS.get(kind) is type(model.config),
        f"the config must be registered with LAMS.register({kind!r})",
        f"another {type(model.config).__name__}",
    )
    clip = clip or random_clip(model)
    model = deepcopy(model).eval()
    for check in (
        _settings,
        _shapes,
        _transitions,
        _padding,
        _batch,
        _states,
        _forward,
        _training,
        _augmented,
        _saved,
    ):
        check(model, clip)


def random_clip(model: LatentActionModel, batch: int = 8, size: int = 32) -> Clip:
    """Return random clips of color frames with the states, actions and features that the model needs."""
    generator = torch.Generator().manual_seed(0)
    t = model.context + 1 + model.horizon
    actions, target = model.actions, model.config.target
    action = None
    if actions is not None:
        values = torch.randn(batch, actions.size, generator=generator)
        action = values.argmax(1) if actions.discrete else values
    features = target.size if target is not None else 0
    return Clip(
        frames=torch.randint(0, 256, (batch, t, 3, size, size), dtype=torch.uint8, generator=generator),
        valid=torch.ones(batch, t, dtype=torch.bool),
        index=torch.arange(batch),
        action=action,
        labeled=None if action is None else torch.ones(batch, dtype=torch.bool),
        states=torch.randn(batch, t, model.state_size or 3, generator=generator),
        features=torch.randn(batch, t, features, generator=generator) if features else None,
    )


def _require(holds: bool, rule: str, got: object = "another result") -> None:
    if not holds:
        raise UserError(f"check_lam: {rule}, got {got}.")


def _encode(
    model: LatentActionModel, clip: Clip, valid: Tensor | None = None, last: bool = False
) -> LatentActions:
    return model.encode(clip.frames, valid, last=last, states=clip.states if model.state_size else None)


def _rows(clip: Clip, batch: Tensor | slice, time: Tensor | slice = slice(None)) -> Clip:
    """Return some clips of a batch, and some of their frames."""
    return Clip(
        frames=clip.frames[batch][:, time],
        valid=clip.valid[batch][:, time],
        index=clip.index[batch],
        states=None if clip.states is None else clip.states[batch][:, time],
    )


def _same(a: LatentActions, b: LatentActions, rows: Tensor | slice = slice(None)) -> bool:
    """Return whether latent actions before the quantizer agree within rounding."""
    return torch.allclose(a.continuous[rows], b.continuous[rows], rtol=_CLOSE, atol=_CLOSE)


def _settings(model: LatentActionModel, clip: Clip) -> None:
    config, spec = model.config, model.spec
    _require(isinstance(spec, LatentActionSpec), "spec must be a LatentActionSpec", type(spec).__name__)
    _require(
        spec.model == config.kind, f"spec.model must be the registered name {config.kind!r}", repr(spec.model)
    )
    _require(
        callable(getattr(config, "with_action_head", None)),
        "the config must have a method with_action_head(weight) that returns a config or None",
        "none",
    )
    head = config.with_action_head(1.0)
    _require(
        head is None or type(head) is type(config),
        f"with_action_head must return a {type(config).__name__} or None",
        type(head).__name__,
    )
    names = inspect.signature(model.encode).parameters
    missing = [name for name in ("frames", "valid", "last", "states") if name not in names]
    _require(not missing, "encode must take frames, valid, last and states", f"no {', '.join(missing)}")


def _shapes(model: LatentActionModel, clip: Clip) -> None:
    spec, (b, t) = model.spec, clip.valid.shape
    latent = _encode(model, clip)
    shape = (b, t - 1, spec.tokens, spec.token_dim)
    for name in ("vectors", "continuous"):
        value = getattr(latent, name)
        _require(tuple(value.shape) == shape, f"{name} must be {list(shape)}", list(value.shape))
        _require(value.dtype == torch.float32, f"{name} must be float32", value.dtype)
        _require(bool(value.isfinite().all()), f"{name} must be finite", "NaN or infinite values")
    _require(
        latent.valid.shape == (b, t - 1) and bool(latent.valid.all()), "valid must be true for valid frames"
    )
    codes = latent.codes
    _require(
        (codes is None) == (spec.codebook_size is None),
        "codes must be given exactly if spec.codebook_size is set",
        f"codebook_size={spec.codebook_size} and {'no ' if codes is None else ''}codes",
    )
    if codes is not None and spec.codebook_size is not None:
        _require(tuple(codes.shape) == shape[:3], f"codes must be {list(shape[:3])}", list(codes.shape))
        low, high = int(codes.min()), int(codes.max())
        _require(
            codes.dtype == torch.int64 and 0 <= low <= high < spec.codebook_size,
            f"codes must be int64 from 0 to {spec.codebook_size - 1}",
            f"{codes.dtype} from {low} to {high}",
        )


def _transitions(model: LatentActionModel, clip: Clip) -> None:
    whole, last = _encode(model, clip), _encode(model, clip, last=True)
    _require(last.vectors.shape[1] == 1, "encode with last must return one transition", last.vectors.shape[1])
    _require(
        torch.allclose(last.continuous, whole.continuous[:, -1:], rtol=_CLOSE, atol=_CLOSE),
        "encode with last must return the last transition",
    )
    single = _encode(model, _rows(clip, slice(None), slice(0, 1)))
    _require(single.vectors.shape[1] == 0, "a single frame must have no transition", single.vectors.shape[1])


def _padding(model: LatentActionModel, clip: Clip) -> None:
    valid = clip.valid.clone()
    valid[1:3, 0] = False
    other = Clip(
        frames=torch.where(valid[..., None, None, None], clip.frames, clip.frames.flip(0)),
        valid=valid,
        index=clip.index,
        states=clip.states,
    )
    one, two = _encode(model, clip, valid), _encode(model, other, valid)
    expected = valid[:, 1:] & valid[:, :-1]
    _require(torch.equal(one.valid, expected), "a transition must be valid exactly if both of its frames are")
    _require(_same(one, two, expected), "frames that are not valid must not change the latent actions")


def _batch(model: LatentActionModel, clip: Clip) -> None:
    first = _encode(model, clip)
    _require(
        torch.equal(first.vectors, _encode(model, clip).vectors), "encode must be deterministic in eval mode"
    )
    order = torch.arange(len(clip.index) // 2).flip(0)
    part = _encode(model, _rows(clip, order))
    _require(
        torch.allclose(part.continuous, first.continuous[order], rtol=_CLOSE, atol=_CLOSE),
        "clips of a batch must not influence each other",
    )


def _states(model: LatentActionModel, clip: Clip) -> None:
    if model.state_size:
        _refuses(
            lambda: model.encode(clip.frames),
            "encode of a model with state_size must raise a UserError without states",
        )
    else:
        states = torch.zeros(*clip.valid.shape, 2)
        _require(
            torch.equal(model.encode(clip.frames, states=states).vectors, _encode(model, clip).vectors),
            "encode of a model without state_size must ignore states",
        )


def _forward(model: LatentActionModel, clip: Clip) -> None:
    past, vectors = clip.frames[:, : model.context + 1], _encode(model, clip).vectors[:, model.context]
    if not model.generative:
        _refuses(
            lambda: model.predict(past, vectors),
            "predict must raise a UserError if the model is not generative",
        )
        return
    predicted = model.predict(past, vectors)
    shape = (len(past), past.shape[2], model.spec.resolution, model.spec.resolution)
    _require(tuple(predicted.shape) == shape, f"predict must return {list(shape)}", list(predicted.shape))
    _require(predicted.dtype == torch.uint8, "predict must return uint8", predicted.dtype)


def _saved(model: LatentActionModel, clip: Clip) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "lam")
        loaded = load_lam(Path(folder) / "lam")
    _require(loaded.spec == model.spec, "a loaded model must have the spec of the saved one", loaded.spec)
    _require(
        torch.equal(_encode(loaded, clip).vectors, _encode(model, clip).vectors),
        "a loaded model must encode as the saved one",
    )


def _training(model: LatentActionModel, clip: Clip) -> None:
    trained = deepcopy(model).train()
    loss, metrics = trained.loss(clip)
    _require(loss.ndim == 0 and bool(loss.isfinite()), "loss must be a finite scalar", loss.tolist())
    graph = [name for name, value in metrics.items() if value.requires_grad]
    _require(not graph, "metrics must not require gradients", ", ".join(graph))
    loss.backward()
    learned = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    unused = [name for name, p in learned.items() if p.grad is None or not bool(p.grad.abs().sum())]
    _require(
        not unused,
        "every parameter must get a gradient from loss or be frozen with requires_grad_(False)",
        f"none for {', '.join(unused[:3])}",
    )


def _augmented(model: LatentActionModel, clip: Clip) -> None:
    """Check that the loss takes the inputs that `augments` names."""
    size = 0 if clip.states is None else clip.states.shape[2]
    inputs: dict[str, Any] = {
        "frames": {"observed": 255 - clip.frames},
        "state": {"state_noise": torch.ones(len(clip.frames), size)},
    }
    plain = _loss(model, clip)
    for name in model.augments:
        changed = _loss(model, replace(clip, **inputs[name]))
        _require(changed != plain, f"loss must depend on augmented {name}, which `augments` names", changed)


def _loss(model: LatentActionModel, clip: Clip) -> float:
    torch.manual_seed(0)
    with torch.no_grad():
        return float(deepcopy(model).train().loss(clip)[0])


def _refuses(call: Callable[[], object], rule: str) -> None:
    try:
        call()
    except UserError:
        return
    raise UserError(f"check_lam: {rule}, got a result.")
