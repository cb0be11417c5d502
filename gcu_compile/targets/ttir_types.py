"""The small grammar under TTIR's text: types, attributes, locations, and what an operation's type suffix says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

BITS = {"index": 64, "bf16": 16, "tf32": 32}
OPENING, CLOSING = "([{<", ")]}>"
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


@dataclass(frozen=True)
class Type:
    """A TTIR type. `shape` is () for a scalar; `element` is "f16" also for a pointer to f16 (`pointer` is True)."""

    text: str
    shape: tuple[int, ...]
    element: str
    pointer: bool = False
    # A pointer to a whole tile (tt.make_tensor_ptr) or a descriptor: `shape` is then the tile's.
    block: bool = False

    @property
    def is_tensor(self) -> bool:
        """Whether this is a tensor of values or of pointers."""
        return self.text.startswith("tensor<")

    @property
    def bits(self) -> int:
        """Bits of one element as stored; a pointer's own width is 64."""
        return 64 if self.pointer else element_bits(self.element)

    @property
    def count(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def element_bits(element: str) -> int:
    """Bits of "f16", "i32", "f8E4M3FN", ...; 0 for what is no number (a token, say)."""
    if element in BITS:
        return BITS[element]
    found = re.match(r"[a-z]+(\d+)", element)
    return int(found.group(1)) if found else 0


@lru_cache(maxsize=4096)
def parse_type(text: str) -> Type:
    """The type that `text` spells."""
    text = text.strip()
    if text.startswith(("!tt.ptr<", "!tt.tensordesc<")):
        inner = split_top(text[text.index("<") + 1 : -1])[0]
        pointee = parse_type(inner if "x" not in inner or inner.startswith(("tensor<", "!")) else f"tensor<{inner}>")
        return Type(text, pointee.shape, pointee.element, True, pointee.is_tensor)
    if text.startswith("tensor<"):
        inner = split_top(text[len("tensor<") : -1])[0]
        sizes = re.match(r"(?:\d+x)*", inner).group(0)
        element = parse_type(inner[len(sizes) :])
        shape = tuple(int(size) for size in sizes.split("x")[:-1])
        return Type(text, shape, element.element, element.pointer)
    return Type(text, (), text)


def tensor_of(shape: tuple[int, ...], element: str) -> Type:
    """The type of a tensor of `element`, or of a scalar where `shape` is ()."""
    return parse_type(f"tensor<{''.join(f'{size}x' for size in shape)}{element}>" if shape else element)


def split_top(text: str, separator: str = ",") -> list[str]:
    """`text` cut at every `separator` that no bracket and no string encloses; parts are stripped."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(text):
        if text[at] == '"':
            at = STRING.match(text, at).end()
            continue
        if text.startswith("->", at):
            at += 2
            continue
        depth += (text[at] in OPENING) - (text[at] in CLOSING)
        if depth == 0 and text.startswith(separator, at):
            parts.append(text[start:at].strip())
            at += len(separator)
            start = at
            continue
        at += 1
    return [part for part in [*parts, text[start:].strip()] if part]


def balanced(text: str, start: int) -> int:
    """Index just after the bracket that closes the one at `start`."""
    depth, at = 0, start
    while at < len(text):
        if text[at] == '"':
            at = STRING.match(text, at).end()
            continue
        if text.startswith("->", at):
            at += 2
            continue
        depth += (text[at] in OPENING) - (text[at] in CLOSING)
        at += 1
        if depth == 0:
            return at
    return len(text)


def strip_locations(text: str) -> tuple[str, str]:
    """`text` without its `loc(...)` parts, and what stood in the last of them ("" if none)."""
    kept, last, at = [], "", 0
    for found in re.finditer(r"\s?\bloc\(", text):
        if found.start() < at:
            continue
        end = balanced(text, found.end() - 1)
        kept.append(text[at : found.start()])
        last, at = text[found.end() : end - 1], end
    return "".join([*kept, text[at:]]).rstrip(), last


def attribute(text: str, name: str) -> str | None:
    """The value of attribute `name` in an operation's text, without its type: "1" for `axis = 1 : i32`."""
    found = re.search(rf"(?<![\w.]){re.escape(name)} = ", text)
    if found is None:
        return None
    start = found.end()
    at = start
    while at < len(text) and text[at] not in ",}>:)":
        at = balanced(text, at) if text[at] in OPENING else at + 1
    return text[start:at].strip()


def result_types(name: str, text: str) -> list[Type]:
    """Types of the results, from the end of an operation's line. Empty: no result, or none that is written."""
    parts = split_top(text, " : ")
    if len(parts) < 2:
        return [parse_type("i1")] if name == "arith.constant" else []
    suffix = parts[-1]
    for arrow in (" -> ", " to "):
        found = suffix.rfind(arrow)
        if found >= 0:
            suffix = suffix[found + len(arrow) :].strip()
            inner = suffix[1:-1] if suffix.startswith("(") else suffix
            return [parse_type(part) for part in split_top(inner)]
    types = [parse_type("!tt.ptr" + t if t.startswith("<") else t) for t in split_top(suffix)]
    first = types[0]
    if name == "tt.load":
        return [tensor_of(first.shape, first.element)]
    if name in ("arith.cmpi", "arith.cmpf"):
        return [tensor_of(first.shape, "i1")]
    if name in ("arith.select", "tt.make_tensor_descriptor"):
        return types[-1:]
    return types[:1]
