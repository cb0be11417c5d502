"""Attention, KV write and rotation of one layer, step after step, without the cost of a call of their operations.

`torch.ops.gcu.paged_attention` checks and converts some sixty numbers on every call, of which a layer of a model keeps
all but ten. `Layer` converts the others once, `Step` those that the layers of one step share; a call is then a few
microseconds. It means what the operations mean: whatever it does not take at a glance goes through them, which run it
or say what is wrong with it.
"""

from __future__ import annotations

import torch

from gcu_compile.kernels import registry
from gcu_compile.kernels.attention import checks, paged, rope, write
from gcu_compile.kernels.host import attention as host
from gcu_compile.kernels.host import build
from gcu_compile.kernels.host import rope as host_write
from gcu_compile.options import debug_checks

# Fields of the C++ kernel's arguments that `Step` fills.
TABLES = host.FIELDS.step[host.FIELDS.step.index("sequences") :]


class Step:
    """Tables of a batch, checked and converted once for all layers; their numbers are read at each call.

    Args:
        block_table, query_start_loc, seq_lens, causal: as for `gcu::paged_attention`.
        slot_mapping: as for `gcu::write_kv`, or None: nothing is written.

    Raises:
        InvalidInputError: shapes or dtypes that have no meaning.
    """

    def __init__(self, block_table, query_start_loc, seq_lens, slot_mapping=None, causal: bool = True):
        self.given = block_table, query_start_loc, seq_lens, slot_mapping, causal
        checks.paged_layout("paged_attention", block_table, query_start_loc, seq_lens)
        if slot_mapping is not None and (slot_mapping.dim() != 1 or slot_mapping.dtype != torch.int64):
            is_ = f"{slot_mapping.dtype} {tuple(slot_mapping.shape)}"
            raise checks.invalid("write_kv", "slot_mapping", is_, "int64 [tokens]")
        self.block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        self.query_start_loc, self.seq_lens = query_start_loc.contiguous(), seq_lens.contiguous()
        self.slot_mapping, self.causal = None if slot_mapping is None else slot_mapping.contiguous(), causal
        self.threads = torch.get_num_threads()
        self.native = all(x.device.type == "cpu" for x in (block_table, query_start_loc, seq_lens))
        starts = self.query_start_loc.data_ptr()
        self.tables = (  # TABLES
            seq_lens.shape[0],
            self.block_table.data_ptr() or starts,  # an empty tensor has no address, and none means "dense"
            starts,
            self.seq_lens.data_ptr(),
            self.block_table.stride(0),
            self.block_table.shape[1],
            int(causal),
            self.threads,
        )

    def numbers(self) -> tuple[int, ...]:
        """All that a layer's calls take from it; `NUMBERS` says where they stand."""
        return (*self.tables, 0 if self.slot_mapping is None else self.slot_mapping.data_ptr())


# C++ function -> byte in its arguments -> which of `Step.numbers` stands there.
NUMBERS = {
    "gcu_attention": {host.FIELDS.offset(name): i for i, name in enumerate(TABLES)},
    "gcu_rope_and_cache": {host_write.FIELDS.offset("slots"): len(TABLES)},
}


