"""Quantises a checkpoint, by rounding to nearest or by GPTQ, into the compressed-tensors format that other tools read.

    formats of the vendor's release notes      compressed-tensors
    w4a16   4-bit weights in groups            pack-quantized, a scale (and a zero point, if asked) per group
    w8a16   8-bit weights per output           pack-quantized, the same per output (or group)
    w8a8    8-bit weights and activations      int-quantized, a scale per output, activations per token as they come
    ..c8    int8 KV cache beside it            kv_cache_scheme: scales per token as they come, or k_scale and v_scale

Rounding to nearest holds one tensor as float32 at a time; what reads texts holds the model. The output appears whole or
not at all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gcu_compile.errors import CheckpointError, InvalidValueError, UnknownNameError
from gcu_compile.quantize import gptq, kv_cache
from gcu_compile.quantize.checkpoint import Writer
from gcu_compile.quantize.measure import output_errors
from gcu_compile.quantize.rounding import FORMATS, GROUP_SIZES, Format, to_nearest, to_nearest_with_zeros
from gcu_compile.quantize.source import INDEX, WHOLE, find_layers, find_shards, other_files, read_config
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
    asymmetric: bool = False,
) -> dict[str, Any]:
    """Write the checkpoint folder `model`, quantised, as the folder `out`.

    Args:
        name: of a format in `FORMATS`.
        group_size: inputs per scale, a divisor of every layer's (w4a16, w8a16); None: the largest of `GROUP_SIZES`
            that is one (w4a16), or a scale per output (w8a16, w8a8).
        progress: called with a layer's name, how many are done, and how many there are.
        cache: ask readers for an int8 KV cache.
        calibration: texts that set the scales of that cache (None: scales per token, as they come), and on which the
            outputs' errors are measured.
        method: of `METHODS`. gptq needs `calibration`: its texts say which errors matter.
        llmcompressor: the Python of an environment that has it, for gptq; None: one is made in the user's cache.
        asymmetric: a zero point beside every scale, so that a group's codes reach from its smallest weight to its
            largest (w4a16 and w8a16, rounded to nearest).

    Returns:
        format, method, asymmetric, group_size, kv_cache (None, "dynamic" or "static"), bytes before and after, and as
        dictionaries `layers`: a `LayerError` of each, `left`: a `Left` of each weight that stays float.

    Raises:
        UnknownNameError: no such format or method.
        InvalidValueError: a group size that does not divide a layer, or that the format does not have; calibration
            without text, or none for gptq.
        CheckpointError: no checkpoint in `model`, one that is quantised already or cannot be stored so, or an `out`
            that exists or cannot be written.
        GcuCompileError: llmcompressor could not be installed, or failed.
    """
    if name not in FORMATS:
        raise UnknownNameError("quantisation format", name, FORMATS)
    form = FORMATS[name]
    if form.activations and group_size is not None:
        raise InvalidValueError("group_size", group_size, f"none: {name} has a scale per output")
    if asymmetric and (form.activations or method != "nearest"):
        raise InvalidValueError("asymmetric", True, "False: zero points are for w4a16 and w8a16, rounded to nearest")
    if method not in METHODS:
        raise UnknownNameError("quantisation method", method, METHODS)
    if method == "gptq" and calibration is None:
        raise InvalidValueError("calibration", None, "texts: gptq weighs errors by what the layers see of them")
    if calibration is not None and not any(calibration):
        raise InvalidValueError("calibration", calibration, "a text")
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists already; name a folder that does not")
    config = read_config(model)
    shards = find_shards(model)
    found = find_layers(model, config, shards)
    linears = found.linears
    _fill_words(name, linears)
    size = _group_size(form, group_size, linears)
    config["quantization_config"] = scheme(form, size, found.ignore, asymmetric)
    with _aside(out) as aside:
        new = Path(aside) / "checkpoint"
        new.mkdir()
        done = itertools.count(1)
        ready = lambda name: progress(name, next(done), len(linears))  # noqa: E731
        if method == "gptq":
            texts = list(filter(None, calibration))
            integers = config["quantization_config"]
            solved = gptq.solve(model, Path(aside), integers, linears, texts, ready, llmcompressor)
            writer = Writer(form, lambda name, weight: solved.codes(name, weight.shape), found, lambda name: None)
        else:
            writer = Writer(form, lambda name, weight: _nearest(weight, form.bits, size, asymmetric), found, ready)
        scales = kv_cache.calibrate(model, calibration) if cache and calibration is not None else {}
        for shard in shards:
            target = WHOLE if len(shards) == 1 else shard.name  # readers look for one file under this name only
            writer.write(shard, new / target, scales if shard is shards[-1] else {})
        if len(shards) > 1:
            index = {"metadata": {"total_size": writer.bytes}, "weight_map": writer.where}
            (new / INDEX).write_text(json.dumps(index, indent=1))
        for file in other_files(model):
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
        "asymmetric": asymmetric,
        "group_size": size,
        "kv_cache": ("static" if calibration is not None else "dynamic") if cache else None,
        "bytes_before": sum(shard.stat().st_size for shard in shards),
        "bytes_after": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "layers": [asdict(error) for error in writer.errors],
        "left": [asdict(weight) for weight in found.left],
    }


def _nearest(weight, bits: int, size: int | None, asymmetric: bool):
    return to_nearest_with_zeros(weight, bits, size) if asymmetric else (*to_nearest(weight, bits, size), None)


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[str]:
    """A folder beside `out`, gone at the end; what the system refuses meanwhile is a `CheckpointError`."""
    from safetensors import SafetensorError

    if not out.parent.is_dir():
        raise CheckpointError(f"there is no folder {out.parent} to write {out.name} in; make it first")
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
            yield aside
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out} was not written: {error}; name a folder that can be written, on a disk with room for it"
        ) from error


def _fill_words(name: str, linears: dict[str, tuple[int, int]]) -> None:
    """Codes of packed formats share words of 32 bits: a layer whose inputs end within one is a `CheckpointError`."""

    def unfit(name: str) -> list[str]:
        form = FORMATS[name]
        return [] if form.activations else [weight for weight, (_, k) in linears.items() if form.bits * k % 32]

    if wrong := unfit(name):
        layer, k, codes = wrong[0].removesuffix(".weight"), linears[wrong[0]][1], 32 // FORMATS[name].bits
        raise CheckpointError(
            f"{layer} has {k} inputs, and {name} packs {codes} codes in a word of 32 bits: {k} is no multiple of "
            f"{codes}. Formats that fit every layer: {', '.join(other for other in FORMATS if not unfit(other))}"
        )


def _group_size(form: Format, asked: int | None, linears: dict[str, tuple[int, int]]) -> int | None:
    if asked is None and not form.grouped:
        return None
    for size in GROUP_SIZES if asked is None else (asked,):
        wrong = [name for name, (_, k) in linears.items() if size <= 0 or k % size]
        if not wrong:
            return size
    common = math.gcd(*(k for _, k in linears.values()))
    valid = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
    layer, k = wrong[0].removesuffix(".weight"), linears[wrong[0]][1]
    default = "" if asked is not None else f" (the default: one of {', '.join(map(str, GROUP_SIZES))})"
    raise InvalidValueError(
        "group_size",
        asked,
        f"a divisor of every layer's inputs, which are {valid}; {layer} has {k} inputs, no multiple of {size}{default}",
    )


def scheme(form: Format, size: int | None, ignore: list[str], asymmetric: bool = False) -> dict[str, Any]:
    """`quantization_config` of compressed-tensors; `ignore`: names or patterns of what stays float."""
    weights = {"num_bits": form.bits, "type": "int", "symmetric": not asymmetric, "dynamic": False}
    weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations if form.activations else None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if form.activations else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
