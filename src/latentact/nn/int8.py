"""Layers with 8-bit integer products, for inference on CPUs with VNNI: about twice as fast as bf16.

Weights have a scale per output channel. Scales of activations are computed per batch for convolutions, and
per row for linear layers, since tokens of a transformer differ greatly in magnitude.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from latentact.device import supports_int8
from latentact.errors import UserError

_SMALLEST = 1 << 14  # number of weights from which a layer gains from int8


def int8[M: nn.Module](model: M) -> M:
    """Return the model with its larger convolutions and linear layers in int8 wherever autocast is on.

    Args:
        model: model on the CPU, for inference. It is not changed; both models share the weights.

    Raises:
        UserError: the model is on another device, or the CPU has no VNNI.
    """
    device = next((each.device.type for each in model.parameters()), "cpu")
    if not supports_int8(device):
        raise UserError(f"int8 must run on a CPU with VNNI, got this {device}. Use bf16.")
    copied = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for layer in copied.modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.weight.numel() < _SMALLEST:
            continue
        if type(layer) is nn.Linear:
            layer.__class__ = _Int8Linear
        elif (
            type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        ):
            layer.__class__ = _Int8Conv2d
    return copied


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights as int8 and their scale per output channel."""
    rows = weight.detach().float().flatten(1)
    scale = rows.abs().amax(1).clamp(min=1e-12) / 127
    return (rows / scale[:, None]).round().to(torch.int8).view_as(weight), scale


def _levels(x: Tensor, scale: float, zero: int) -> Tensor:
    """Return `x / scale + zero` rounded to uint8, with the strides of `x`."""
    rounded = torch.quantize_per_tensor(x.float(), scale, zero, torch.quint8)
    plain = torch.empty(0, dtype=torch.uint8)  # int_repr would copy
    return plain.set_(rounded.untyped_storage(), 0, rounded.shape, rounded.stride())


class _Packed:
    """Mixin with `packed`, the weights in oneDNN's layout, created on first use and never copied."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "packed"}


class _Int8Conv2d(_Packed, nn.Conv2d):
    @cached_property
    def packed(self) -> tuple[tuple[Any, ...], Tensor, Tensor]:
        weight, scale = _rounded(self.weight)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 1, *geometry, None)
        return geometry, packed, scale

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        geometry, packed, scale = self.packed
        low, high = min(input.amin().item(), 0.0), max(input.amax().item(), 0.0)
        step = max(high - low, 1e-12) / 255
        zero = round(-low / step)
        return torch.ops.onednn.qconv2d_pointwise(
            _levels(input, step, zero), step, zero, packed, scale, torch.zeros_like(scale, dtype=torch.int32),
            self.bias, *geometry, 1.0, 0, torch.bfloat16, "none", [], "",
        )  # fmt: skip


class _Int8Linear(_Packed, nn.Linear):
    @cached_property
    def packed(self) -> tuple[Tensor, Tensor]:
        weight, scale = _rounded(self.weight)
        return torch.ops.onednn.qlinear_prepack(weight, None), scale

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        packed, scale = self.packed
        step = torch.maximum(input.amax(-1, keepdim=True), -input.amin(-1, keepdim=True)).clamp(min=1e-12)
        step = (step / 126).bfloat16()  # 126 leaves room for the rounding of the scale
        y = torch.ops.onednn.qlinear_pointwise(
            _levels(input.float() / step, 1.0, 128), 1.0, 128, packed, scale,
            torch.zeros_like(scale, dtype=torch.int32), None, 1.0, 0, torch.bfloat16, "none", [], "",
        ).mul_(step)  # fmt: skip
        return y if self.bias is None else y.add_(self.bias)
