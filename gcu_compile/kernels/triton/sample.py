"""Calls `sample_kernel.py`."""

from __future__ import annotations

import torch

from gcu_compile.kernels.triton.configs import Config, configs
from gcu_compile.kernels.triton.launch import launch, missing, target_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PER_ROW = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
ROWS = 65535  # programs in a grid
PASSES = 4  # shared by several programs; what is left of a search its row's own program does


def refuses(logits: torch.Tensor, **settings) -> str | None:
    """Why the Triton kernel cannot take these arguments, or None."""
    if logits.dtype not in FLOATS:
        return f"logits are {logits.dtype}, not one of {', '.join(map(str, FLOATS))}"
    if logits.stride(-1) != 1:
        return "a row of logits is not contiguous"
    if logits.shape[0] > ROWS:
        return f"{logits.shape[0]} rows; a grid has {ROWS} programs"
    if logits.shape[0] * max(logits.stride(0), logits.shape[1]) >= 2**31:
        return "offsets of the logits do not fit 32 bits"
    return missing()


class Arguments:
    """The settings of `gcu::sample` as the kernels take them.

    Attributes:
        per_row: [rows] float32 or int32, or None, by name.
        chain: temperature, top_k, top_p, min_p of these.
        row: what the kernels need to read a row: mask, lists, penalties, stride, vocabulary.
    """

    def __init__(self, logits: torch.Tensor, settings: dict[str, torch.Tensor | None]):
        def given(name, dtype):
            value = settings.get(name)
            return None if value is None else value.to(device=logits.device, dtype=dtype).contiguous()

        lists = []
        for kind, values, dtype in (("bias", "bias_values", torch.float32), ("history", "history_counts", torch.int32)):
            some = settings.get(f"{kind}_ids")
            absent = some is None or len(some) == 0
            names = ((f"{kind}_offsets", torch.int32), (f"{kind}_ids", torch.int32), (values, dtype))
            lists += [None if absent else given(name, kind) for name, kind in names]
        self.per_row = {name: given(name, torch.float32) for name in PER_ROW} | {"top_k": given("top_k", torch.int32)}
        self.chain = tuple(self.per_row[name] for name in ("temperature", "top_k", "top_p", "min_p"))
        penalties = (self.per_row["repetition"], self.per_row["frequency"], self.per_row["presence"])
        forbidden = given("forbidden", torch.bool)
        forbidden = None if forbidden is None else forbidden.view(torch.int8)
        self.row = (forbidden, *lists, *penalties, logits.stride(0), logits.shape[1])


def words(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[rows] int64 as [rows, 2] int32, low word first: no arithmetic on 64 bits."""
    return numbers.to(torch.int64).contiguous().view(torch.int32).to(device)


def sizes(config: Config) -> dict[str, int]:
    """The constexprs of a launch."""
    block = config.tile["BLOCK"]
    return {"BLOCK": block, "PIVOTS": config.tile["PIVOTS"], "HALVES": block.bit_length() - 1}


def run(logits: torch.Tensor, kept: torch.Tensor | None = None, splits: int | None = None, **settings) -> torch.Tensor:
    """`gcu::sample`; see `sampling/eager.py`.

    Args:
        kept: [rows, vocab] int8, written with the kept set; for tests.
        splits: programs that share a row's first passes, a power of two; None: as many as fill the card.
    """
    from gcu_compile.kernels.triton.sample_kernel import sample_kernel

    rows, vocab = logits.shape
    config = configs("sample", target_of(logits))[0]
    ids = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    if not rows:
        return ids.long()
    arguments = Arguments(logits, settings)
    numbers = (words(settings[name], logits.device) for name in ("seeds", "positions"))
    splits = _splits(rows, vocab, config) if splits is None else splits
    state = _shared_passes(logits, arguments.per_row, arguments.row, splits, config) if splits > 1 else None
    launch(
        sample_kernel, (rows,), config, ids, kept, state, logits, *numbers, *arguments.chain, *arguments.row,
        exact=True, **sizes(config),
    )  # fmt: skip
    return ids.long()


def _splits(rows: int, vocab: int, config: Config) -> int:
    """Programs per row so that the card is busy, none with less than a tile."""
    most = min(config.tile["PROGRAMS"] // rows, -(-vocab // config.tile["BLOCK"]))
    return 1 << (max(1, most).bit_length() - 1)


def _shared_passes(logits, per_row, row, splits: int, config: Config) -> torch.Tensor:
    """The states of the rows' searches after `PASSES` passes that `splits` programs per row shared."""
    from gcu_compile.kernels.triton import sample_split_kernel as kernels
    from gcu_compile.kernels.triton import states

    rows, pivots = logits.shape[0], config.tile["PIVOTS"]

    def integers(*shape):
        return torch.zeros(shape, dtype=torch.int32, device=logits.device)

    state = integers(rows, states.STATE.value)
    firsts, sums = integers(rows, 3, splits), integers(rows, kernels.FIELDS.value, splits, pivots)
    wanted = [per_row[name] for name in ("temperature", "top_k", "top_p")]
    sizes = {"PIVOTS": pivots, "SPLITS": splits}
    block = config.tile["BLOCK"]
    grid = (rows, splits)
    launch(kernels.largest_kernel, grid, config, firsts, logits, *row, exact=True, BLOCK=block, SPLITS=splits)
    launch(
        kernels.begin_kernel, (rows,), config, state, firsts, *wanted, per_row["min_p"], row[-1], exact=True, **sizes
    )
    for _ in range(PASSES):
        launch(
            kernels.measure_kernel, grid, config, sums, state, logits, wanted[0], *row, exact=True, BLOCK=block, **sizes
        )
        launch(kernels.advance_kernel, (rows,), config, state, sums, *wanted, exact=True, **sizes)
    return state
