"""Random models that are no plain decoders (images, encoders), and what transformers says with them."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy
import torch
from random_models import GQA, SIZES, TOKENS

IMAGE, VIDEO, VISION_START, VISION_END = 260, 261, 262, 263
SIDE = 28  # pixels of one merged token


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that logits are far apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.float().eval()


def image(rows: int, columns: int) -> numpy.ndarray:
    """Pixels [rows, columns, 3] of that many tokens, the same in every process."""
    return numpy.random.RandomState(rows).randint(0, 256, (rows * SIDE, columns * SIDE, 3), dtype=numpy.uint8)


class NoArguments:
    """Keyword arguments of a processor that has none: vLLM reads the annotations."""


class NoVideos(dict):
    """In the place of a video processor; a dictionary, for processors print themselves as JSON."""

    model_input_names, valid_kwargs = (), NoArguments


def without_torchvision() -> None:
    """Let vLLM's Qwen2-VL run where torchvision is missing: images need it no more than this.

    transformers has an image processor on PIL. But vLLM imports a function from the module of the other one, and video
    processors cannot be made at all.
    """
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor
    from transformers.processing_utils import ProcessorMixin
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return
    check = ProcessorMixin.check_argument_for_proper_class

    def lenient(self, name, argument):
        return NoVideos if isinstance(argument, NoVideos) else check(self, name, argument)

    ProcessorMixin.check_argument_for_proper_class = lenient
    AutoVideoProcessor.from_pretrained = lambda *args, **kwargs: NoVideos()

    parts = ("torchvision", "transforms", "v2", "functional")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    for name in names:
        parent, _, child = name.rpartition(".")
        sys.modules[name] = ModuleType(name)
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration

    for name in names:
        del sys.modules[name]
    # As a class: vLLM would look at a name in a process of its own.
    ModelRegistry.register_model("Qwen2VLForConditionalGeneration", Qwen2VLForConditionalGeneration)


def save_qwen2_vl(folder):
    """A Qwen2-VL with its processor: M-RoPE with sections for time, height and width."""
    from tiny import save_tokenizer
    from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    torch.manual_seed(0)
    text = {**GQA, "vocab_size": 272, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
            "mrope_section": [4, 6, 6]}, "tie_word_embeddings": True}  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14,
              "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
                           vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
                           tie_word_embeddings=True)  # fmt: skip
    spread(Qwen2VLForConditionalGeneration(config)).save_pretrained(folder)
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [
        "<|none|>", "<|none2|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]})  # fmt: skip
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == IMAGE
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor(min_pixels=SIDE**2, max_pixels=16 * SIDE**2).save_pretrained(folder)
    return folder


def qwen2_vl_says(folder, prompts):
    """Tokens and log-probabilities; a prompt is token ids, or ids with one `IMAGE` and the image's sizes in tokens."""
    from transformers import AutoImageProcessor, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    reader = AutoImageProcessor.from_pretrained(folder)
    tokens, logprobs = [], []
    for ids, size in prompts:
        extra = {}
        if size:
            seen = reader(images=image(*size), return_tensors="pt")
            at, count = ids.index(IMAGE), size[0] * size[1]
            ids = ids[:at] + [IMAGE] * count + ids[at + 1 :]
            extra = {"pixel_values": seen["pixel_values"], "image_grid_thw": seen["image_grid_thw"]}
        row = torch.tensor([ids])
        extra["mm_token_type_ids"] = (row == IMAGE).int()
        with torch.no_grad():
            out = model.generate(row, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **extra)
            scores = model(row, **extra).logits[0, :-1].log_softmax(-1)
        tokens.append(out[0, len(ids) :].tolist())
        logprobs.append(scores.gather(1, row[0, 1:, None])[:, 0].tolist())
    return {"tokens": tokens, "logprobs": logprobs}


ENCODERS = {
    "encoder": ("BertConfig", {**SIZES, "intermediate_size": 192, "pad_token_id": 0}),
    "encoder with a window that reaches both ways": (
        "ModernBertConfig",
        {**SIZES, "intermediate_size": 192, "local_attention": 8, "global_attn_every_n_layers": 2,
         "num_hidden_layers": 3, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
    ),
}  # fmt: skip


def save_encoder(folder, kind, settings):
    """With a tokenizer, which vLLM wants to see for every model that pools."""
    import transformers
    from tiny import save_tokenizer

    torch.manual_seed(0)
    config = getattr(transformers, kind)(**settings)
    spread(transformers.AutoModel.from_config(config)).save_pretrained(folder)
    return save_tokenizer(folder)


def encoder_says(folder, prompts):
    """The last hidden state of the first token of each prompt, of length 1."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        states = [model(torch.tensor([ids])).last_hidden_state[0, 0] for ids in prompts]
    return [torch.nn.functional.normalize(x, dim=0).tolist() for x in states]


START = 262  # of a transcript: the token that Whisper's decoder begins with
RATE = 16000


def sound(seconds: float) -> numpy.ndarray:
    """The same noise in every process, at `RATE`."""
    return numpy.random.RandomState(1).randn(int(RATE * seconds)).astype(numpy.float32)


def save_whisper(folder):
    """A Whisper that hears one second: an encoder, a decoder, and attention from one to the other."""
    from tiny import save_tokenizer
    from transformers import AutoTokenizer, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192}  # fmt: skip
    config = WhisperConfig(vocab_size=272, num_mel_bins=16, max_source_positions=50, max_target_positions=64,
                           decoder_start_token_id=START, bos_token_id=0, eos_token_id=1, pad_token_id=1,
                           suppress_tokens=None, begin_suppress_tokens=None, **sizes)  # fmt: skip
    spread(WhisperForConditionalGeneration(config)).save_pretrained(folder)
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    others = [f"<|none{i}|>" for i in range(4)]
    tokenizer.add_special_tokens({"additional_special_tokens": [*others, "<|startoftranscript|>"]})
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE, chunk_length=1).save_pretrained(folder)
    return folder


def whisper_says(folder, prompts):
    """Greedy tokens after each decoder prompt, without a cache."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    reader, tokens = WhisperFeatureExtractor.from_pretrained(folder), []
    for ids, seconds in prompts:
        features = reader(sound(seconds), sampling_rate=RATE, return_tensors="pt").input_features
        row = torch.tensor([ids])
        with torch.no_grad():
            for _ in range(TOKENS):
                logits = model(input_features=features, decoder_input_ids=row).logits
                row = torch.cat([row, logits[:, -1:].argmax(-1)], 1)
        tokens.append(row[0, len(ids) :].tolist())
    return tokens
