"""Quantises a checkpoint by rounding to nearest, into the compressed-tensors format that other tools read.

    formats of the vendor's release notes      compressed-tensors
    w4a16   4-bit weights in groups            pack-quantized, symmetric, a scale per group
    w8a16   8-bit weights per output           pack-quantized, symmetric, a scale per output (or group)
    w8a8    8-bit weights and activations      int-quantized, a scale per output, activations per token as they come
    ..c8    int8 KV cache beside it            kv_cache_scheme: scales per token as they come, or k_scale and v_scale

One tensor is in memory as float32 at a time. The output appears whole or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gcu_compile.errors import CheckpointError, InvalidValueError, UnknownNameError
from gcu_compile.kernels.dequant_gemm import layouts
from gcu_compile.quantize import kv_cache
from gcu_compile.quantize.rounding import FORMATS, GROUP_SIZES, Format, to_nearest

# Weights of experts in a file's own names; transformers may hold them as one tensor and no linear layer.
EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
ROUTERS = ("re:.*\\.gate$", "re:.*shared_expert_gate$")


@dataclass(frozen=True)
class LayerError:
    """Of one layer: |W - dequantised| / |W| in the Frobenius norm, and the largest difference of an element."""

    name: str
    relative: float
    largest: float


def quantize(
    model: Path,
    out: Path,
    name: str,
    group_size: int | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    cache: bool = False,
    calibration: list[str] | None = None,
) -> dict[str, Any]:
    """Write the checkpoint folder `model`, quantised, as the folder `out`.

    Args:
        name: of a format in `FORMATS`.
        group_size: inputs per scale; None: the largest of `GROUP_SIZES` that divides every layer (w4a16), or a scale
            per output (w8a16, w8a8).
        progress: called with a layer's name, how many are done, and how many there are.
        cache: ask readers for an int8 KV cache.
        calibration: texts whose keys and values set the scales of that cache; None: scales per token, as they come.

    Returns:
        format, group_size, kv_cache (None, "dynamic" or "static"), bytes before and after, and `layers`: a
        `LayerError` of each as a dictionary.

    Raises:
        UnknownNameError: no such format.
        InvalidValueError: a group size that does not divide a layer, or that the format does not have; calibration
            without an int8 cache, or without text.
        CheckpointError: no checkpoint in `model`, one that is quantised already, or an `out` that exists.
    """
    if name not in FORMATS:
        raise UnknownNameError("quantisation format", name, FORMATS)
    form = FORMATS[name]
    if form.activations and group_size:
        raise InvalidValueError("group_size", group_size, "none: w8a8 has a scale per output")
    if calibration is not None and (not cache or not any(calibration)):
        raise InvalidValueError("calibration", calibration, "texts, together with an int8 KV cache")
    if out.exists():
        raise CheckpointError(f"{out} exists already; name a folder that does not")
    config = _config(model)
    shards = sorted(model.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{model} holds no .safetensors files")
    linears = _linears(config, shards)
    size = _group_size(form, group_size, linears)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        new = Path(aside) / "checkpoint"
        new.mkdir()
        errors, where, total = [], {}, 0
        scales = {} if calibration is None else kv_cache.calibrate(model, calibration)
        for shard in shards:
            more = scales if shard is shards[-1] else {}
            total += _write(shard, new / shard.name, form, size, linears, errors, where, progress, more)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for file in model.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not (new / file.name).exists():
                shutil.copy(file, new / file.name)
        config["quantization_config"] = scheme(form, size, any(EXPERT.search(name) for name in linears))
        if cache:
            config["quantization_config"]["kv_cache_scheme"] = kv_cache.scheme(static=calibration is not None)
        (new / "config.json").write_text(json.dumps(config, indent=2))
        new.rename(out)
    return {
        "format": name,
        "group_size": size,
        "kv_cache": ("static" if calibration is not None else "dynamic") if cache else None,
        "bytes_before": sum(shard.stat().st_size for shard in shards),
        "bytes_after": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "layers": [error.__dict__ for error in errors],
    }


def _config(model: Path) -> dict[str, Any]:
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model / 'config.json'}: {error}") from error
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "some method")
        raise CheckpointError(f"{model} is quantised already ({method})")
    return config


def _linears(config: dict[str, Any], shards: list[Path]) -> dict[str, tuple[int, int]]:
    """Name of each linear layer's weight in the files -> (N, K). The head and routers stay as they are."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **known))
    names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not model.get_output_embeddings()
        and not any(re.fullmatch(router.removeprefix("re:"), name) for router in ROUTERS)
    }
    found = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open has no iterator)
                if name in names or EXPERT.search(name):
                    found[name] = tuple(file.get_slice(name).get_shape())
    if not found:
        raise CheckpointError("no weight in the files belongs to a linear layer of config.json's model")
    return dict(sorted(found.items()))


def _group_size(form: Format, asked: int | None, linears: dict[str, tuple[int, int]]) -> int | None:
    if form.bits * min(k for _, k in linears.values()) % 32:
        raise CheckpointError("a layer's inputs do not fill words of 32 bits")
    if asked is None and not form.grouped:
        return None
    for size in (asked,) if asked else GROUP_SIZES:
        wrong = [f"{name} has {k}" for name, (_, k) in linears.items() if size <= 0 or k % size]
        if not wrong:
            return size
    raise InvalidValueError("group_size", asked or GROUP_SIZES[-1], f"a divisor of every layer's inputs; {wrong[0]}")


def _write(shard, out, form, size, linears, errors, where, progress, more) -> int:
    """One file of the checkpoint, `more` tensors in it; returns the bytes of its tensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {}
    with safe_open(shard, "pt") as file:
        metadata = file.metadata() or {"format": "pt"}
        for name in file.keys():  # noqa: SIM118 (safe_open has no iterator)
            if name not in linears:
                tensors[name] = file.get_tensor(name)
                continue
            stored, error = _layer(name, file.get_tensor(name), form, size)
            tensors |= stored
            errors.append(error)
            progress(name, len(errors), len(linears))
    tensors |= more
    save_file(tensors, out, metadata=metadata)
    where.update(dict.fromkeys(tensors, out.name))
    return sum(tensor.nbytes for tensor in tensors.values())


def _layer(name: str, weight: torch.Tensor, form: Format, size: int | None):
    """The tensors that stand for a weight [N, K], and how far they are from it."""
    n, k = weight.shape
    whole = weight.to(torch.float32)
    if not bool(torch.isfinite(whole).all()):
        raise CheckpointError(f"{name}: the weight holds NaN or infinity")
    codes, scales = to_nearest(weight, form.bits, size)
    numbers = codes.view(n, -1, size or k) * scales.to(torch.float32).unsqueeze(-1)
    difference = numbers.view(n, k) - whole
    norm = whole.norm().item()
    base = name.removesuffix(".weight")
    error = LayerError(base, difference.norm().item() / norm if norm else 0.0, difference.abs().max().item())
    if form.activations:
        return {f"{base}.weight": codes.to(torch.int8), f"{base}.weight_scale": scales}, error
    layout = layouts.get("int4_rows_i32" if form.bits == 4 else "int8_rows_i32")
    stored = {
        f"{base}.weight_packed": layouts.pack_blocks(codes, layout),
        f"{base}.weight_scale": scales,
        f"{base}.weight_shape": torch.tensor([n, k]),
    }
    return stored, error


def scheme(form: Format, size: int | None, routers: bool) -> dict[str, Any]:
    """`quantization_config` of compressed-tensors."""
    weights = {"num_bits": form.bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations if form.activations else None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if form.activations else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *(ROUTERS if routers else ())],
        "kv_cache_scheme": None,
    }
