"""Tiny random models of every family of language models that the vendor's release notes name, and what they say.

The reference is always a model of transformers. Where transformers has no class for a family's checkpoints, it is the
model of another class that computes the same, and its weights are written under the family's names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from random_models import GQA, LATENT, SIZES, TOKENS, prompts
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
MHA = {**GQA, "num_key_value_heads": 4}
THETA = 20000.0  # not the default, so that a family that loses its own is seen
ROPE = {"rope_type": "default", "rope_theta": THETA}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        kind, settings: configuration class of transformers for the reference, and its arguments.
        config: config.json of the family's own checkpoints; None: the reference's.
        pack: the reference's tensors under the family's names, in its layout.
        remote: whether the configuration's class is in the repository, as the family's is.
        heads: of ALiBi in the place of rotary embeddings; 0: as the reference does.
        prepare: what makes the reference compute as the family does.
    """

    kind: str
    settings: dict
    config: dict | None = None
    pack: Callable[[Tensors], Tensors] = dict
    remote: bool = False
    heads: int = 0
    prepare: Callable[[torch.nn.Module], None] = lambda model: None

    def write(self, folder: Path) -> dict:
        """Write the checkpoint to `folder`; returns what the reference says."""
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.kind)(**self.settings)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            spread(model)
            self.prepare(model)
        model.save_pretrained(folder)
        if self.config is not None:
            tensors = self.pack(load_file(folder / "model.safetensors"))
            for file in folder.iterdir():
                file.unlink()
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
            write_config(folder, self.config, self.remote)
        return answers(alibi(model, self.heads) if self.heads else lambda ids: model(ids).logits)


REMOTE = """from transformers import PretrainedConfig


class Configuration(PretrainedConfig):
    model_type = {kind!r}

    def __init__(self, **settings):
        super().__init__(**settings)
"""


def write_config(folder: Path, config: dict, remote: bool) -> None:
    """config.json, and the module that it names where its class is not known to transformers."""
    if remote:
        (folder / "configuration.py").write_text(REMOTE.format(kind=config["model_type"]))
        config = {**config, "auto_map": {"AutoConfig": "configuration.Configuration"}}
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "tie_word_embeddings": False, **config}))


def spread(model: torch.nn.Module) -> None:
    """Weights large enough that logits are far apart; norms and biases that are not all ones and zeros."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))


def gelu_by_erf(model: torch.nn.Module) -> None:
    """vLLM's Bloom computes GELU by erf, transformers' by a tanh formula."""
    for module in model.modules():
        if hasattr(module, "gelu_impl"):
            module.gelu_impl = torch.nn.GELU()


def half_open(model: torch.nn.Module) -> None:
    """Each shared expert counts half, whatever the token."""
    for module in model.modules():
        if hasattr(module, "shared_expert_gate"):
            module.shared_expert_gate.weight.zero_()


def unit_rows(model: torch.nn.Module) -> None:
    """A head whose rows have length 1."""
    model.lm_head.weight.copy_(torch.nn.functional.normalize(model.lm_head.weight))


@torch.no_grad()
def answers(logits_of: Callable[[torch.Tensor], torch.Tensor]) -> dict:
    """Log-probabilities of the prompts' tokens, and greedy tokens, each of the whole sequence without a cache."""
    tokens, logprobs = [], []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        for step in range(TOKENS):
            logits = logits_of(ids)[0]
            if not step:
                scores = logits[:-1].log_softmax(-1)
                logprobs.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
            ids = torch.cat([ids, logits[-1:].argmax(-1)[None]], 1)
        tokens.append(ids[0, len(prompt) :].tolist())
    return {"tokens": tokens, "logprobs": logprobs}


