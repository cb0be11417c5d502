"""The lowering pipeline: a list of named steps, run, timed, counted, observed and validated in one place."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

from gcu_compile.errors import UnknownNameError
from gcu_compile.lowering import fakes, invariants
from gcu_compile.lowering.context import Context, MatchRecord, StepRecord
from gcu_compile.lowering.legalise import legalise
from gcu_compile.lowering.provenance import inherit, layer_of, source_line, spread
from gcu_compile.lowering.rule import Refusal, Rule
from gcu_compile.lowering.rules import all_rules

# In this order; what a step leaves is what the next one meets.
STEPS = ("canonicalise", "attention", "dequant_gemm", "prologues", "post_processing", "elementwise", "legalise")
# Steps that are a function over the whole graph, and the targets that have them.
WHOLE = {"legalise": (legalise, ("gcu300", "gcu400"))}


def lower(gm: torch.fx.GraphModule, context: Context) -> None:
    """Lower `gm`, a functional ATen graph, in place.

    Raises:
        UnknownNameError: an option names a step or rule that does not exist.
        InvariantViolation: a step broke the graph (a bug of ours).
    """
    check_names(context)
    spread(gm.graph)
    meanings: dict = {}
    for step in STEPS:
        if step in WHOLE and context.target not in WHOLE[step][1]:
            continue
        if step not in context.options.disable_steps:
            _run(step, gm, context, meanings)


def check_names(context: Context) -> None:
    """Every step and rule that the options name exists."""
    rules = [rule.name for rule in all_rules()]
    options = context.options
    matches = [match.split("@")[0] for match in options.disable_matches]
    for kind, names, valid in (
        ("lowering step", options.disable_steps, STEPS),
        ("rule", (*options.disable_rules, *options.enable_rules, *matches), rules),
    ):
        for name in names:
            if name not in valid:
                raise UnknownNameError(kind, name, valid)


def _run(step: str, gm: torch.fx.GraphModule, context: Context, meanings: dict) -> None:
    for observe in context.observers:
        observe(step, gm, "before")
    before, nodes = op_counts(gm), len(gm.graph.nodes)
    outputs = invariants.signature(gm)
    start = time.perf_counter()
    for rule in all_rules():
        if rule.step == step:
            apply(rule, gm, context)
    if step in WHOLE:
        context.report.counts[step] = WHOLE[step][0](gm)
    gm.graph.eliminate_dead_code()
    seconds = time.perf_counter() - start
    context.report.steps.append(
        StepRecord(step, seconds, nodes, len(gm.graph.nodes), dict(before), dict(op_counts(gm)))
    )
    if context.options.check_invariants:
        invariants.check(gm, step, outputs, meanings)
    for observe in context.observers:
        observe(step, gm, "after")


def apply(rule: Rule, gm: torch.fx.GraphModule, context: Context) -> None:
    """Try `rule` at each of its anchors, in graph order, and record what came of it."""
    options, records, off = context.options, context.report.matches, set(context.options.disable_matches)
    index = -1
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in rule.anchors:
            continue
        match = rule.match(node)
        if match is None:
            continue
        index += 1
        where = {"source": source_line(node), "graph": context.graph}
        record = MatchRecord(rule.name, index, layer_of(node), node.name, "fused", **where)
        records.append(record)
        if isinstance(match, Refusal):
            record.status, record.reason = ("near_miss" if match.near else "skipped"), match.reason
        elif rule.opt_in and rule.name not in options.enable_rules:
            record.status, record.reason = "disabled", "opt-in: name it in enable_rules"
        elif rule.name in options.disable_rules or {f"{rule.name}@{index}", record.name} & off:
            record.status, record.reason = "disabled", "switched off by an option"
        elif reason := rule.guard(match):
            record.status, record.reason = "skipped", reason
        else:
            record.reason = rule.note(node, match)
            if rule.build is None:
                record.by = "inductor"
            else:
                rewrite(rule, gm.graph, node, match)


def rewrite(rule: Rule, graph: torch.fx.Graph, node: torch.fx.Node, match: Any) -> None:
    """Put what `rule` builds in the place of `node`. New nodes get provenance and fake values."""
    place = rule.place(node, match)
    before = place.prev
    with graph.inserting_before(place):
        new = rule.build(graph, node, match)
    made = []
    while before.next is not place:
        before = before.next
        made.append(before)
    for one in made:
        inherit(one, node)
    if new in made:  # a canonical form may be a node that was there
        new.meta.setdefault(invariants.RULE, invariants.MadeBy.of(rule.name, node))
    fakes.fill(made)
    fakes.replace(node, new)
    graph.erase_node(node)


def op_counts(gm: torch.fx.GraphModule) -> Counter[str]:
    """Operation name -> occurrences."""
    return Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
