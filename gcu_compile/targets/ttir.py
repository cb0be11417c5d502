"""TTIR text as operations, values and source lines. Reading needs no Triton: a dumped file can be checked anywhere.

>>> module = parse(compile_ttir(kernel, {"x": "*fp32", "n": "i32"}, {"BLOCK": 128}))
>>> [op.name for op in module.function.walk()]
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from gcu_compile.errors import InvalidInputError
from gcu_compile.targets.triton_private import compile_ttir
from gcu_compile.targets.ttir_types import (
    STRING,
    Type,
    attribute,
    balanced,
    parse_type,
    result_types,
    split_top,
    strip_locations,
)

__all__ = ["Function", "Location", "Module", "Op", "Region", "Type", "Value", "attribute", "compile_ttir", "parse"]
NAME = re.compile(r"%[\w$.\-]+(?:#\d+)?")
ASSIGNED = re.compile(r"^(%[\w$.\-]+(?::\d+)?(?:, %[\w$.\-]+(?::\d+)?)*) = ")
OPERATION = re.compile(r'"?([a-z_]\w*\.[\w.]+)"?')


@dataclass(frozen=True)
class Location:
    """Where in the user's source an operation came from; file "" where TTIR does not say."""

    file: str = ""
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else "?"


@dataclass(eq=False)
class Value:
    """An operation's result (`op`, `index`), or an argument of a region or function (`owner`, `index`)."""

    name: str
    type: Type
    op: Op | None = None
    owner: Region | None = None
    index: int = 0
    users: list[Op] = field(default_factory=list, repr=False)


@dataclass(eq=False)
class Region:
    """Arguments and operations of one body. `parent` is None for a function's."""

    parent: Op | None
    arguments: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list, repr=False)

    def walk(self) -> Iterator[Op]:
        """Every operation in order of the text, each before those inside it."""
        for op in self.ops:
            yield op
            for region in op.regions:
                yield from region.walk()

    @property
    def terminator(self) -> Op:
        """The last operation: what a loop's or a branch's body yields."""
        return self.ops[-1]


@dataclass(eq=False)
class Op:
    """One operation. `text` is its line without locations, from the name on."""

    name: str
    text: str
    operands: list[Value]
    results: list[Value] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list, repr=False)
    location: Location = Location()
    block: Region | None = field(default=None, repr=False)

    @property
    def result(self) -> Value:
        """The first result."""
        return self.results[0]

    def ancestors(self) -> Iterator[Op]:
        """The operations around this one, nearest first."""
        block = self.block
        while block is not None and block.parent is not None:
            yield block.parent
            block = block.parent.block


@dataclass(eq=False)
class Function(Region):
    """A kernel, or a function that it calls."""

    name: str = ""
    public: bool = True


@dataclass(eq=False)
class Module:
    """All functions of one TTIR text."""

    functions: list[Function]

    @property
    def function(self) -> Function:
        """The kernel: the first public function."""
        return next((f for f in self.functions if f.public), self.functions[0])


def parse(text: str) -> Module:
    """Read TTIR text.

    Raises:
        InvalidInputError: text that is not TTIR, or that names a value before it is defined; says which line.
    """
    module = _Parser(text).module()
    if not module.functions:
        raise InvalidInputError("this text holds no tt.func: it is not TTIR")
    return module


