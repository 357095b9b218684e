"""`check_policy`: check that a policy keeps the contract of `policies/contract.py`."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentact.data.samples import PolicyBatch
from latentact.errors import UserError
from latentact.policies.contract import Policy
from latentact.policies.decoder import DecoderConfig
from latentact.types import ActionSpace


def check_policy(policy: Policy) -> None:
    """Check that a policy keeps the contract; its weights and its random state stay as they are.

    Outputs, features and actions must have the right shapes and types, and `forward_with_features` and
    `output_layer` must agree with `forward` and `features`. Evaluation must be deterministic, and
    the samples of a batch independent. The loss must be finite, ignore masked targets and reach every
    trainable parameter. Frames of any size must be accepted, a missing state rejected, and a guide of NaN
    treated as no guide. A saved policy must load bit-equal.

    Args:
        policy: result of `config.build(spec, latent)` of a config that is registered in `POLICIES`.

    Raises:
        UserError: a rule is broken; the message names the first one.
    """
    training = policy.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            policy.eval()
            _check_outputs(policy)
            _check_loss(policy)
            _check_actions(policy)
            _check_checkpoint(policy)
            _check_output_layer(policy)
        finally:
            policy.train(training)
            policy.zero_grad(set_to_none=True)


def random_batch(policy: Policy, batch_size: int = 4, seed: int = 0) -> PolicyBatch:
    """Return random observations and targets in the shapes of the policy's training data."""
    rng, network, spec = np.random.default_rng(seed), policy.config.network, policy.spec
    size, width = (spec.resolution,) * 2, spec.target.num_tokens
    if spec.target.kind == "continuous":
        width = spec.target.size
        target = rng.normal(size=(batch_size, network.chunk_size, width)).astype(np.float32)
    else:
        target = rng.integers(spec.target.size, size=(batch_size, network.chunk_size, width))
    frames = rng.integers(256, size=(batch_size, network.n_obs_steps, spec.channels, *size), dtype=np.uint8)
    state = rng.normal(size=(batch_size, spec.state_size)).astype(np.float32)
    words = rng.integers(2, size=(batch_size, len(spec.words))).astype(np.float32)
    guide = None
    if spec.guide:
        shape = (batch_size, len(spec.guide.offsets), spec.guide.size)
        guide = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    return PolicyBatch(
        frames=torch.from_numpy(frames),
        state=torch.from_numpy(state) if spec.state_size else None,
        words=torch.from_numpy(words),
        target=torch.from_numpy(target),
        mask=torch.ones(batch_size, network.chunk_size, dtype=torch.bool),
        guide=guide,
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _outputs(policy: Policy, batch: PolicyBatch) -> Tensor:
    with torch.no_grad():
        return policy(batch.frames, batch.state, batch.words, batch.guide)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def _check_outputs(policy: Policy) -> None:
    batch, spec = random_batch(policy), policy.spec
    size = len(batch.frames)
    out = _outputs(policy, batch)
    shape = (size, policy.config.network.chunk_size, spec.target.outputs)
    _require(
        out.dtype == torch.float32 and out.shape == shape,
        f"forward must return float32 {list(shape)}, got {_described(out)}.",
    )
    with torch.no_grad():
        features = policy.features(batch.frames, batch.state, batch.words)
    _require(
        features.ndim == 2 and len(features) == size,
        f"features must return [{size}, d], got {_described(features)}.",
    )
    _require(
        torch.equal(out, _outputs(policy, batch)),
        "forward must be deterministic in evaluation mode, got different outputs for the same batch.",
    )
    with torch.no_grad():
        both = policy.forward_with_features(batch.frames, batch.state, batch.words, batch.guide)
    _require(
        _same(both[0], out) and _same(both[1], features),
        "forward_with_features must return the results of forward and features, got others.",
    )
    order = torch.arange(size - 1, -1, -1)
    present = {key: value for key, value in vars(batch).items() if value is not None}
    moved = replace(batch, **{key: value[order] for key, value in present.items()})
    first = replace(batch, **{key: value[:1] for key, value in present.items()})
    _require(
        _same(out[order], _outputs(policy, moved)) and _same(out[:1], _outputs(policy, first)),
        "forward must treat the samples of a batch independently, got outputs that depend on the others.",
    )
    larger = replace(batch, frames=batch.frames.repeat_interleave(2, -1).repeat_interleave(2, -2))
    try:
        resized = _outputs(policy, larger)
    except RuntimeError as error:
        raise UserError(
            f"forward must accept frames of any size (see normal_frames), got {error}."
        ) from error
    _require(resized.shape == shape, f"forward must return {list(shape)} for larger frames, too.")
    if policy.config.network.use_state:
        try:
            _outputs(policy, replace(batch, state=None))
        except UserError:
            pass
        else:
            raise UserError("forward must reject a missing state (see normal_state), got outputs without it.")
    if batch.guide is not None:
        without = _outputs(policy, replace(batch, guide=None))
        hidden = _outputs(policy, replace(batch, guide=torch.full_like(batch.guide, float("nan"))))
        _require(
            torch.equal(without, hidden),
            "forward must treat a guide of NaN as no guide (see normal_guide), got different outputs.",
        )
        _require(
            not torch.equal(without, out),
            "forward must depend on the guide, got the same outputs without it.",
        )


def _check_loss(policy: Policy) -> None:
    batch = random_batch(policy)
    mask = batch.mask.clone()
    mask[-1] = False
    mask[0, 1:] = False
    wrong = batch.target.clone()
    wrong[~mask] = 0 if policy.spec.target.kind == "classes" else float("nan")
    losses = []
    for target in (batch.target, wrong):
        torch.manual_seed(0)
        losses.append(policy.loss(replace(batch, mask=mask, target=target))[0])
    _require(
        torch.equal(*losses),
        f"loss must ignore masked targets, got {losses[0].item():.4g} and {losses[1].item():.4g} for targets "
        f"that differ in masked steps only.",
    )
    policy.train()
    policy.zero_grad(set_to_none=True)
    loss, metrics = policy.loss(batch)
    _require(
        loss.ndim == 0 and bool(loss.isfinite()) and isinstance(metrics, dict),
        f"loss must return a finite scalar and metrics, got {_described(loss)}.",
    )
    loss.backward()
    unused = [
        name
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad and parameter.grad is None and not name.startswith("decoder.")
    ]
    policy.eval()
    _require(
        not unused,
        f"loss must reach every trainable parameter, got no gradient for {', '.join(unused)}. Set "
        f"requires_grad to False where that is intended.",
    )


def _check_actions(policy: Policy) -> None:
    if policy.spec.action_space is None:
        policy = policy.ground(DecoderConfig(hidden=()), ActionSpace(kind="discrete", size=3)).eval()
    space, batch = policy.spec.action_space, random_batch(policy)
    assert space is not None
    steps = policy.config.network.chunk_size * policy.spec.stride
    shape = (len(batch.frames), steps) if space.discrete else (len(batch.frames), steps, space.size)
    dtype = np.int64 if space.discrete else np.float32
    actions = policy.actions(batch)
    _require(
        actions.shape == shape and actions.dtype == dtype,
        f"actions must be {np.dtype(dtype).name} {list(shape)}, got {actions.dtype} {list(actions.shape)}.",
    )


def _check_checkpoint(policy: Policy) -> None:
    batch = random_batch(policy)
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(Path(folder) / "policy")
        loaded = Policy.from_pretrained(Path(folder) / "policy")
    _require(
        (loaded.config, loaded.spec, loaded.latent) == (policy.config, policy.spec, policy.latent)
        and torch.equal(_outputs(loaded, batch), _outputs(policy, batch)),
        "a saved policy must load bit-equal, got different outputs. Keep all state in parameters and "
        "buffers, and all settings in the config.",
    )


@torch.no_grad()
def _check_output_layer(policy: Policy) -> None:
    if policy.output_layer is None:
        return
    policy = copy.deepcopy(policy)
    assert policy.output_layer is not None
    for parameter in policy.output_layer.parameters():
        parameter.zero_()
    _require(
        not _outputs(policy, random_batch(policy)).any(),
        "output_layer must be the layer that forward ends with, got outputs other than 0 for weights of 0.",
    )


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
