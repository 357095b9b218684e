"""Tiny random vision-language models of several kinds, with their processors."""

from transformers import (
    CLIPImageProcessor,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipImageProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from latentact.policies.vla.backbone import _pad_left, byte_tokenizer, tiny

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def _text(tokenizer, **more):
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return {**TEXT, "vocab_size": len(tokenizer), **ids, **more}


def qwen3():
    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = byte_tokenizer(marks)
    image, video, start, end = tokenizer.convert_tokens_to_ids([*marks])
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 1e4}
    config = Qwen3VLConfig(
        text_config=_text(tokenizer, head_dim=8, rope_parameters=rope),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    images = Qwen2VLImageProcessor(patch_size=16)
    processor = Qwen3VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(patch_size=16))
    return Qwen3VLForConditionalGeneration(config), processor


def smolvlm():
    tokenizer = byte_tokenizer(("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"))
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    images = SmolVLMImageProcessor(
        do_image_splitting=False, size={"longest_edge": 64}, max_image_size={"longest_edge": 64}
    )
    videos = SmolVLMVideoProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 64})
    processor = SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4)
    return SmolVLMForConditionalGeneration(config), processor


SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def paligemma():
    tokenizer = byte_tokenizer(("<image>",))
    tokenizer.bos_token = tokenizer.eos_token
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**_text(tokenizer, num_key_value_heads=1, head_dim=8)).to_dict(),
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP},
        projection_dim=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    return PaliGemmaForConditionalGeneration(config), PaliGemmaProcessor(images, tokenizer)


def llava():
    tokenizer = byte_tokenizer(("<image>",))
    config = LlavaConfig(
        text_config=LlamaConfig(**_text(tokenizer)).to_dict(),
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **SIGLIP},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return LlavaForConditionalGeneration(config), processor


def build(kind):
    if kind == "qwen2_5":
        return tiny()
    vlm, processor = {"qwen3": qwen3, "smolvlm": smolvlm, "paligemma": paligemma, "llava": llava}[kind]()
    _pad_left(processor)
    return vlm, processor


KINDS = ("qwen2_5", "qwen3", "smolvlm", "paligemma", "llava")
