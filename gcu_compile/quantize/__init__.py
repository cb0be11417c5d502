"""Quantises a checkpoint by rounding to nearest, into the compressed-tensors format that other tools read.

    formats of the vendor's release notes      compressed-tensors
    w4a16   4-bit weights in groups            pack-quantized, symmetric, a scale per group
    w8a16   8-bit weights per output           pack-quantized, symmetric, a scale per output (or group)
    w8a8    8-bit weights and activations      int-quantized, a scale per output, activations per token as they come

One tensor is in memory as float32 at a time. The output appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gcu_compile.errors import CheckpointError, InvalidValueError, UnknownNameError
from gcu_compile.kernels.dequant_gemm import layouts

GROUP_SIZES = (128, 64, 32)  # tried in this order where none is asked for


@dataclass(frozen=True)
class Format:
    """A way to store a linear layer: bits, whether a scale serves a group or an output, and who is quantised."""

    bits: int
    grouped: bool
    activations: bool = False


FORMATS = {"w4a16": Format(4, True), "w8a16": Format(8, False), "w8a8": Format(8, False, activations=True)}


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
) -> dict[str, Any]:
    """Write the checkpoint folder `model`, quantised, as the folder `out`.

    Args:
        name: of a format in `FORMATS`.
        group_size: inputs per scale; None: the largest of `GROUP_SIZES` that divides every layer (w4a16), or a scale
            per output (w8a16, w8a8).
        progress: called with a layer's name, how many are done, and how many there are.

    Returns:
        format, group_size, bytes before and after, and `layers`: a `LayerError` of each as a dictionary.

    Raises:
        UnknownNameError: no such format.
        InvalidValueError: a group size that does not divide a layer, or that the format does not have.
        CheckpointError: no checkpoint in `model`, one that is quantised already, or an `out` that exists.
    """
    if name not in FORMATS:
        raise UnknownNameError("quantisation format", name, FORMATS)
    form = FORMATS[name]
    if form.activations and group_size:
        raise InvalidValueError("group_size", group_size, "none: w8a8 has a scale per output")
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
        for shard in shards:
            total += _write(shard, new / shard.name, form, size, linears, errors, where, progress)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for file in model.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not (new / file.name).exists():
                shutil.copy(file, new / file.name)
        config["quantization_config"] = _scheme(form, size)
        (new / "config.json").write_text(json.dumps(config, indent=2))
        new.rename(out)
    return {
        "format": name,
        "group_size": size,
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
    """Name of each linear layer's weight in the files -> (N, K). The head stays as it is."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **known))
    names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    found = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in sorted(names & set(file.keys()))}
    if not found:
        raise CheckpointError("no weight in the files belongs to a linear layer of config.json's model")
    return found


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


def _write(shard, out, form, size, linears, errors, where, progress) -> int:
    """One file of the checkpoint; returns the bytes of its tensors."""
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
    save_file(tensors, out, metadata=metadata)
    where.update(dict.fromkeys(tensors, out.name))
    return sum(tensor.nbytes for tensor in tensors.values())


def _layer(name: str, weight: torch.Tensor, form: Format, size: int | None):
    """The tensors that stand for a weight [N, K], and how far they are from it."""
    n, k = weight.shape
    whole = weight.to(torch.float32)
    if not bool(torch.isfinite(whole).all()):
        raise CheckpointError(f"{name}: the weight holds NaN or infinity")
    groups = whole.view(n, -1, size or k)
    half = 1 << (form.bits - 1)
    # The middle of -half .. half - 1 to the largest weight; rounded to the dtype in which it is stored.
    scales = (groups.abs().amax(-1) / (half - 0.5)).to(weight.dtype)
    divisor = torch.where(scales == 0, 1, scales).to(torch.float32).unsqueeze(-1)
    codes = torch.round(groups / divisor).clamp(-half, half - 1)
    difference = (codes * scales.to(torch.float32).unsqueeze(-1) - groups).view(n, k)
    norm = whole.norm().item()
    base = name.removesuffix(".weight")
    error = LayerError(base, difference.norm().item() / norm if norm else 0.0, difference.abs().max().item())
    codes = codes.view(n, k).to(torch.int16)
    if form.activations:
        return {f"{base}.weight": codes.to(torch.int8), f"{base}.weight_scale": scales}, error
    layout = layouts.get("int4_rows_i32" if form.bits == 4 else "int8_rows_i32")
    stored = {
        f"{base}.weight_packed": layouts.pack(codes + half, layout),
        f"{base}.weight_scale": scales,
        f"{base}.weight_shape": torch.tensor([n, k]),
    }
    return stored, error


def _scheme(form: Format, size: int | None) -> dict[str, Any]:
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
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