class Layer:
    """One layer's cache and settings.

    Args:
        dtype, heads: of the queries.
        k_cache, v_cache: as for `gcu::paged_attention`; they and the scales are held as long as the layer lives.
        k_scale_cache, v_scale_cache: of int8 caches: read by `attend`, written by `write`.
        k_scale, v_scale, k_zero_point, v_zero_point: instead of those, for scales that stay as they are.
        settings: the keyword arguments of `gcu::paged_attention` but `causal`, and alibi_slopes and sinks.
    """

    def __init__(self, dtype, heads, k_cache, v_cache, k_scale_cache=None, v_scale_cache=None, k_scale=None,
                 v_scale=None, k_zero_point=None, v_zero_point=None, **settings):  # fmt: skip
        self.caches = {"k_cache": k_cache, "v_cache": v_cache}
        fixed = {"k_scale": k_scale, "v_scale": v_scale, "k_zero_point": k_zero_point, "v_zero_point": v_zero_point}
        self.written = self.caches | fixed | {"k_scale_cache": k_scale_cache, "v_scale_cache": v_scale_cache}
        self.settings = {**fixed, **settings}
        if k_scale_cache is not None:
            self.settings |= {"k_scale": k_scale_cache, "v_scale": v_scale_cache}
        self.dtype = dtype
        _, kv_heads, _, size = k_cache.shape
        v_size = v_cache.shape[3]
        self.q_shape, self.out_shape = (heads, size), (heads, v_size)
        self.k_shape, self.v_shape = (kv_heads, size), (kv_heads, v_size)
        self._attend = self._write = None
        self._held: list = []
        self._held_by_write: list = []
        self._turn: Turn | None = None
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # parameters, which may change or move
        if k_cache.device.type == "cpu" and dtype in host.DTYPES and dtype.is_floating_point:
            self._prepare(heads)

    def _prepare(self, heads: int) -> None:
        none = torch.empty(0, dtype=torch.int32)
        q = torch.empty(0, *self.q_shape, dtype=self.dtype)
        paged.check(q, **self.caches, block_table=none.view(0, 0), query_start_loc=torch.zeros(1, dtype=torch.int32),
                    seq_lens=none, **self.settings)  # fmt: skip
        k, v = (torch.empty(0, *shape, dtype=self.dtype) for shape in (self.k_shape, self.v_shape))
        write.check(k, v, torch.empty(0, dtype=torch.int64), **self.written)
        if host.refuses_paged(q, **self.caches) is None:
            given = {"alibi_slopes": None, "sinks": None, "window": None, "soft_cap": 0.0, **self.settings}
            for name in ("alibi_slopes", "sinks"):
                if given[name] is not None:
                    copy = torch.empty(heads, dtype=torch.float32)
                    self._copies.append((copy, given[name]))
                    given[name] = copy
            fields, held = host.paged_fields(self.dtype, heads, **self.caches, **given)
            self._attend, self._held = host.FIELDS.kept(fields), held
        if host_write.refuses(k, self.caches["k_cache"]) is None:
            fields, held = host_write.write_fields(self.dtype, **self.written)
            self._write, self._held_by_write = host_write.FIELDS.kept(fields), held

    def tensors(self) -> list[torch.Tensor]:
        """All that its kernels read and write but what they are called with."""
        held = [*self.written.values(), *self.settings.values(), *self._held, *self._held_by_write]
        held += self._turn.tensors() if self._turn else []
        return [x for x in held if isinstance(x, torch.Tensor)]

    def attend(self, q: torch.Tensor, output: torch.Tensor, step: Step) -> None:
        """`gcu::paged_attention` of `q` [tokens, heads, head_dim] into `output` [tokens, heads, v_dim]."""
        tokens, *sizes = q.shape
        prepared = (
            self._attend is not None
            and step.native
            and registry.watcher is None  # the shadow check sees operations
            and q.dtype is self.dtype
            and output.dtype is self.dtype
            and tuple(sizes) == self.q_shape
            and output.shape == (tokens, *self.out_shape)
            and output.is_contiguous()
        )
        at = q.stride()
        if not prepared or at[2] != 1:
            tables = step.block_table, step.query_start_loc, step.seq_lens
            output.copy_(torch.ops.gcu.paged_attention(q, *self.caches.values(), *tables, causal=step.causal,
                                                       **self.settings))  # fmt: skip
            return
        for copy, source in self._copies:
            copy.copy_(source)
        size = self.out_shape[1]
        self._attend.update(q.data_ptr(), output.data_ptr(), 0, at[1], at[0], 0, size, self.out_shape[0] * size, tokens,
                            *step.tables)  # fmt: skip
        registry.calls["paged_attention", "host_cpp"] += 1
        if build.load("attention").gcu_attention(self._attend.pointer):  # lengths or entries out of range: which?
            paged.values(q, *self.caches.values(), step.block_table, step.query_start_loc, step.seq_lens,
                         causal=step.causal, window=self.settings.get("window"))  # fmt: skip

    def write(self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """`gcu::write_kv` of the first tokens: `k` [tokens, kv_heads, head_dim], `v` [tokens, kv_heads, v_dim].

        Rows of `k` and `v` past the slots are padding.
        """
        k_at, v_at, slots = k.stride(), v.stride(), slot_mapping.shape[0]
        prepared = (
            self._write is not None
            and _are_slots(slot_mapping)
            and registry.watcher is None
            and k.dtype is self.dtype
            and v.dtype is self.dtype
            and k.shape[1:] == self.k_shape
            and v.shape[1:] == self.v_shape
            and slots <= k.shape[0] == v.shape[0]
            and k_at[1:] == (self.k_shape[1], 1)
            and v_at[1:] == (self.v_shape[1], 1)
            and not debug_checks()
        )
        if not prepared:
            torch.ops.gcu.write_kv(k[:slots], v[:slots], slot_mapping, **self.written)
            return
        self._write.update(0, 0, 0, k.data_ptr(), k_at[0], v.data_ptr(), v_at[0], slots, 0, slot_mapping.data_ptr(),
                           torch.get_num_threads(), 0, 0)  # fmt: skip
        registry.calls["write_kv", "host_cpp"] += 1
        if build.load("rope").gcu_rope_and_cache(self._write.pointer):  # a slot out of range: which?
            write.values(slot_mapping, self.caches["k_cache"])

    def rotate_and_write(self, qkv, cos_sin, positions, slot_mapping, q_norm=None, k_norm=None, *, interleaved=False,
                         eps=1e-6, site="") -> torch.Tensor:  # fmt: skip
        """`gcu::rope_and_cache` of `qkv` [tokens, q + k + v sizes] into the layer's cache.

        Args:
            slot_mapping: of the first tokens; the rest is padding, as slot -1 is.
            site: what the shadow check calls this place.
            the rest: as for the operation.

        Returns:
            q [tokens, heads, head_dim].
        """
        tokens = qkv.shape[0]
        if slot_mapping.shape[0] != tokens:
            slots = slot_mapping.new_full((tokens,), -1)
            slots[: slot_mapping.shape[0]] = slot_mapping[:tokens]
            slot_mapping = slots
        prepared = (
            self._write is not None
            and registry.watcher is None
            and qkv.dtype is self.dtype
            and qkv.stride(1) == 1
            and positions is not None  # else the angles are of this step, and lie elsewhere in the next
            and positions.shape == slot_mapping.shape
            and _are_slots(positions)
            and _are_slots(slot_mapping)
            and not debug_checks()
        )
        turn = self._turn_of(qkv, cos_sin, q_norm, k_norm, interleaved, eps) if prepared else None
        if turn is None:
            how = {"interleaved": interleaved, "eps": eps, "site": site}
            given = {**self.written, "q_norm": q_norm, "k_norm": k_norm}
            return torch.ops.gcu.rope_and_cache(qkv, cos_sin, positions, slot_mapping, **given, **how)
        out, q, row = qkv.new_empty((tokens, *self.q_shape)), qkv.data_ptr(), qkv.stride(0)
        q_norm, k_norm = host.floats(q_norm), host.floats(k_norm)
        turn.fields.update(q, out.data_ptr(), row, q + turn.k_at, row, q + turn.v_at, row, tokens,
                           positions.data_ptr(), slot_mapping.data_ptr(), torch.get_num_threads(),
                           host.pointer(q_norm), host.pointer(k_norm))  # fmt: skip
        registry.calls["rope_and_cache", "host_cpp"] += 1
        if build.load("rope").gcu_rope_and_cache(turn.fields.pointer):  # a slot or a position out of range: which?
            rope.values(qkv, cos_sin, positions, slot_mapping, self.caches["k_cache"])
        return out

    def _turn_of(self, qkv, cos_sin, q_norm, k_norm, interleaved, eps) -> Turn | None:
        """What of a rotation stays from step to step, made once for a table; None: the operation shall look at it."""
        turn, width = self._turn, qkv.shape[1]
        key = cos_sin.data_ptr(), width, interleaved, eps, q_norm is None, k_norm is None
        if turn is None or cos_sin is not turn.cos_sin or key != turn.key:
            if cos_sin.dtype not in host.DTYPES or cos_sin.dim() != 2 or cos_sin.stride(1) != 1:
                return None
            rope.check_layer(qkv, cos_sin, *self.written.values())
            for norm in (q_norm, k_norm):
                if norm is not None and norm.shape != (self.q_shape[1],):
                    return None
            if width != self.q_shape[0] * self.q_shape[1] + self.k_shape[0] * (self.k_shape[1] + self.v_shape[1]):
                return None
            self._turn = turn = Turn(self, cos_sin, key)
        return turn


class Turn:
    """A rotation's part of a layer's prepared write."""

    def __init__(self, layer: Layer, cos_sin: torch.Tensor, key: tuple):
        heads, size = layer.q_shape
        fields, self._held = host_write.write_fields(layer.dtype, **layer.written)
        fields |= host_write.turn_fields(heads, cos_sin, *key[2:4])
        self.cos_sin, self.key, self.fields = cos_sin, key, host_write.FIELDS.kept(fields)
        self.k_at = heads * size * layer.dtype.itemsize
        self.v_at = self.k_at + layer.k_shape[0] * size * layer.dtype.itemsize

    def tensors(self) -> list[torch.Tensor | None]:
        return [self.cos_sin, *self._held]


def _are_slots(x: torch.Tensor) -> bool:
    """Whether a C++ kernel can read these slots or positions as they lie."""
    return x.dtype is torch.int64 and x.dim() == 1 and x.is_contiguous() and x.device.type == "cpu"
