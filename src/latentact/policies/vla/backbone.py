"""Vision-language models of transformers: loading, prompts with an image, appended input positions.

Differences between the processors and models of transformers are handled in this file only. `vlm=tiny` is a
small Qwen2.5-VL with random weights and a byte tokenizer, created here: it needs no download and reads any
task text, but is not pretrained, so it suits tests and small grid worlds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from latentact.errors import UserError, missing_extra
from latentact.io.tensors import BROKEN

TINY = "tiny"
_VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|vision_encoder)(\.|$)")
_LORA = r".*(language_model|text_model)\..*\.(q|k|v|o|gate|up|down)_proj"
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": (
        "smolvlm",
        {
            "scale_factor": 4,
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "llama",
                "hidden_size": 960,
                "intermediate_size": 2560,
                "num_hidden_layers": 32,
                "num_attention_heads": 15,
                "num_key_value_heads": 5,
                "head_dim": 64,
                "vocab_size": 49280,
                "max_position_embeddings": 8192,
                "tie_word_embeddings": True,
            },
            "vision_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "image_size": 512,
                "patch_size": 16,
            },
        },
    ),
    "Qwen/Qwen3-VL-2B-Instruct": (
        "qwen3_vl",
        {
            "tie_word_embeddings": True,
            "text_config": {
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151936,
                "max_position_embeddings": 262144,
                "tie_word_embeddings": True,
            },
            "vision_config": {
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "out_hidden_size": 2048,
                "deepstack_visual_indexes": [5, 11, 17],
            },
        },
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl",
        {
            "text_config": {
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "vocab_size": 152064,
                "max_position_embeddings": 128000,
            },
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
        },
    ),
}
"""Hub id -> model type and sizes of published models, for planning without network access."""


def load_config(name: str) -> Any:
    """Return the configuration of a vision-language model; for `PUBLISHED` ones without network access.

    Raises:
        UserError: the model cannot be read, or is not an image-text-to-text model.
    """
    _require_transformers()
    from transformers import CONFIG_MAPPING

    if name == TINY:
        return tiny()[0].config
    if name in PUBLISHED:
        kind, sizes = PUBLISHED[name]
        return CONFIG_MAPPING[kind](**sizes)
    return _read_config(name)


def load_vlm(name: str, resolution: int) -> tuple[nn.Module, Any]:
    """Return a vision-language model in float32 and its processor.

    Args:
        name: tiny, a folder or a hub id.
        resolution: height and width of the images in pixels.

    Raises:
        UserError: the model cannot be read, or is not an image-text-to-text model.
    """
    _require_transformers()
    vlm: Any
    if name == TINY:
        vlm, processor = tiny()
    else:
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText, AutoProcessor

        _read_config(name)
        try:
            with no_progress_bar():
                loaded: Any = AutoModelForImageTextToText.from_pretrained(
                    name, dtype=torch.float32, output_loading_info=True
                )
            vlm, found = loaded
            processor = AutoProcessor.from_pretrained(name)
        except (OSError, SafetensorError, *BROKEN) as error:
            raise _unreadable(name, error) from error
        if missing := sorted(found["missing_keys"]):
            raise UserError(
                f"{name} must hold all weights of the model, got no {missing[0]!r}. Copy it again."
            )
        _pad_left(processor)
    set_resolution(processor, resolution)
    if not torch.cuda.is_available():  # on CPUs the backward pass of fused attention takes twice as long
        vlm.set_attn_implementation("eager")
    return vlm, processor


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "transformers", "vla") from error


@contextmanager
def no_progress_bar() -> Generator[None]:
    """Keep the progress bars of transformers for reading and writing weights off the terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _read_config(name: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, StrictDataclassError, *BROKEN) as error:
        raise _unreadable(name, error) from error
    mapping: Any = AutoModelForImageTextToText._model_mapping
    if type(config) not in mapping:
        raise UserError(
            f"vlm must be an image-text-to-text model, got {name} of type {config.model_type!r}. "
            f"Choose one such as {', '.join(PUBLISHED)}, or tiny."
        )
    return config


def _unreadable(name: str, error: Exception) -> UserError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return UserError(
        f"vlm must be tiny, a folder or a hub id that can be read, got {name!r} ({first[:200]}). Download it "
        f"on a machine with network access, or give a local folder."
    )


