"""Cost of training a vision-language-action model, computed from its configuration: `--dry-run`.

The model is built on the meta device, without memory. States are exact; activations, FLOPs and hours are
estimates: attention scores are left out (sequences are short), a backward pass counts as two forward passes,
of which frozen weights need one at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentact.policies.vla.backbone import TINY, load_config, tiny, unused_parameters, vision_parameters
from latentact.policies.vla.model import Vla, VlaConfig, VlaSpec
from latentact.types import LatentActionSpec

LAPA = LatentActionSpec(
    model="laq",
    tokens=4,
    token_dim=32,
    codebook_size=8,
    frame_gap=1,
    frame_gap_s=0.6,
    fps=0.0,
    resolution=256,
    camera="",
)
"""Latent actions like LAPA's, for a plan without labels."""
_TASK = "put the red block into the drawer"
_TEMPLATE_TOKENS = 20
_TRAINED_BYTES, _FROZEN_BYTES = 16, 4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes, memory and time of a training."""

    vlm: str
    """The vision-language model."""
    vision: int
    """Parameters of the vision tower."""
    text: int
    """Parameters of the language model and its connection to the vision tower."""
    own: int
    """Parameters of our part and of adapters."""
    trained: int
    """Parameters that are trained."""
    state_bytes: int
    """Bytes of weights, gradients and AdamW's averages in fp32, over all devices."""
    state_bytes_all_trained: int
    """The same with every parameter of the vision-language model trained."""
    gathered_bytes: int
    """Bytes of unsharded weights on each device: the largest block, and parameters outside of blocks."""
    copy_bytes: int
    """Bytes of the bf16 copies of trained weights that autocast keeps for the backward pass, per device."""
    activation_bytes: int
    """Estimated bytes of activations per device."""
    devices: int
    """Devices."""
    device_bytes: int
    """Bytes of memory per device: states, gathered weights, copies and activations."""
    sequence: int
    """Positions per sample: image, prompt and latent action."""
    tokens_per_step: int
    """Positions per step, over all devices."""
    flops_per_step: float
    """Floating-point operations per step, over all devices."""
    steps: int
    """Optimizer steps."""
    tflops: float
    """Sustained TFLOP/s of each device."""
    hours: float
    """Estimated hours of training."""

    def __str__(self) -> str:
        """Human-readable form, one fact per line."""
        gb, devices = 1e9, f"{self.devices} device{'s' * (self.devices > 1)}"
        vision, text, own, trained = map(_millions, (self.vision, self.text, self.own, self.trained))
        return "\n".join(
            [
                f"model           {self.vlm}",
                f"parameters      vision {vision}, text {text}, ours {own}; {trained} are trained",
                f"states          {self.state_bytes / gb:.1f} GB (fp32 weights, gradients, AdamW); "
                f"{self.state_bytes_all_trained / gb:.1f} GB if all were trained",
                f"memory          {self.device_bytes / gb:.1f} GB on each of {devices} "
                f"(gathered weights {self.gathered_bytes / gb:.1f} GB, bf16 copies "
                f"{self.copy_bytes / gb:.1f} GB, activations about {self.activation_bytes / gb:.1f} GB)",
                f"tokens          {self.sequence} per sample, {self.tokens_per_step:,} per step",
                f"FLOPs           {self.flops_per_step:.3g} per step",
                f"time            {self.hours:.1f} h for {self.steps:,} steps at {self.tflops:g} TFLOP/s per "
                f"device ({self.hours * self.devices:.0f} device-hours)",
            ]
        )


