"""The cache key: a named list of everything that the result of a compilation depends on.

    package, torch, triton          versions
    target, target_profile          what is compiled for, and the facts known of it
    options                         those that change code
    sources                         every source file of lowering, kernels and code generation, by its hash
    inductor                        Inductor's own settings that differ from its defaults
    graph, inputs, mode             the Dynamo graph, its inputs' metadata, gradient and autocast mode

`key_of` hashes the list; `differences` says what made one key another. `docs/json.md` has the schema.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import torch

import gcu_compile
from gcu_compile import torch_private
from gcu_compile.lowering import source_hashes
from gcu_compile.lowering.provenance import layer_of
from gcu_compile.options import Options
from gcu_compile.targets.profile import PROFILES, load_profile

ADDRESS = re.compile(r"0x[0-9a-f]{6,}")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def code_ingredients(options: Options, target: str) -> dict[str, Any]:
    """What generated code depends on beside the graph, by name."""
    return {
        "package": gcu_compile.__version__,
        "torch": torch.__version__,
        "triton": torch_private.triton_version(),
        "target": target,
        "target_profile": _profile(options, target),
        "options": options.code_key(),
        "sources": source_hashes(),
    }


def graph_ingredients(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> dict[str, Any]:
    """What identifies one Dynamo graph, by name.

    Source lines are part of it, because the report tells them. Numbers of layers and names of nodes are not: two
    layers of one kind share an entry, and a hit tells the layers of the graph at hand (`layers_of`).
    """
    return {
        "inductor": torch_private.inductor_settings(),
        "graph": {"name": name_of(gm), "hash": _hash(_lines(gm))},
        "inputs": [describe(value) for value in example_inputs],
        "mode": {
            "grad": torch.is_grad_enabled(),
            "autocast": [str(torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)],
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
    }


def layers_of(gm: torch.fx.GraphModule) -> list[str]:
    """Paths of the graph's modules, by first appearance."""
    return list(dict.fromkeys(layer for node in gm.graph.nodes if (layer := _layer(node))))


def key_of(ingredients: dict[str, Any]) -> str:
    """Hash of a named list, 32 hexadecimal digits."""
    return _hash(json.dumps(ingredients, sort_keys=True, default=str))


def cache_key(options: Options, target: str) -> str:
    """Hash of `code_ingredients`: what goes into Inductor's and vLLM's own keys."""
    return key_of(code_ingredients(options, target))


def differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Ingredient (dotted for nested ones) -> (old, new), for those that differ; a missing one is None.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    {'b.c': (2, 3)}
    """
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = (dict(zip(map(str, range(len(value))), value, strict=True)) for value in (old, new))
    if not isinstance(old, dict) or not isinstance(new, dict):
        return {} if old == new else {path: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(old.keys() | new.keys()):
        found |= differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    return found


def name_of(gm: torch.fx.GraphModule) -> str:
    """Where the graph starts in the model's code: `file.py:line function`; empty where no line is known."""
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "output") and node.meta.get("stack_trace"):
            return torch_private.first_frame(node.meta["stack_trace"])
    return ""


def describe(value: Any) -> str:
    """An input's metadata; sizes may be symbols, whose known range is told."""
    if isinstance(value, torch.Tensor):
        grad = " grad" if value.requires_grad else ""
        stride = tuple(value.stride()) if value.layout == torch.strided else value.layout
        plain = f"{value.dtype} {tuple(value.shape)} {stride} {value.device}{grad}".replace("torch.", "")
        if not torch_private.is_wrapper(value):
            return plain
        names, context = value.__tensor_flatten__()  # a quantised weight of torchao, a distributed one
        inner = ", ".join(f"{name}: {describe(getattr(value, name))}" for name in names)
        return f"{type(value).__qualname__} {plain} of {inner} {ADDRESS.sub('0x', repr(context))}"
    if isinstance(value, torch.SymInt):
        return f"{value} in {torch_private.symbol_range(value)}"
    return type(value).__name__ if callable(value) else ADDRESS.sub("0x", f"{type(value).__name__} {value}")


def _lines(gm: torch.fx.GraphModule) -> str:
    """The graph as text, subgraphs too: nodes and layers by first appearance, with every source line."""
    lines: list[str] = []
    for name, module in gm.named_modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        lines.append(f"[{name}]")
        numbers = {node: f"%{number}" for number, node in enumerate(module.graph.nodes)}
        layers: dict[str, int] = {}
        for node in module.graph.nodes:
            layer = _layer(node)
            place = f"{NUMBER.sub('*', layer)}#{layers.setdefault(layer, len(layers))}"
            arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n, numbers=numbers: Named(numbers[n]))
            lines.append(f"{numbers[node]} {node.op} {_target(node)} {arguments} {place}")
            lines.append("" if node.op == "placeholder" else str(node.meta.get("stack_trace") or ""))
            if node.op == "get_attr" and (value := getattr(module, str(node.target), None)) is not None:
                lines.append(describe(value))
    return ADDRESS.sub("0x", "\n".join(lines))


def _layer(node: torch.fx.Node) -> str:
    """An input has none: where its value came from is another graph's affair."""
    return "" if node.op == "placeholder" else layer_of(node)


class Named(str):
    """A node's number; prints without quotes."""

    __repr__ = str.__str__


def _target(node: torch.fx.Node) -> str:
    """What a node calls; inputs and attributes go by their place, not by their name."""
    if node.op in ("placeholder", "get_attr"):
        return ""
    return node.target if isinstance(node.target, str) else _qualified(node.target)


def _qualified(function: Any) -> str:
    """A function's name without its address."""
    if isinstance(function, torch._ops.OpOverload):
        return str(function)
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _profile(options: Options, target: str) -> str:
    """Hash of the facts known of the target; host and cuda have no profile."""
    if target not in PROFILES:
        return "none"
    return _hash(load_profile(target, options.target_profile).model_dump_json())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