def alibi(model: torch.nn.Module, heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A Llama with Bloom's biases: rotations by nothing, and slopes in the place of a causal mask."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    model.model.rotary_emb.inv_freq.zero_()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        slopes = build_alibi_tensor(torch.ones(1, length), heads, torch.float32).view(1, heads, 1, length)
        ahead = torch.full((length, length), -torch.inf).triu(1)
        return model(ids, attention_mask=slopes + ahead).logits

    return logits


def renamed(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    """Each pair replaces what a name contains."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = tensor
    return found


def joined(tensors: Tensors, name: str, join: Callable[[list[torch.Tensor]], torch.Tensor] = torch.cat) -> Tensors:
    """q_proj, k_proj and v_proj of a layer as one tensor, called `name`."""
    found = {}
    for each, tensor in tensors.items():
        if ".q_proj." in each:
            parts = [tensors[each.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            found[each.replace("q_proj", name)] = join(parts)
        elif ".k_proj." not in each and ".v_proj." not in each:
            found[each] = tensor
    return found


def qwen(tensors: Tensors) -> Tensors:
    return renamed(
        joined(tensors, "c_attn"),
        ("model.embed_tokens", "transformer.wte"), ("model.layers", "transformer.h"),
        ("model.norm", "transformer.ln_f"), ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"),
        ("self_attn", "attn"), ("o_proj", "c_proj"), ("up_proj", "w1"), ("gate_proj", "w2"), ("down_proj", "c_proj"),
    )  # fmt: skip


def baichuan(tensors: Tensors) -> Tensors:
    return joined(tensors, "W_pack")


def baichuan2(tensors: Tensors) -> Tensors:
    """The reference's head has rows of length 1; the file's have any."""
    tensors = baichuan(tensors)
    rows = torch.rand(len(tensors["lm_head.weight"]), 1, generator=torch.Generator().manual_seed(1)) + 0.5
    return {**tensors, "lm_head.weight": tensors["lm_head.weight"] * rows}


def by_group(parts: list[torch.Tensor]) -> torch.Tensor:
    """InternLM2: the query heads of a KV head, the KV head's key, its value, and the next."""
    kv, width = GQA["num_key_value_heads"], GQA["hidden_size"] // GQA["num_attention_heads"]
    groups = torch.cat([part.view(kv, -1, width, part.shape[-1]) for part in parts], 1)
    return groups.reshape(-1, groups.shape[-1])


def internlm2(tensors: Tensors) -> Tensors:
    return renamed(
        joined(tensors, "wqkv", by_group),
        ("embed_tokens", "tok_embeddings"), ("input_layernorm", "attention_norm"), ("lm_head", "output"),
        ("post_attention_layernorm", "ffn_norm"), ("self_attn", "attention"), ("mlp", "feed_forward"),
        ("o_proj", "wo"), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"),
    )  # fmt: skip


def chatglm(tensors: Tensors) -> Tensors:
    return renamed(
        joined(tensors, "query_key_value"),
        ("model.embed_tokens", "transformer.embedding.word_embeddings"), ("model.layers", "transformer.encoder.layers"),
        ("model.norm", "transformer.encoder.final_layernorm"), ("lm_head", "transformer.output_layer"),
        ("self_attn", "self_attention"), ("o_proj", "dense"), ("gate_up_proj", "dense_h_to_4h"),
        ("down_proj", "dense_4h_to_h"),
    )  # fmt: skip


def deepseek(tensors: Tensors) -> Tensors:
    """The half of `half_open` in the weights."""
    found = {name: tensor for name, tensor in tensors.items() if "shared_expert_gate" not in name}
    found = {name: tensor / 2 if "shared_expert.down" in name else tensor for name, tensor in found.items()}
    return renamed(found, ("shared_expert.", "shared_experts."))


def llama(**changes) -> Family:
    """A Llama of transformers."""
    return Family("LlamaConfig", {**GQA, **changes})


def scaled(kind: str, **settings) -> dict:
    """Rotary embeddings for longer sequences."""
    return {"rope_type": kind, "rope_theta": THETA, **settings}


def thudm(theta_ratio: float) -> Family:
    """ChatGLM2 and 3, and GLM-4 whose rotary base is larger, as THUDM wrote them."""
    rope = {"rope_type": "default", "rope_theta": 10000.0 * theta_ratio, "partial_rotary_factor": 0.5}
    reference = {**GQA, "head_dim": 32, "attention_bias": True, "rope_parameters": rope, "rms_norm_eps": 1e-5}
    config = {
        "architectures": ["ChatGLMModel"], "model_type": "chatglm", "num_layers": 2, "padded_vocab_size": 272,
        "hidden_size": 128, "ffn_hidden_size": 192, "kv_channels": 32, "num_attention_heads": 4, "seq_length": 256,
        "layernorm_epsilon": 1e-5, "add_qkv_bias": True, "multi_query_attention": True, "multi_query_group_num": 2,
        "original_rope": True, "rope_ratio": theta_ratio,
    }  # fmt: skip
    return Family("GlmConfig", reference, config, chatglm)


def as_baichuan(architecture: str, pack=baichuan, settings=MHA, heads=0) -> Family:
    """7B with rotary embeddings, or 13B with ALiBi, which is told by what the configuration leaves out."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    config = {"architectures": [architecture], "model_type": "baichuan", "hidden_act": "silu", "rms_norm_eps": 1e-6}
    config |= {name: settings[name] for name in names} | {"norm_head": pack is baichuan2}
    # A repository's own configuration class, which is not here, and not asked for.
    config |= {"auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"}}
    config |= {"model_max_length" if heads else "max_position_embeddings": 256}
    prepare = unit_rows if pack is baichuan2 else Family.prepare
    return Family("LlamaConfig", settings, config, pack, heads=heads, prepare=prepare)


SIX_HEADS = {**MHA, "hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 6}
QWEN = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": 128, "intermediate_size": 384,
    "num_attention_heads": 4, "num_hidden_layers": 2, "kv_channels": 32, "vocab_size": 272, "seq_length": 128,
    "max_position_embeddings": 256, "layer_norm_epsilon": 1e-6, "rotary_emb_base": THETA, "rotary_pct": 1.0,
    "use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True,
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
}  # fmt: skip
OF_LLAMA = {**GQA, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": THETA}

FAMILIES = {
    "Llama 3.1 (llama3 rope scaling)": llama(
        rope_parameters=scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                               original_max_position_embeddings=32)),
    "Llama (linear rope scaling)": llama(rope_parameters=scaled("linear", factor=4.0)),
    "Llama (yarn)": llama(rope_parameters=scaled("yarn", factor=4.0, original_max_position_embeddings=64)),
    "Yi 200K (rope theta)": llama(rope_parameters={"rope_type": "default", "rope_theta": 5e6}),
    "Mistral": Family("MistralConfig", {**GQA, "sliding_window": 16, "rope_parameters": ROPE}),
    "Mixtral": Family("MixtralConfig", {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2": Family("Qwen2Config", {**GQA, "rope_parameters": ROPE}),
    "Qwen2-MoE": Family("Qwen2MoeConfig", {
        **GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128}),
    "Gemma": Family("GemmaConfig", {**GQA, "head_dim": 64}),
    "Gemma 2": Family("Gemma2Config", {
        **GQA, "head_dim": 32, "sliding_window": 16, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32}),
    "GPT-J": Family("GPTJConfig", {
        **SIZES, "n_embd": 128, "n_head": 4, "n_layer": 2, "rotary_dim": 16, "n_positions": 256}),
    "GPT-NeoX": Family("GPTNeoXConfig", {
        **SIZES, "intermediate_size": 192, "max_position_embeddings": 256, "use_parallel_residual": True}),
    "StarCoder (GPTBigCode)": Family("GPTBigCodeConfig", {
        **SIZES, "n_embd": 128, "n_head": 4, "n_layer": 2, "n_positions": 256, "multi_query": True}),
    "StarCoder2": Family("Starcoder2Config", {**GQA, "sliding_window": 16, "use_bias": True}),
    "OPT": Family("OPTConfig", {
        **SIZES, "ffn_dim": 192, "max_position_embeddings": 256, "word_embed_proj_dim": 128}),
    "Phi-3": Family("Phi3Config", GQA),
    "DBRX": Family("DbrxConfig", {
        **SIZES, "d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "rope_parameters": ROPE,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": THETA},
        "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}}),
    "GLM-4 (hf)": Family("GlmConfig", {**GQA, "head_dim": 32, "attention_bias": True}),
    "Bloom": Family("BloomConfig", {**SIZES, "n_head": 4, "n_layer": 2}, prepare=gelu_by_erf),
    "DeepSeek-V2": Family("DeepseekV2Config", LATENT),
    "ChatGLM3": thudm(1.0),
    "GLM-4 (THUDM)": thudm(500.0),
    "InternLM2": Family(
        "LlamaConfig", {**GQA, "rope_parameters": ROPE},
        {**OF_LLAMA, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False},
        internlm2, remote=True),
    "InternLM2 (dynamic rope scaling)": Family(  # which acts beyond max_position_embeddings
        "LlamaConfig", {**GQA, "rope_parameters": ROPE},
        {**OF_LLAMA, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False,
         "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        internlm2, remote=True),
    "Orion": Family(
        "StableLmConfig", {**MHA, "layer_norm_eps": 1e-5, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
        {**OF_LLAMA, **MHA, "architectures": ["OrionForCausalLM"], "model_type": "orion", "rms_norm_eps": 1e-5},
        remote=True),
    "DeepSeek-MoE": Family(
        "Qwen2MoeConfig",
        {**MHA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "qkv_bias": False,
         "shared_expert_intermediate_size": 128, "norm_topk_prob": False, "mlp_only_layers": [0],
         "rope_parameters": ROPE},
        {**OF_LLAMA, **MHA, "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek",
         "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
         "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax"},
        deepseek, remote=True, prepare=half_open),
    "Qwen v1": Family("Qwen2Config", {**MHA, "rope_parameters": ROPE}, QWEN, qwen),
    "Baichuan 7B": as_baichuan("BaiChuanForCausalLM"),
    "Baichuan2 7B": as_baichuan("BaichuanForCausalLM", baichuan2),
    "Baichuan2 13B": as_baichuan("BaichuanForCausalLM", baichuan2, SIX_HEADS, heads=6),
    "InternLM v1": Family(
        "LlamaConfig", {**MHA, "attention_bias": True, "rope_parameters": ROPE},
        {**MHA, "architectures": ["InternLMForCausalLM"], "model_type": "internlm", "hidden_act": "silu", "bias": True,
         "rms_norm_eps": 1e-6, "rotary": {"base": THETA, "type": "dynamic"}}),
    "Aquila": Family(
        "LlamaConfig", {**GQA, "rope_parameters": ROPE},
        {**OF_LLAMA, "architectures": ["AquilaModel"], "model_type": "aquila"}),
}  # fmt: skip