class _Parser:
    """One pass over the lines; `scopes` holds the names visible in each open region."""

    def __init__(self, text: str):
        self.lines = text.splitlines()
        self.places = {m[1]: m[2] for m in re.finditer(r"^(#loc\d*) = loc\((.*)\)$", text, re.M)}
        self.functions: list[Function] = []
        self.regions: list[Region] = []
        self.scopes: list[dict[str, Value]] = []
        # Result names, as (name, count or ""), of operations whose types stand after their regions.
        self.pending: dict[Op, list[tuple[str, str]]] = {}
        self.number = 0

    def module(self) -> Module:
        for number, raw in enumerate(self.lines, 1):
            self.number = number
            line, place = strip_locations(raw.strip())
            line = re.sub(r"\s*// (pred|no pred).*$", "", line)
            if not line or line.startswith(("#", "module", "{-#", "//")) or (line[0] == "}" and not self.regions):
                continue
            try:
                self.line(line, place)
            except (AttributeError, IndexError, KeyError, ValueError) as error:
                raise InvalidInputError(f"TTIR line {self.number} cannot be read: {raw.strip()} ({error})") from error
        if self.regions:
            raise InvalidInputError(f"TTIR ends inside {self.functions[-1].name}: the text is cut off")
        return Module(self.functions)

    def line(self, line: str, place: str) -> None:
        if line.startswith("tt.func"):
            return self.function(line)
        if line.startswith("^"):
            return self.block_arguments(line)
        if line.startswith("}"):
            return self.close(line, place)
        return self.operation(line, place)

    def function(self, line: str) -> None:
        start = line.index("(")
        end = balanced(line, start)
        region = Function(None, name=line[:start].split("@")[-1], public="private" not in line[:start])
        self.functions.append(region)
        if line.endswith("{"):
            self.open(region, {})
            for argument in split_top(line[start + 1 : end - 1]):
                name, kind = argument.split(":", 1)
                self.argument(name.strip(), split_top(kind, " {")[0])

    def open(self, region: Region, names: dict[str, Value]) -> None:
        self.regions.append(region)
        self.scopes.append(dict(names))

    def argument(self, name: str, kind: str) -> None:
        region = self.regions[-1]
        value = Value(name, parse_type(kind), owner=region, index=len(region.arguments))
        region.arguments.append(value)
        self.scopes[-1][name] = value

    def block_arguments(self, line: str) -> None:
        if "(" not in line:
            return
        start = line.index("(")
        region = self.regions[-1]
        for argument in split_top(line[start + 1 : balanced(line, start) - 1]):
            name, kind = (part.strip() for part in argument.split(":", 1))
            if region.ops:
                # A later block of a function with early returns: what reaches it depends on the branch.
                self.scopes[-1][name] = Value(name, parse_type(kind))
            else:
                self.argument(name, kind)

    def close(self, line: str, place: str) -> None:
        closed = self.regions.pop()
        self.scopes.pop()
        op = closed.parent
        if op is None:
            return
        if line.endswith("{"):
            self.enter(op)
            return
        op.location = self.location(place)
        rest = line.lstrip("})").strip()
        op.text += " " + rest
        if op in self.pending:
            self.results(op, self.pending.pop(op), result_types(op.name, op.text))

    def enter(self, op: Op) -> None:
        region = Region(op)
        op.regions.append(region)
        self.open(region, self.scopes[-1])

    def operation(self, line: str, place: str) -> None:
        assigned = ASSIGNED.match(line)
        text = line[assigned.end() :] if assigned else line
        name = OPERATION.match(text).group(1)
        bare = STRING.sub('""', text)
        op = Op(name, text, [], location=self.location(place), block=self.regions[-1])
        names = re.findall(r"(%[\w$.\-]+)(?::(\d+))?", assigned.group(1)) if assigned else []
        carried, loop = [], None
        if name in ("scf.for", "scf.while"):
            loop = re.match(r"scf\.for (?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%\S+)", bare)
            carried = re.findall(r"(%[\w$.\-]+) = (%[\w$.\-]+(?:#\d+)?)", bare[loop.end() if loop else 0 :])
            used = [*(loop.groups()[1:] if loop else ()), *(start for _, start in carried)]
        else:
            used = NAME.findall(bare)
        op.operands = [self.value(n) for n in used]
        for operand in op.operands:
            operand.users.append(op)
        self.regions[-1].ops.append(op)
        if not bare.endswith("{"):
            self.results(op, names, result_types(name, text))
            return
        op.text = text[:-1].rstrip("( ")
        if name.startswith("scf."):
            kinds = result_types(name, op.text) if name == "scf.while" else _after_arrow(op.text)
            self.results(op, names, kinds)
        else:
            self.pending[op] = names
        self.enter(op)
        if loop:
            self.argument(loop[1], op.operands[0].type.text)
        for (argument, _), value in zip(carried, op.operands[-len(carried) :], strict=False):
            self.argument(argument, value.type.text)

    def results(self, op: Op, names: list[tuple[str, str]], kinds: list[Type]) -> None:
        spelled = []
        for name, count in names:
            spelled += [f"{name}#{i}" for i in range(int(count))] if count else [name]
        if len(kinds) < len(spelled):
            # One type stands for all results: tt.split, arith.mulsi_extended and their like.
            kinds = kinds + kinds[-1:] * (len(spelled) - len(kinds))
        for index, name in enumerate(spelled):
            value = Value(name, kinds[index], op=op, index=index)
            op.results.append(value)
            self.scopes[-1][name] = value

    def value(self, name: str) -> Value:
        found = self.scopes[-1].get(name)
        if found is None:
            raise InvalidInputError(f"TTIR line {self.number} uses {name}, which nothing before it defines")
        return found

    def location(self, place: str) -> Location:
        """Follow names and call sites to a file and line, the innermost outside of Triton's own library."""
        chain = list(self.chain(place, 0))
        return next((at for at in chain if "/triton/" not in at.file), chain[-1] if chain else Location())

    def chain(self, place: str, depth: int) -> Iterator[Location]:
        found = re.match(r'"([^"]+)":(\d+):(\d+)', place)
        if found:
            yield Location(found[1], int(found[2]), int(found[3]))
        elif depth < 32:
            for name in re.findall(r"#loc\d*", place):
                yield from self.chain(self.places.get(name, ""), depth + 1)
            if not re.search(r"#loc\d*", place):
                for inner in re.finditer(r'"([^"]+)":(\d+):(\d+)', place):
                    yield Location(inner[1], int(inner[2]), int(inner[3]))


def _after_arrow(header: str) -> list[Type]:
    """The types in `... -> (a, b) : i32`."""
    found = header.rfind(" -> (")
    if found < 0:
        return []
    start = found + len(" -> ")
    return [parse_type(part) for part in split_top(header[start + 1 : balanced(header, start) - 1])]
