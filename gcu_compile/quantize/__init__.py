"""Quantises a checkpoint, by rounding to nearest or by GPTQ, into the compressed-tensors format that other tools read.

    formats of the vendor's release notes      compressed-tensors
    w4a16   4-bit weights in groups            pack-quantized, symmetric, a scale per group
    w8a16   8-bit weights per output           pack-quantized, symmetric, a scale per output (or group)
    w8a8    8-bit weights and activations      int-quantized, a scale per output, activations per token as they come
    ..c8    int8 KV cache beside it            kv_cache_scheme: scales per token as they come, or k_scale and v_scale

Rounding to nearest holds one tensor as float32 at a time; what reads texts holds the model. The output appears whole or
not at all.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gcu_compile.errors import CheckpointError, InvalidValueError, UnknownNameError
from gcu_compile.quantize import gptq, kv_cache
from gcu_compile.quantize.checkpoint import EXPERT, ROUTERS, Writer, find_linears, read_config
from gcu_compile.quantize.measure import output_errors
from gcu_compile.quantize.rounding import FORMATS, GROUP_SIZES, Format, to_nearest
from gcu_compile.quantize.stored import Stored

METHODS = ("nearest", "gptq")


def quantize(
    model: Path,
    out: Path,
    name: str,
    group_size: int | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    cache: bool = False,
    calibration: list[str] | None = None,
    method: str = "nearest",
    llmcompressor: Path | None = None,
) -> dict[str, Any]:
    """Write the checkpoint folder `model`, quantised, as the folder `out`.

    Args:
        name: of a format in `FORMATS`.
        group_size: inputs per scale; None: the largest of `GROUP_SIZES` that divides every layer (w4a16), or a scale
            per output (w8a16, w8a8).
        progress: called with a layer's name, how many are done, and how many there are.
        cache: ask readers for an int8 KV cache.
        calibration: texts that set the scales of that cache (None: scales per token, as they come), and on which the
            outputs' errors are measured.
        method: of `METHODS`. gptq needs `calibration`: its texts say which errors matter.
        llmcompressor: the Python of an environment that has it, for gptq; None: one is made in the user's cache.

    Returns:
        format, method, group_size, kv_cache (None, "dynamic" or "static"), bytes before and after, and `layers`: a
        `LayerError` of each as a dictionary.

    Raises:
        UnknownNameError: no such format or method.
        InvalidValueError: a group size that does not divide a layer, or that the format does not have; calibration
            without text, or none for gptq.
        CheckpointError: no checkpoint in `model`, one that is quantised already, or an `out` that exists.
        GcuCompileError: llmcompressor could not be installed, or failed.
    """
    if name not in FORMATS:
        raise UnknownNameError("quantisation format", name, FORMATS)
    form = FORMATS[name]
    if form.activations and group_size:
        raise InvalidValueError("group_size", group_size, "none: w8a8 has a scale per output")
    if method not in METHODS:
        raise UnknownNameError("quantisation method", method, METHODS)
    if method == "gptq" and calibration is None:
        raise InvalidValueError("calibration", None, "texts: gptq weighs errors by what the layers see of them")
    if calibration is not None and not any(calibration):
        raise InvalidValueError("calibration", calibration, "a text")
    if out.exists():
        raise CheckpointError(f"{out} exists already; name a folder that does not")
    config = read_config(model)
    shards = sorted(model.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{model} holds no .safetensors files")
    linears = find_linears(config, shards)
    size = _group_size(form, group_size, linears)
    config["quantization_config"] = scheme(form, size, any(EXPERT.search(name) for name in linears))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        new = Path(aside) / "checkpoint"
        new.mkdir()
        done = itertools.count(1)
        ready = lambda name: progress(name, next(done), len(linears))  # noqa: E731
        if method == "gptq":
            texts = list(filter(None, calibration))
            integers = config["quantization_config"]
            solved = gptq.solve(model, Path(aside), integers, linears, texts, ready, llmcompressor)
            writer = Writer(form, lambda name, weight: solved.codes(name, weight.shape), linears, lambda name: None)
        else:
            writer = Writer(form, lambda name, weight: to_nearest(weight, form.bits, size), linears, ready)
        scales = kv_cache.calibrate(model, calibration) if cache and calibration is not None else {}
        for shard in shards:
            writer.write(shard, new / shard.name, scales if shard is shards[-1] else {})
        if len(shards) > 1:
            index = {"metadata": {"total_size": writer.bytes}, "weight_map": writer.where}
            (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for file in model.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not (new / file.name).exists():
                shutil.copy(file, new / file.name)
        if cache:
            config["quantization_config"]["kv_cache_scheme"] = kv_cache.scheme(static=calibration is not None)
        (new / "config.json").write_text(json.dumps(config, indent=2))
        if calibration is not None:
            outputs = output_errors(model, calibration, Stored(new, form.bits, size), linears)
            for error in writer.errors:
                error.outputs = outputs.get(f"{error.name}.weight")
        new.rename(out)
    return {
        "format": name,
        "method": method,
        "group_size": size,
        "kv_cache": ("static" if calibration is not None else "dynamic") if cache else None,
        "bytes_before": sum(shard.stat().st_size for shard in shards),
        "bytes_after": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "layers": [asdict(error) for error in writer.errors],
    }


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
