"""Training step of vision-language-action models: time and memory on this machine, beside the dry run's plan.

Random weights of the published sizes, so nothing is downloaded; images and task texts are random. A step is
loss, backward pass, clipping and AdamW, in bf16 with fp32 weights as in `train-vla`. Memory is the peak of
the allocator, planned memory that of `train-vla --dry-run` for one device.

    python benchmarks/vla_step.py [--device cuda] [--models vla_2b vla_2b_full] [--batch 64] [--compile]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from latentact.composition import load_experiment
from latentact.device import keep_freed_memory
from latentact.policies.vla.backbone import byte_tokenizer, load_config, set_resolution, tiny
from latentact.policies.vla.model import Vla, VlaConfig, VlaSpec
from latentact.policies.vla.plan import LAPA, Plan, plan
from latentact.policies.vla.samples import VlaBatch
from latentact.stages.train_vla import TrainVlaConfig
from latentact.training.loop import compiled as compiled_loss

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vla_debug": ("vla_debug", {}),
    "vla_2b": ("vla_2b", {}),
    "vla_2b_full": ("vla_2b", {"lora_rank": 0}),
    "vla_2b_full_kept": ("vla_2b", {"lora_rank": 0, "gradient_checkpointing": False}),
    "vla_7b_adapters": ("vla_7b", {"lora_rank": 32}),
}
"""Experiment of `train-vla`, and settings of its model that differ."""
TEMPLATE = 20
"""Tokens of a prompt that the plan adds to a quarter of its characters."""
MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def main() -> None:
    """Print one row per model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=[m for m in MODELS if m != "vla_debug"]
    )
    parser.add_argument("--batch", type=int, default=64, help="samples of a step")
    parser.add_argument("--prompt-tokens", type=int, default=75, help="tokens of the prompt, at least 21")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    options = parser.parse_args()
    keep_freed_memory()
    print("| model | compiled | trained | step | samples/s | TFLOP/s | memory | planned |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        for compiled in (False, True) if options.compile else (False,):
            print(row(name, compiled, options), flush=True)
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()


def row(name: str, compiled: bool, options: argparse.Namespace) -> str:
    """Measure one model and return its row."""
    experiment, changes = MODELS[name]
    config: Any = load_experiment("train_vla", TrainVlaConfig, [f"experiment={experiment}"])
    settings, resolution = replace(config.model, prompt="{task}", **changes), config.resolution or 224
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model = random_model(settings, resolution, options.device)
    batch = random_batch(model, options.batch, options.prompt_tokens).to(options.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    loss = compiled_loss(model.loss) if compiled else model.loss

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16):
            error, _ = loss(batch)
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()

    times = []
    for _ in range(options.repeats + 2):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    seconds = statistics.median(times[2:])
    planned = planned_cost(settings, resolution, options.batch, options.prompt_tokens)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else "-"
    cells = (
        *(name, "yes" if compiled else "no", f"{trained / 1e6:,.1f} M", f"{seconds:.3g} s"),
        *(f"{options.batch / seconds:.3g}", f"{planned.flops_per_step / seconds / 1e12:.3g}"),
        *(memory, f"{planned.device_bytes / 1e9:.1f} GB"),
    )
    return f"| {' | '.join(cells)} |"


def random_model(config: VlaConfig, resolution: int, device: str) -> Vla:
    """Return a model with random weights on a device, with a byte tokenizer instead of the published one."""
    from transformers import (
        AutoModelForImageTextToText,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
    )

    torch.manual_seed(0)
    spec = VlaSpec(resolution=resolution)
    if config.vlm == "tiny":
        return Vla(config, spec, LAPA, *tiny()).to(device)
    vlm, tokenizer = load_config(config.vlm), byte_tokenizer(MARKS)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    for name, value in zip(names, tokenizer.convert_tokens_to_ids([*MARKS]), strict=True):
        setattr(vlm, name, value)
    vision = vlm.vision_config
    sizes: dict[str, Any] = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    kind = Qwen3VLProcessor if vlm.model_type == "qwen3_vl" else Qwen2_5_VLProcessor
    processor = kind(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
    )
    tokenizer.padding_side = "left"
    set_resolution(processor, resolution)
    with torch.device(device):
        return Vla(config, spec, LAPA, AutoModelForImageTextToText.from_config(vlm), processor)


def random_batch(model: Vla, size: int, tokens: int) -> VlaBatch:
    """Return random images and codes, and a prompt of `tokens` tokens, with the two marks of the image."""
    side = model.spec.resolution
    frames = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8)
    return VlaBatch(
        inputs=model.prepare_inputs(frames, ["a" * (tokens - 2)] * size),
        state=None,
        latent=torch.randint(0, LAPA.codebook_size or 1, (size, LAPA.tokens)),
        latent_mask=torch.ones(size, dtype=torch.bool),
        actions=None,
        action_mask=None,
    )


def planned_cost(config: VlaConfig, resolution: int, batch: int, tokens: int) -> Plan:
    """Return what `train-vla --dry-run` plans for one device."""
    return plan(
        config,
        LAPA,
        resolution=resolution,
        task="a" * 4 * (tokens - TEMPLATE),
        batch_size=batch,
        steps=1,
        devices=1,
        accumulate=1,
        sharded=False,
        bf16=True,
        tflops=150.0,
    )


if __name__ == "__main__":
    main()
