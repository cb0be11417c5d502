"""What `--json` writes: one model per report, the contract that programs may rely on.

A field may be added within a schema version; one that is removed or changes its meaning raises it. `python -m
gcu_compile.debug.schema` prints docs/json.md.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Step(Strict):
    """One step of the lowering on one graph."""

    name: str = Field(description="of the step, see `lowering/pipeline.py`")
    seconds: float = Field(description="wall time")
    nodes_before: int = Field(description="nodes of the graph, inputs and output included")
    nodes_after: int = Field(description="as above, afterwards")
    ops_before: dict[str, int] = Field(description="operation -> occurrences")
    ops_after: dict[str, int] = Field(description="as above, afterwards")


class Match(Strict):
    """One place where a rule looked."""

    rule: str = Field(description="name of the rule")
    index: int = Field(description="of the place among the rule's in this graph; `rule@index` switches it off")
    graph: int = Field(description="number of the compiled graph; `rule@graph.index` switches it off there alone")
    layer: str = Field(description="path of the innermost module; empty where none is known")
    node: str = Field(description="name of the anchor node")
    status: Literal["fused", "skipped", "near_miss", "disabled"] = Field(description="what came of it")
    reason: str = Field(description="why it was not fused")
    source: str = Field(description="`file.py:line` of the model's code")
    by: Literal["gcu", "inductor"] = Field(description="who makes the code of a fused place")


class Graph(Strict):
    """One lowered graph."""

    target: str = Field(description="what it was compiled for")
    inference: bool = Field(description="false: it needs gradients, and no rule ran")
    steps: list[Step] = Field(description="in their order")
    matches: list[Match] = Field(description="in the order in which rules looked")
    counts: dict[str, dict[str, int]] = Field(description="step without rules -> what it did -> how often")
    fused: dict[str, int] = Field(description="rule -> places fused")


class KernelCall(Strict):
    """A kernel that generated code calls."""

    name: str = Field(description="as in the generated code; `gcu::` for our fused operations")
    by: Literal["inductor", "hand-written", "library"] = Field(description="who made it")
    calls: int = Field(description="per run of the graphs")


class CacheState(Strict):
    """What the compile cache had for one Dynamo graph."""

    graph: str = Field(description="where the graph starts: `file.py:line function`")
    key: str = Field(description="what it is kept under; empty when nothing is kept")
    state: Literal["hit", "miss", "off"] = Field(description="whether it was compiled")
    reason: str = Field(description="why it was no hit")


class Explain(Strict):
    """`gcu-compile explain`, `gcu_compile.explain(...).to_json()`"""

    schema_: Literal[1] = Field(alias="schema", description="version of this table")
    graphs: list[Graph] = Field(description="in the order of compilation")
    graph_breaks: dict[str, int] = Field(description="Dynamo's reason -> occurrences")
    fallbacks: dict[str, int] = Field(description="`operation: reason` -> calls that ran as plain torch")
    calls: dict[str, int] = Field(description="`operation: implementation` -> calls of fused operations")
    options: dict[str, Any] = Field(description="the effective options")
    error: float | None = Field(description="largest absolute difference from eager; null through vLLM")
    operations: dict[str, int] = Field(description="operation -> occurrences in the lowered graphs")
    kernels: list[KernelCall] = Field(description="over all graphs")
    cache: list[CacheState] = Field(description="one entry a Dynamo graph")
    seconds: dict[str, float] = Field(description="part of compilation -> wall time")
    fused: dict[str, int] = Field(description="rule -> places fused, over all graphs")
    layers: dict[str, dict[str, dict[str, int]]] = Field(
        description="rule -> layer (empty outside of any) -> status -> places"
    )


class Bisect(Strict):
    """`gcu-compile bisect`"""

    schema_: Literal[1] = Field(alias="schema", description="version of this table")
    kind: Literal["nothing", "inductor", "match", "several", "elsewhere"] = Field(description="what is to blame")
    error: float = Field(description="largest absolute difference from eager; 0 within the tolerance table")
    runs: int = Field(description="compilations that it took")
    step: str = Field(description="of the rule")
    rule: str = Field(description="whose match is wrong; empty for other kinds, as what follows")
    index: int = Field(description="of the match; -1 for other kinds")
    graph: int = Field(description="number of its graph; -1 for other kinds, and where there is only one graph")
    layer: str = Field(description="path of the module")
    node: str = Field(description="anchor node")
    source: str = Field(description="`file.py:line` of the model's code")
    options: dict[str, Any] = Field(description="that the search started with")
    remedy: dict[str, Any] = Field(description="what to add to the options for a right result")


class Stage(Strict):
    """The graph after one step."""

    name: str = Field(description="`input`, a step of the lowering, or `inductor`")
    ops: dict[str, int] = Field(description="operation -> occurrences; empty where not counted")
    lines: list[str] | None = Field(description="one a node; null where the stage changed nothing")
    changes: list[tuple[str, int, int, int, int]] | None = Field(
        description="changed runs of lines: kind, start and end before, start and end after"
    )


class Call(Strict):
    """One call of a kernel in the generated code."""

    kernel: str = Field(description="name")
    by: Literal["inductor", "hand-written", "library"] = Field(description="who made it")
    line: int = Field(description="of the generated code, from 1")
    nodes: list[str] = Field(description="that it computes; keys of `origins`")


class Origin(Strict):
    """Where a node came from."""

    layer: str = Field(description="path of the innermost module")
    source: str = Field(description="`file.py:line` of the model's code")
    line: str = Field(description="text of that line")


class Timing(Strict):
    """Where the time of a compilation went; graphs of one compilation share it."""

    parts: dict[str, float] = Field(description="part -> seconds, with `total`")
    steps: dict[str, float] = Field(description="step of the lowering -> seconds")


class DumpedGraph(Strict):
    """One graph of a dump."""

    folder: str = Field(description="its folder in the dump")
    name: str = Field(description="where the Dynamo graph starts")
    target: str = Field(description="what it was compiled for")
    inference: bool = Field(description="false: it needs gradients")
    options: dict[str, Any] = Field(description="effective ones, without folders")
    matches: list[Match] = Field(description="as in explain")
    stages: list[Stage] = Field(description="in their order")
    code: list[str] = Field(description="lines of the generated code; empty without Inductor")
    definitions: dict[str, tuple[int, int]] = Field(description="kernel -> first and last line of its code")
    kernels: list[KernelCall] = Field(description="as in explain")
    calls: list[Call] = Field(description="in the order in which they run")
    origins: dict[str, Origin] = Field(description="node -> where it came from")
    timing: Timing = Field(description="the one part that differs between two dumps of a model")


class Dump(Strict):
    """`gcu-compile dump`, and the data of its page"""

    schema_: Literal[1] = Field(alias="schema", description="version of this table")
    graphs: list[DumpedGraph] = Field(description="by their numbers")


class CacheEntry(Strict):
    """One entry of the compile cache."""

    key: str = Field(description="what it is kept under")
    created: float = Field(description="seconds since 1970")
    graph: str = Field(description="where the graph starts")
    target: str = Field(description="what it was compiled for")
    fused: int = Field(description="places fused")
    kernels: int = Field(description="different kernels")
    seconds: float = Field(description="that its compilation took")
    bytes: int = Field(description="of its file")
    bypass: str = Field(description="why torch does not find the code again: a miss every time; empty where it does")


class CacheList(Strict):
    """`gcu-compile cache list`"""

    schema_: Literal[1] = Field(alias="schema", description="version of this table")
    folder: str = Field(description="where the entries are")
    entries: list[CacheEntry] = Field(description="newest first")
    damaged: dict[str, str] = Field(description="file -> what is wrong with it")


class CacheDiff(Strict):
    """`gcu-compile cache diff`"""

    schema_: Literal[1] = Field(alias="schema", description="version of this table")
    a: str = Field(description="key")
    b: str = Field(description="key")
    changed: dict[str, tuple[Any, Any]] = Field(description="ingredient -> value in a, value in b")


class CacheExplain(Strict):
    """`gcu-compile cache explain`"""

    schema_: Literal[1] = Field(alias="schema", description="version of this table")
    entry: str = Field(description="key; empty when the cache is")
    nearest: str = Field(description="key of the older entry most like it; empty for the first of its graph")
    changed: dict[str, tuple[Any, Any]] = Field(description="ingredient -> old value, new value")
    bypass: str = Field(description="why torch does not find the code again: a miss every time; empty where it does")


class CacheClear(Strict):
    """`gcu-compile cache clear`"""

    schema_: Literal[1] = Field(alias="schema", description="version of this table")
    folder: str = Field(description="where the entries were")
    removed: int = Field(description="how many")


class Statistic(Strict):
    """`gcu_compile.debug.shadow.statistics()`, one a place"""

    op: str = Field(description="fused operation")
    implementation: str = Field(description="what computed it")
    rule: str = Field(description="that built the call; empty for a call in the model's own code")
    layer: str = Field(description="path of the module")
    node: str = Field(description="of the call")
    calls: int = Field(description="that were compared")
    breaches: int = Field(description="that were beyond the tolerance table")
    largest: float = Field(description="largest absolute difference")
    ratio: float = Field(description="largest difference in units of the tolerance")
    unchecked: dict[str, int] = Field(description="why a call could not be compared as asked -> how often")


REPORTS = (Explain, Bisect, Dump, CacheList, CacheDiff, CacheExplain, CacheClear, Statistic)
PARTS = (Graph, Step, Match, KernelCall, CacheState, DumpedGraph, Stage, Call, Origin, Timing, CacheEntry)


def markdown() -> str:
    """docs/json.md."""
    text = [
        "# What `--json FILE` writes",
        "",
        "Written by `python -m gcu_compile.debug.schema > docs/json.md`; the tests hold every report against these",
        "models (`gcu_compile/debug/schema.py`). A field may be added within a schema version; one that goes or",
        "changes its meaning raises `schema`. `info`, `target`, `check` and `demo-model` write the table that they",
        "print.",
        "",
        "## Reports",
    ]
    for models, title in ((REPORTS, None), (PARTS, "## Their parts")):
        text += ["", title] if title else []
        for model in models:
            text += ["", f"### {model.__name__}", "", (model.__doc__ or "").strip(), ""]
            text += ["| field | type | |", "|---|---|---|"]
            for name, field in model.model_fields.items():
                text.append(f"| `{field.alias or name}` | {_type(field.annotation)} | {field.description} |")
    return "\n".join(text) + "\n"


def _type(annotation: Any) -> str:
    plain = isinstance(annotation, type) and not hasattr(annotation, "__args__")
    text = annotation.__name__ if plain else str(annotation)
    for prefix in ("typing.", f"{__name__}.", "__main__."):
        text = text.replace(prefix, "")
    return "`" + text.replace("|", "or").replace("NoneType", "null").replace("None", "null") + "`"


if __name__ == "__main__":
    print(markdown(), end="")