def plan(
    config: VlaConfig,
    latent: LatentActionSpec,
    *,
    resolution: int,
    task: str,
    batch_size: int,
    steps: int,
    devices: int,
    accumulate: int,
    sharded: bool,
    bf16: bool,
    tflops: float,
) -> Plan:
    """Return the plan of a training.

    Args:
        config: the model.
        latent: spec of the latent actions.
        resolution: height and width of the images in pixels.
        task: a long task text; empty: a typical one.
        batch_size: samples per step, over all devices.
        steps: optimizer steps.
        devices: number of devices.
        accumulate: slices of a step, processed one after another.
        sharded: whether the states are spread over the devices.
        bf16: whether activations are bf16.
        tflops: sustained TFLOP/s of each device.

    Raises:
        UserError: the configuration of the model cannot be read.
    """
    vlm_config = load_config(config.vlm)
    model = _build(config, latent, vlm_config, resolution)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    vision = sum(p.numel() for p in vision_parameters(model.vlm))
    own = sum(n for name, n in sizes.items() if name.startswith("own.") or "lora_" in name)
    total = sum(sizes.values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = _TRAINED_BYTES * trained + _FROZEN_BYTES * (total - trained)

    image, patches = _image_tokens(vlm_config, resolution)
    prompt = config.prompt.replace("{task}", task or _TASK)
    words = len(prompt.encode()) if config.vlm == TINY else len(prompt) // 4 + _TEMPLATE_TOKENS
    sequence = image + words + latent.tokens + config.use_state
    samples = batch_size // (devices * accumulate)

    text_config = vlm_config.get_text_config()
    bytes_each = 2 if bf16 else 4
    rows = samples * sequence * text_config.hidden_size * bytes_each
    per_layer = 34  # values kept per position and hidden unit in a layer (Korthikanti et al., 2205.05198)
    layers = text_config.num_hidden_layers
    activations = rows * (layers + per_layer) if config.gradient_checkpointing else rows * layers * per_layer
    gathered = 4 * _gathered(model) if sharded else 0
    copies = 2 * trained if bf16 and not sharded else 0

    embedding = model.vlm.get_input_embeddings().weight.numel()
    unused = sum(p.numel() for p in unused_parameters(model.vlm))
    blocks = total - own - vision - embedding - unused  # the weights that multiply every position
    again = config.gradient_checkpointing
    text_passes = 2 * ((2 if config.lora_rank else 3) + again)
    vision_passes = 2 * (1 if config.freeze_vision or config.lora_rank else 3 + again)
    flops = float(batch_size * (text_passes * blocks * sequence + vision_passes * vision * patches))
    return Plan(
        vlm=config.vlm,
        vision=vision,
        text=total - vision - own,
        own=own,
        trained=trained,
        state_bytes=state,
        state_bytes_all_trained=_TRAINED_BYTES * total,
        gathered_bytes=gathered,
        copy_bytes=copies,
        activation_bytes=activations,
        devices=devices,
        device_bytes=state // (devices if sharded else 1) + gathered + copies + activations,
        sequence=sequence,
        tokens_per_step=sequence * batch_size,
        flops_per_step=flops,
        steps=steps,
        tflops=tflops,
        hours=steps * flops / (devices * tflops * 1e12) / 3600,
    )


def _build(config: VlaConfig, latent: LatentActionSpec, vlm_config: Any, resolution: int) -> Vla:
    """Return the model on the meta device."""
    from transformers import AutoModelForImageTextToText

    processor = tiny()[1]  # instead of a processor that would have to be downloaded
    with torch.device("meta"):
        vlm = AutoModelForImageTextToText.from_config(vlm_config)
        spec = VlaSpec(resolution=resolution, state_size=8 if config.use_state else 0)
        return Vla(config, spec, latent, vlm, processor)


def _image_tokens(config: Any, resolution: int) -> tuple[int, int]:
    """Return the positions of an image in the language model, and its patches in the vision tower."""
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):  # Qwen: from the size of the image
        side = max(1, round(resolution / (vision.patch_size * vision.spatial_merge_size)))
        return side**2, (side * vision.spatial_merge_size) ** 2
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches // getattr(config, "scale_factor", 1) ** 2, patches


def _gathered(model: Vla) -> int:
    """Return the parameters outside of blocks and of two blocks: one computes, the next is fetched."""
    blocks = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return outside + 2 * max((_count(block) for block in blocks), default=0)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f} M" if count < 10**9 else f"{count / 1e9:.3f} B"


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