def tiny() -> tuple[nn.Module, Any]:
    """Return a Qwen2.5-VL of 0.2 million random parameters and its processor; patches have 8 x 8 pixels."""
    from transformers import (
        AutoModelForImageTextToText,
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = byte_tokenizer(marks)
    image, video, start, end = tokenizer.convert_tokens_to_ids([*marks])
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 8,
            "spatial_merge_size": 1,
            "temporal_patch_size": 1,
            "window_size": 64,
            "fullatt_block_indexes": [0, 1],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    sizes: dict[str, Any] = {"patch_size": 8, "merge_size": 1, "temporal_patch_size": 1}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
    )
    _pad_left(processor)
    return AutoModelForImageTextToText.from_config(config), processor


def byte_tokenizer(marks: Sequence[str] = ()) -> Any:
    """Return a tokenizer with one token per byte, and special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<|pad|>", "<|end|>", *marks])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")


def _pad_left(processor: Any) -> None:
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def set_resolution(processor: Any, resolution: int) -> None:
    """Fix the number of image tokens for processors that derive it from the image size."""
    images = processor.image_processor
    if "Qwen" in type(processor).__name__:
        side = images.patch_size * images.merge_size
        pixels = max(1, round(resolution / side)) ** 2 * side**2
        images.size = {"shortest_edge": pixels, "longest_edge": pixels}
        if hasattr(images, "min_pixels"):
            images.min_pixels = images.max_pixels = pixels


def prepare_inputs(
    processor: Any, frames: UInt8[Tensor, "b 3 h w"], prompts: Sequence[str], context: int
) -> dict[str, Tensor]:
    """Return the inputs of a model for one image and one prompt per sample, padded on the left.

    Raises:
        UserError: a prompt is longer than the context of the model.
    """
    nested = "Qwen" in type(processor).__name__ or hasattr(processor, "do_image_splitting")
    nested = nested or type(processor).__name__ in ("SmolVLMProcessor", "Idefics3Processor")
    inputs = processor(
        text=[_with_image(processor, prompt) for prompt in prompts],
        images=[[frame] for frame in frames] if nested else [*frames],
        padding=True,
        return_tensors="pt",
        **({"do_image_splitting": False} if type(processor).__name__ == "SmolVLMProcessor" else {}),
    )
    length = inputs["input_ids"].shape[1]
    if length > context:
        longest = max(prompts, key=len)
        raise UserError(
            f"the prompt and the image must have at most {context} tokens for this vlm, got {length} with "
            f"{longest[:60]!r}. Shorten the task text, or lower resolution."
        )
    return {name: value for name, value in inputs.items() if name != "labels" and value is not None}


def _with_image(processor: Any, prompt: str) -> str:
    """Return the text of a prompt with the placeholder of an image in front of it."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        message = [{"role": "user", "content": content}]
        return processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    image = processor.image_token
    if "Qwen" in type(processor).__name__:
        image = f"<|vision_start|>{image}<|vision_end|>"
    return f"{image}{prompt}"


def context_length(config: Any) -> int:
    """Return the maximum number of positions of a model."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf  # type: ignore[return-value]


def append(inputs: dict[str, Tensor], count: int, filler: int) -> dict[str, Tensor]:
    """Append `count` positions, whose embeddings come from elsewhere, to the inputs.

    A prefix language model (PaliGemma) attends bidirectionally within its prompt; the new positions are
    marked as its answer, with causal attention.
    """
    fill = {"input_ids": filler, "attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 1}
    return {
        name: nn.functional.pad(value, (0, count), value=fill[name]) if name in fill else value
        for name, value in inputs.items()
    }


def vision_parameters(vlm: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of the vision tower."""
    for name, parameter in vlm.named_parameters():
        if _VISION.search(name):
            yield parameter


def unused_parameters(vlm: Any) -> Iterator[nn.Parameter]:
    """Yield the parameters of the vocabulary head, unless they are also the token embeddings."""
    head, embedding = vlm.get_output_embeddings(), vlm.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        yield from head.parameters()


def checkpoint_activations(vlm: Any) -> None:
    """Enable activation checkpointing."""
    enable = getattr(vlm, "activation_checkpointing_enable", None) or vlm.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def add_lora(vlm: nn.Module, rank: int, alpha: int) -> None:
    """Add low-rank adapters to all linear layers of the language model; everything else is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=_LORA), vlm)


def merge_lora(vlm: nn.Module) -> None:
    """Merge the adapters into the weights of their layers, and remove them."""
    from peft.tuners.lora import LoraLayer

    for name, module in [*vlm.named_modules()]:
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[attr-defined]
            vlm.set_submodule(name, module.get_base_layer())
