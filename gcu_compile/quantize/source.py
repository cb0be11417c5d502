"""Reads a float checkpoint: its files, its linear layers, and which other weights stay as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gcu_compile.errors import CheckpointError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Other copies of the weights, and what lists their files: none may lie beside the quantised ones, where readers look.
COPIES = (
    *("*.safetensors", "*.index.json", "pytorch_model*.bin", "*.pth", "*.pt", "*.gguf"),
    *("tf_model*.h5", "flax_model*.msgpack", "rust_model*.ot"),
)
# Weights of experts in a file's own names; transformers may hold them as one tensor and no linear layer.
EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
ROUTERS = ("re:.*\\.gate$", "re:.*shared_expert_gate$", "re:.*\\.router(\\.layer)?$")
# vLLM asks for experts that are one tensor by the names that they would have one by one.
STACKED = "re:.*\\.experts\\..*"
QUANTISED = re.compile(r"\.(qweight|weight_packed|weight_scale|weight_scale_inv)$")
# Stacked experts of Llama 4, transposed, whose readers want them numbered and apart once they are quantised.
LLAMA4 = re.compile(r"(?P<base>.*\.feed_forward\.experts)\.(?P<part>gate_up_proj|down_proj)$")
CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
TOLD = 300  # characters of another library's message that an error repeats


@dataclass
class Left:
    """A weight that stays float. `meant`: it always does (head, embedding, router, convolution); else a warning."""

    name: str
    shape: tuple[int, ...]
    reason: str
    meant: bool


@dataclass
class Layers:
    """Name of each linear layer's weight -> (N, K); the weights `left` float; the names that readers must `ignore`.

    `parts`: of a stacked tensor's name: the weights in it, as names and the places that give [K, N].
    """

    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    parts: dict[str, dict[str, tuple[int | slice, ...]]] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)


def read_config(model: Path) -> dict[str, Any]:
    """config.json of a folder whose weights are not quantised yet; else a `CheckpointError`."""
    if not model.is_dir():
        raise CheckpointError(
            f"there is no folder {model}; a model of the Hub is fetched with `hf download NAME --local-dir FOLDER`"
        )
    file = model / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; take it from where the model comes from") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); take it from where the model comes from") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{file} names no model_type, which says what its weights are; add it (say, llama)")
    for part in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if found := part.pop(key, None):
                method = found.get("quant_method") if isinstance(found, dict) else None
                _refuse(model, method or "by a method that config.json does not name")
    return config


def _refuse(model: Path, method: str) -> None:
    raise CheckpointError(f"{model} is quantised already ({method}); quantise the float model that it was made from")


def find_shards(model: Path) -> list[Path]:
    """The .safetensors files that hold the model, once: those of the index if there is one, else model.safetensors.

    Raises:
        CheckpointError: there are none, or the index names one that is missing.
    """
    index = model / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            shards = [model / name for name in names if name == Path(name).name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of weights ({error!r}); fetch it again") from error
        if lost := [name for name in names if model / name not in shards or not (model / name).is_file()]:
            raise CheckpointError(
                f"{index} names {lost[0]}, which is not beside it ({len(lost)} of {len(names)} files are missing); "
                "fetch them, or remove an index that is of other files"
            )
    elif (model / WHOLE).is_file():
        shards = [model / WHOLE]
    else:  # consolidated: the publisher's own copy of the same weights, in other names
        shards = [file for file in sorted(model.glob("*.safetensors")) if not file.match("consolidated*")]
    if not shards:
        others = sorted(file.name for file in model.iterdir() if any(map(file.match, COPIES)))
        raise CheckpointError(
            f"{model} holds no model.safetensors and no shards of it"
            + (f", only {others[0]}" if others else "")
            + ". Load the model with transformers (AutoModelForCausalLM.from_pretrained) and save it with "
            "save_pretrained, which writes .safetensors"
        )
    return shards


def other_files(model: Path) -> list[Path]:
    """The files beside the weights: tokenizer, templates, code; no second copy of the weights and no index of one."""
    return [file for file in model.iterdir() if file.is_file() and not any(map(file.match, COPIES))]


def find_layers(model: Path, config: dict[str, Any], shards: list[Path]) -> Layers:
    """The weights in `shards`, sorted into linear layers and others by config.json's model. Only headers are read.

    Raises:
        CheckpointError: transformers does not know the model, a file is damaged or holds a name twice, the weights are
            quantised already, or none of them is a linear layer's.
    """
    network = _network(model, config)
    modules = dict(network.named_modules())
    heads = {name for name, module in modules.items() if module is network.get_output_embeddings()} | {"lm_head"}
    found, kinds = Layers(), set()
    for name, shape in _shapes(shards).items():
        base = name.removesuffix(".weight")
        module = modules.get(base)
        linear = isinstance(module, torch.nn.Linear) or EXPERT.search(name)
        if QUANTISED.search(name):
            _refuse(model, f"it holds {name}")
        if len(shape) < 2 or name.endswith("bias"):
            continue
        if len(shape) == 3 and config["model_type"].startswith("llama4") and (stacked := LLAMA4.match(name)):
            found.parts[name] = _llama4(stacked["base"], stacked["part"], shape)
            n = shape[2] // 2 if stacked["part"] == "gate_up_proj" else shape[2]
            found.linears |= dict.fromkeys(found.parts[name], (n, shape[1]))
        elif base in heads:
            found.left.append(Left(name, shape, "the head", True))
        elif isinstance(module, torch.nn.Embedding):
            found.left.append(Left(name, shape, "an embedding", True))
            continue  # readers do not take it for a linear layer
        elif router := next((router for router in ROUTERS if _matches(router, base)), None):
            kinds.add(router)
            found.left.append(Left(name, shape, "a router", True))
        elif len(shape) == 2 and linear:
            found.linears[name] = shape
        elif isinstance(module, CONVOLUTIONS):
            found.left.append(Left(name, shape, "a convolution", True))
        elif len(shape) > 2:
            kinds.add(STACKED)
            reason = f"one tensor of {len(shape)} dimensions, as of stacked experts; only 2 are quantised"
            found.left.append(Left(name, shape, reason, False))
        else:
            reason = f"no linear layer of transformers' {config['model_type']} has this name"
            found.left.append(Left(name, shape, reason, False))
    if not found.linears:
        raise CheckpointError(
            f"no weight in the files of {model} belongs to a linear layer of transformers' {config['model_type']}"
        )
    if any(_matches(STACKED, name) for name in found.linears):
        kinds.discard(STACKED)  # some experts are quantised: those that are not are ignored by name
    found.ignore = ["lm_head", *sorted(heads - {"lm_head"}), *(kind for kind in (*ROUTERS, STACKED) if kind in kinds)]
    for left in found.left:
        base = left.name.removesuffix(".weight")
        if left.reason != "an embedding" and not any(_matches(ignored, base) for ignored in found.ignore):
            found.ignore.append(base)
    return found


def _llama4(base: str, part: str, shape: tuple[int, ...]) -> dict[str, tuple[int | slice, ...]]:
    every, half = slice(None), shape[2] // 2
    ranges = {"gate_proj": slice(half), "up_proj": slice(half, None)} if part == "gate_up_proj" else {part: every}
    return {
        f"{base}.{expert}.{name}.weight": (expert, every, outputs)
        for expert in range(shape[0])
        for name, outputs in ranges.items()
    }


def _matches(ignored: str, name: str) -> bool:
    return name == ignored or (ignored.startswith("re:") and re.match(ignored.removeprefix("re:"), name) is not None)


def _shapes(shards: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    where, shapes = {}, {}
    for shard in shards:
        try:
            with safe_open(shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open has no iterator)
                    if name in where:
                        raise CheckpointError(f"{name} lies in {where[name]} and in {shard}; remove the wrong copy")
                    where[name], shapes[name] = shard, tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} cannot be read ({error}); fetch it again") from error
    return dict(sorted(shapes.items()))


def _network(model: Path, config: dict[str, Any]) -> torch.nn.Module:
    """The model that config.json describes, without weights."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, __version__

    kind = config["model_type"]
    if kind not in CONFIG_MAPPING:
        own = "; a model's own code (auto_map) is not run" if "auto_map" in config else ""
        raise CheckpointError(
            f"{model / 'config.json'}: transformers {__version__} knows no model_type {kind!r}{own}. "
            "Install a transformers that knows it, or correct the name"
        )
    known = {key: value for key, value in config.items() if key != "model_type"}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **known))
    except Exception as error:  # transformers' checks of a configuration raise what they like
        raise CheckpointError(
            f"{model / 'config.json'}: transformers {__version__} makes no causal language model of model_type "
            f"{kind!r} with these settings ({_short(error)}). Correct them, or take a model that generates text"
        ) from error


def load(model: Path) -> tuple[Any, torch.nn.Module]:
    """The tokenizer and the model, in float32, of the folder `model`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # a missing file, a missing package, a broken file: each has another class
        raise CheckpointError(
            f"{model}: reading texts needs its tokenizer, which does not load ({_short(error)}); put the tokenizer's "
            "files beside config.json, or leave out --calibration"
        ) from error
    try:
        return tokenizer, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(f"{model}: transformers does not load it ({_short(error)})") from error


def _short(error: Exception) -> str:
    """What an error says, in one line that is not endless."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= TOLD else f"{text[:TOLD]} ..."
