"""Finds the settings that a piece of a graph means, by running it.

Probe rows are peaked, geometric and nearly flat, distinct everywhere, and far from a threshold: float32 sums of the
chain and float64 ones must keep the same tokens. A tensor of settings is given values that any of temperature, top-p
and min-p may have until its part is found, then those at the ends of that part's domain: a temperature of 0 and near
it, top-p of 1, top-k of 0 and beyond the vocabulary. Where plain torch raises or gives NaN, `multinomial` would raise,
and nothing is compared.

Sizes that are symbolic are given several numbers, far apart, so that a number that happens to be a size's share (the
20th part of a vocabulary) is not taken for a constant.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch.fx import Node

from gcu_compile.kernels.sampling import eager
from gcu_compile.lowering import probe
from gcu_compile.lowering.rule import value_of
from gcu_compile.lowering.rules.post_processing.piece import Cut, settings_nodes
from gcu_compile.torch_private import hint_of, size_at, symbols_of

LARGEST = 1 << 23  # logits of a probe
# How fast further probe rows fall, from token to token. Close to each other: a part of the chain counts only where the
# others leave it something to cut, and must not be lost for want of such a row.
DECAYS = (0.03, 0.07, 0.13, 0.19, 0.27, 0.37, 0.7, 0.95)
KINDS = 4  # of probe rows, beside those
MOST_WORK = 1 << 25  # logits that are probed for the domains of per-row settings, beyond the least that must be
TOP = 1024  # tokens of a probe row that weigh anything, and more
NOTHING = -60.0  # logarithm of a weight below every tolerance here
ROWS = ((2, 3), (3, 5))  # numbers for symbols of the rows, first and second in turn
NUMBERS = ((9, 12, 7), (14, 6, 11))  # for other symbols: a top-k
VOCABS = (997, 8192)  # least and most for a symbolic vocabulary
SCALES = (1.0, 2.0, 0.5)  # of rows
# Values of a setting's whole domain; a top-k's are made of the vocabulary.
DOMAINS = {
    "temperature": (0.0, 1e-6, 0.05, 0.3, 0.7, 1.0, 1.3, 2.5),
    "top_p": (1e-6, 0.05, 0.3, 0.77, 0.9, 0.995, 1.0),
    "min_p": (0.0, 1e-3, 0.0203, 0.3, 1.0),
}

Setting = float | int | Node


class Case:
    """One set of numbers for the symbols, and the piece's values on it."""

    def __init__(self, cut: Cut, numbers: dict):
        self.cut, self.numbers = cut, numbers
        self.rows, self.vocab = (size_at(size, numbers) for size in value_of(cut.logits).shape)
        self.kinds = KINDS + -(-len(DECAYS) // max(1, self.rows))  # each row of a probe falls in its own way
        self.found: dict = {}

    def run(self, kind: int, roles: dict[Node, str] | None = None, turn: int = 0, beyond: bool = False):
        """Probe logits, the root's value on them, and the values of the nodes that may be settings."""
        key = (kind, tuple((roles or {}).items()), turn, beyond)
        if key not in self.found:
            x = rows_of(kind, self.rows, self.vocab).to(value_of(self.cut.logits).dtype)
            given = {self.cut.logits: x}
            given |= {node: size_at(value_of(node), self.numbers) for node in self.cut.numbers}
            for index, node in enumerate(self.cut.per_row):
                given[node] = self._values(node, index, (roles or {}).get(node), kind + turn, beyond)
            root = self.cut.nodes[-1] if self.cut.nodes else self.cut.logits
            values = probe.run_all([root, *settings_nodes(self.cut)], given)
            got = values[0].float().softmax(-1) if self.cut.logs else values[0].float()
            self.found[key] = (x, got, dict(zip(settings_nodes(self.cut), values[1:], strict=True)))
        return self.found[key]

    def _values(self, node: Node, index: int, role: str | None, turn: int, beyond: bool) -> torch.Tensor:
        value = value_of(node)
        shape = [size_at(size, self.numbers) for size in value.shape]
        count = shape[0] if shape else 1
        whole = not value.is_floating_point()
        if role is None:
            generator = torch.Generator().manual_seed(100 * index + turn)
            if whole:
                some = torch.randint(1, max(2, min(self.vocab, 40)), (count,), generator=generator)
            else:
                some = 0.3 + 0.63 * torch.rand(count, generator=generator)
        else:
            domain = self.domain(role, beyond)
            # Each input at a pace of its own, so that the ends of two domains meet in many ways.
            some = torch.tensor([domain[(row * (index + 1) + turn + index) % len(domain)] for row in range(count)])
        return some.to(value.dtype).reshape(shape)

    def domain(self, role: str, beyond: bool) -> tuple:
        if role != "top_k":
            return DOMAINS[role]
        return (0, self.vocab + 3) if beyond else tuple(min(k, self.vocab) for k in (1, 2, 5, 17, 100, self.vocab))

    def setting(self, name: str, setting: Setting, values: dict[Node, torch.Tensor]) -> torch.Tensor:
        dtype = torch.int32 if name == "top_k" else torch.float32
        if not isinstance(setting, Node):
            return torch.full((self.rows,), setting, dtype=dtype)
        value = values[setting] if setting in values else size_at(value_of(setting), self.numbers)
        return torch.as_tensor(value).to(dtype).reshape(-1).expand(self.rows)


def find(cut: Cut, greedy: bool) -> dict[str, Setting] | str:
    """The settings that `cut` means, or the reason why there are none."""
    cases = _cases(cut)
    if isinstance(cases, str):
        return cases
    first = cases[0]
    try:
        for kind in range(1 if greedy else first.kinds):
            first.run(kind)
    except (KeyError, RuntimeError, IndexError, ValueError) as error:
        return f"the chain cannot be run on probes: {error}"
    if greedy:
        return {} if _holds(cases, {}, True) else "the largest logit is not the one that is taken"
    for settings in _candidates(first):
        if not all(_same_first_row(first, kind, settings) for kind in range(first.kinds)):
            continue  # one row of each kind refutes most settings
        if _holds(cases, settings, False):
            return settings
    return "the chain is not temperature, top-k, top-p and min-p by numbers, or by one value a row, of its own"


def _cases(cut: Cut) -> list[Case] | str:
    rows, vocab = value_of(cut.logits).shape
    if symbols_of(vocab) and (hint_of(vocab) is None or symbols_of(vocab) & symbols_of(rows)):
        return f"the vocabulary is {vocab}: no number is known to probe it with"
    symbols: dict[object, None] = {}
    for node in (cut.logits, *cut.nodes, *cut.per_row, *cut.numbers):
        value = value_of(node)
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            symbols |= dict.fromkeys(symbols_of(size))
    cases = []
    for turn in range(2 if symbols else 1):
        numbers, row, other = {}, itertools.cycle(ROWS[turn]), itertools.cycle(NUMBERS[turn])
        for symbol in sorted(symbols, key=str):
            if symbol in symbols_of(vocab):
                known = min(max(hint_of(vocab), VOCABS[0]), VOCABS[1])
                numbers[symbol] = 2 * known + 37 if turn else known
            else:
                numbers[symbol] = next(row if symbol in symbols_of(rows) else other)
        case = Case(cut, numbers)
        if case.rows * case.vocab > LARGEST or case.rows * case.vocab == 0:
            return f"{case.rows} x {case.vocab} logits are too many, or too few, to probe"
        cases.append(case)
    return cases


def _holds(cases: list[Case], settings: dict[str, Setting], greedy: bool) -> bool:
    """Whether the settings are those of the piece on all probes, and on every setting's whole domain."""
    for case in cases:
        for kind in range(case.kinds):
            try:
                x, got, values = case.run(kind)
            except (RuntimeError, IndexError, ValueError):
                return False
            if not _same(case, x, got, settings, values, greedy=greedy):
                return False
    roles = {} if greedy else _roles(cases[0].cut, settings)
    for case in cases if roles else ():
        longest = max(len(case.domain(role, False)) for role in roles.values())
        least = max(2, -(-longest // case.rows))  # each row takes another value
        # Every value on every kind of row, as far as the work allows.
        turns = max(least, min(case.kinds * least, MOST_WORK // (case.rows * case.vocab)))
        for turn, beyond in itertools.product(range(turns), (False, True)):
            if beyond and (turn > 0 or "top_k" not in roles.values()):
                continue
            try:
                x, got, values = case.run(turn % case.kinds, roles, turn + turn // case.kinds, beyond)
            except (RuntimeError, IndexError, ValueError):
                if beyond:
                    continue  # plain torch raises: there is nothing to be equal to
                return False
            if not _same(case, x, got, settings, values, edge=True):
                return False
    return True


def _roles(cut: Cut, settings: dict[str, Setting]) -> dict[Node, str]:
    """The part of each per-row input: of the setting that it is, or that is computed of it."""
    roles: dict[Node, str] = {}
    for name, setting in settings.items():
        queue = [setting] if isinstance(setting, Node) else []
        while queue:
            node = queue.pop()
            if node in cut.per_row:
                roles.setdefault(node, name)
            elif node in cut.nodes:
                queue += node.all_input_nodes
    return roles


def rows_of(kind: int, rows: int, vocab: int) -> torch.Tensor:
    """Distinct logits, of the row's own order: peaked, geometric, nearly flat at the top, narrow, or of one of DECAYS.

    Neighbours differ by a power of two, which a narrow dtype keeps exactly, so that what is computed over all rows
    instead of each is found out.
    """
    generator = torch.Generator().manual_seed(kind)
    rank = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(rows)]).double()
    if kind == 0:
        x = 5 - 1.37 * rank
    elif kind == 1:
        x = 3 - 0.0625 * rank.clamp(max=400) - 8 * (rank - 400).clamp(min=0)
    elif kind == 2:
        x = 1 - 2.0**-7 * rank.clamp(max=120) - 8 * (rank - 120).clamp(min=0)
    elif kind == 3:
        x = -0.5 * rank.clamp(max=60) - 8 * (rank - 60).clamp(min=0)
    else:
        number = torch.arange(rows) + (kind - KINDS) * rows
        decay = torch.tensor(DECAYS, dtype=torch.float64)[number % len(DECAYS)].unsqueeze(1)
        x = 2 - decay * rank.clamp(max=90) - 8 * (rank - 90).clamp(min=0)
    return (x * torch.tensor(SCALES)[torch.arange(rows) % len(SCALES)].unsqueeze(1)).float()


def _candidates(case: Case) -> Iterator[dict[str, Setting]]:
    """Settings built of the numbers and the per-row values in the piece, the plainest first."""
    vocab = case.vocab
    scales: set[float] = set()
    shares: set[float] = set()
    ranks: set[int] = set()
    floors: set[float] = set()
    for node in case.cut.nodes:
        name = str(node.target).split(".")[1] if "." in str(node.target) else ""
        for value in node.args:
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if name in ("div", "mul") and value > 0:
                scales |= {float(value), 1 / value}
                floors |= {float(value)} if name == "mul" and value < 1 else set()
            elif name in ("gt", "ge", "lt", "le"):
                shares |= {share for share in (float(value), 1 - value) if 0 < share < 1}
            elif name in ("topk", "kthvalue", "slice", "select") and isinstance(value, int):
                ranks |= {rank for rank in (value, -value, vocab - value, vocab - value + 1) if 0 < rank < vocab}
    for node in case.cut.numbers:  # vocabulary - k, where the vocabulary is symbolic
        value = size_at(value_of(node), case.numbers)
        ranks |= {rank for rank in (vocab - value, vocab - value + 1) if 0 < rank < vocab}
    tensors = settings_nodes(case.cut)
    reals = [node for node in tensors if value_of(node).is_floating_point()]
    whole = [node for node in tensors if not value_of(node).is_floating_point()] + case.cut.numbers
    choices = [
        [None, *reals, *sorted(scales - {1.0})],
        [None, *reals, *sorted(shares)],
        [None, *whole, *sorted(ranks)],
        [None, *reals, *sorted(floors)],
    ]
    combined = sorted(itertools.product(*choices), key=lambda some: sum(value is not None for value in some))
    for temperature, top_p, top_k, min_p in combined[:2048]:
        found = {"temperature": 1.0 if temperature is None else temperature, "top_p": top_p}
        found |= {"top_k": top_k, "min_p": min_p}
        yield {name: value for name, value in found.items() if value is not None}


def _same_first_row(case: Case, kind: int, settings: dict[str, Setting]) -> bool:
    x, got, values = case.run(kind)
    row = {node: value[:1] if value.dim() else value for node, value in values.items()}
    return _same(case, x[:1], got[:1], settings, row, rows=1)


def _expected(x: torch.Tensor, asked: dict[str, torch.Tensor]) -> torch.Tensor:
    """Probabilities of probe rows, in float64. Only the TOP largest of a row are sorted where the others weigh nothing:
    a top-k or top-p that reaches beyond them adds nothing that a comparison could see."""
    if x.shape[1] > TOP:
        top, ids = x.topk(TOP, dim=-1)
        temperature = asked.get("temperature", torch.ones(1)).clamp(min=eager.GREEDY)
        if bool(((top[:, -1] - top[:, 0]) / temperature < NOTHING).all()):
            inside = {name: value.clamp(max=TOP) if name == "top_k" else value for name, value in asked.items()}
            return torch.zeros(x.shape, dtype=torch.float64).scatter(1, ids, _expected(top, inside))
    kept, weights = eager.kept_set(x, **asked)
    mass = torch.where(kept, weights, 0.0)
    return mass / mass.sum(-1, keepdim=True)


def _same(case: Case, x, got, settings, values, greedy: bool = False, edge: bool = False, rows: int | None = None):
    """Whether `got` are the probabilities that the settings mean (greedy: largest at the same token)."""
    if greedy:
        return torch.equal(got.argmax(-1), x.float().argmax(-1))
    asked = {name: case.setting(name, setting, values)[:rows] for name, setting in settings.items()}
    if got.shape != x.shape:
        return False
    expected = _expected(x.float(), asked)
    if edge:
        finite = got.isfinite().all(-1)
        got, expected = got[finite], expected[finite]
        # A top-p of 1 is compared as a distribution: float32 sums may pass 1 before the last tokens.
        loose = asked["top_p"][finite] >= 1 if "top_p" in asked else torch.zeros(len(got), dtype=torch.bool)
        if not torch.allclose(got[loose].double(), expected[loose], rtol=1e-3, atol=1e-6):
            return False
        got, expected = got[~loose], expected[~loose]
    if not bool(((got > 0) == (expected > 1e-30))[expected > 1e-12].all()):
        return False
    return torch.allclose(got.double(), expected, rtol=1e-3, atol=1e-9)
