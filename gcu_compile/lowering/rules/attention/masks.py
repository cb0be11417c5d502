"""What the masks of an attention mean: causal, sliding window, ALiBi, or a bias that is passed on as it is.

A mask that is known to be causal and nothing else disappears from the graph. One that is known to be causal and
something unknown (padding) stays as the bias, which is always right.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from gcu_compile.lowering.match import CASTS, strip
from gcu_compile.lowering.positions import Affine, Condition, Positions, TwoValued, at_least
from gcu_compile.lowering.rule import same_shape, same_size, value_of
from gcu_compile.lowering.rules.attention.operands import Attention, Axes, stops
from gcu_compile.lowering.rules.attention.scores import Scores, broadcast

aten = torch.ops.aten


class Masks:
    """Puts the masks of `scores` into `attention`."""

    def __init__(self, attention: Attention, scores: Scores, positions: Positions, floor: torch.dtype):
        self.attention, self.scores, self.positions = attention, scores, positions
        self.floor = torch.finfo(floor).min / 2  # at or below: as good as -inf, unless all keys of a query have it
        self.may_be_blind = False  # whether some query may see no key
        self.literal = False  # take every mask as a bias

    def read(self) -> str | None:
        """Read every mask; the reason why they do not fit, or None."""
        reason = self._read()
        mine = self.attention
        if reason is None and mine.restores_nan and (mine.causal or mine.window is not None):
            # Whether a query sees a key is asked of the bias alone, so that all of the mask has to be in it.
            mine.causal, mine.offset, mine.window, mine.biases, mine.slopes = False, 0, None, [], None
            self.literal = True
            return self._read()
        return reason

    def _read(self) -> str | None:
        for axes, number, inverted in self.scores.keeps:
            if reason := self._keep(axes, number, inverted):
                return reason
        for axes in self.scores.added:
            self._add(axes)
        if any(len(axes.lead) == 3 and None in axes.lead[1:] for axes in self.attention.biases):
            return "a bias differs between groups of heads, or between the heads of each group, but not between both"
        self.attention.restores_nan = self.may_be_blind and not self.scores.safe
        return None

    def _keep(self, axes: Axes, number: float, inverted: bool) -> str | None:
        condition = self.positions.condition(axes.node)
        if inverted:
            condition = ~condition
        if self._placed(condition, axes, number):
            return None
        if number != -torch.inf:
            return f"scores that are masked become {number:g}, not -inf, and the mask is not known to be causal"
        self.attention.biases.append(Inverted(axes) if inverted else axes)
        self.may_be_blind = True
        return None

    def _add(self, axes: Axes) -> None:
        for term in self._terms(axes):
            found = self.positions.of(term.node)
            if isinstance(found, Affine) and found.is_constant and same_size(found.const, 0):
                continue
            if isinstance(found, TwoValued):
                found = upright(found)
                if found.if_true == 0 and self._placed(found.condition, term, found.if_false):
                    continue
                self.may_be_blind |= -torch.inf in (found.if_false, found.if_true)
                term = self._as_bool(term, found)
            elif self._alibi(term):
                continue
            else:
                self.may_be_blind = True
            self.attention.biases.append(term)

    def _as_bool(self, term: Axes, found: TwoValued) -> Axes:
        """where(keep, 0, -inf) is the same mask as `keep`, at a quarter of the size or less."""
        node = term.node
        if (found.if_true, found.if_false) != (0, -torch.inf) or node.target is not aten.where.self:
            return term
        same = isinstance(node.args[0], Node) and same_shape(value_of(node.args[0]), value_of(node))
        return replace(term, node=node.args[0]) if same else term

    def _terms(self, axes: Axes) -> list[Axes]:
        """The summands of an added tensor, if one of them is read as something better than a bias."""
        node = strip(axes.node, CASTS)
        if self.positions.of(node) is not None or node.op != "call_function" or node.target is not aten.add.Tensor:
            return [axes]
        if node.kwargs.get("alpha", 1) != 1 or not all(isinstance(arg, Node) for arg in node.args):
            return [axes]
        terms = [t for arg in node.args for t in self._terms(broadcast(arg, replace(axes, node=node)))]
        known = any(isinstance(self.positions.of(t.node), TwoValued) or self._slopes(t) for t in terms)
        return terms if known else [axes]

    def _placed(self, condition: Condition, axes: Axes, floor: float) -> bool:
        """Whether the condition is causal, a window or both, and nothing else; then the attention has it."""
        if self.literal or floor > self.floor or not condition.exact:
            return False
        causal, offset, past = False, 0, None
        for part in condition.parts:
            rows, columns, rest = self._slope(part, axes)
            if rest or not isinstance(rows, int) or not isinstance(columns, int):
                return False
            if (rows, columns) == (1, -1) and not causal:
                causal, offset = True, part.const
            elif (rows, columns) == (-1, 1) and past is None:
                past = part.const
            else:
                return False
        window = None if past is None else offset + past + 1
        if window is not None and not (isinstance(window, int) and window >= 1):
            return False
        mine = self.attention
        if (mine.causal and causal) or (mine.window is not None and window is not None):
            return False
        if (mine.causal or mine.window is not None) and (causal or window is not None):
            return False  # one mask for the past and another for the future: their offsets would have to agree
        if not self._sees(axes, causal, offset, window) and (floor != -torch.inf or not self.scores.safe):
            return False  # such a query is uniform in the model, or NaN
        if causal or window is not None:
            mine.causal, mine.offset, mine.window = causal, offset, window
        return True

    def _slope(self, part: Affine, axes: Axes) -> tuple[Any, Any, bool]:
        """Coefficients of query and key, and whether anything else has one."""
        rank = value_of(axes.node).dim()
        coefficients = (0,) * (rank - len(part.coefficients)) + part.coefficients
        rows, columns = (0 if d is None else coefficients[d] for d in (axes.rows, axes.columns))
        others = (d for d in range(rank) if d not in (axes.rows, axes.columns))
        rest = any(coefficients[d] for d in others if not same_size(value_of(axes.node).shape[d], 1))
        return rows, columns, rest

    def _sees(self, axes: Axes, causal: bool, offset: Any, window: int | None) -> bool:
        """Whether every query is known to see a key."""
        queries, keys = self._lengths()
        if causal and window is None:
            return at_least(offset, 0) and at_least(keys, 1)
        if window is None:
            return at_least(keys, 1)
        last = keys - queries - offset  # the last query's own key is there
        return at_least(offset, 0) and at_least(last if causal else last + window - 1, 0)

    def _lengths(self) -> tuple[Any, Any]:
        q, k = self.attention.q, self.attention.k
        return q.size(q.rows), k.size(k.rows)

    def _alibi(self, term: Axes) -> bool:
        found = self._slopes(term)
        if found is None or self.attention.slopes is not None:
            return False
        self.attention.slopes = found
        return True

    def _slopes(self, term: Axes) -> tuple[Axes, float] | None:
        """(slopes, factor) of slope[head] * (factor * key + something of the query): ALiBi.

        What depends on the query alone is the same for all its keys, and leaves no trace after the softmax.
        """
        for here in stops(replace(term, node=strip(term.node, CASTS))):
            node = here.node
            if node.op != "call_function" or node.target is not aten.mul.Tensor or len(node.args) != 2:
                continue
            for slopes, distance in (node.args, node.args[::-1]):
                if not isinstance(slopes, Node) or not isinstance(distance, Node):
                    continue
                form = self.positions.of(distance)
                heads = broadcast(slopes, here)
                if not isinstance(form, Affine) or heads.rows is not None or heads.columns is not None:
                    continue
                rows, columns, rest = self._slope(form, broadcast(distance, here))
                if rest or not columns or isinstance(columns, torch.SymInt):
                    continue
                lead = heads.lead
                if len(lead) > 1 and lead[0] is not None:
                    continue  # a slope per sequence
                if None in lead[1:] or lead == (None,) or (len(lead) == 1 and self.attention.split is not None):
                    continue  # not one of each head
                return heads, float(columns)
        return None


class Inverted(Axes):
    """A bool tensor that masks where it is True."""

    def __init__(self, axes: Axes):
        super().__init__(axes.node, axes.lead, axes.rows, axes.columns)


def upright(found: TwoValued) -> TwoValued:
    """The same with 0, where there is one, as the value of what is kept."""
    if found.if_false == 0 and found.if_true != 0:
        return TwoValued(~found.condition, found.if_false, found.if_true)
    return found
