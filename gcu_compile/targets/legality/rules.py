"""The legality rules as data: what each says, how bad a breach is, what to do, and who says so.

A rule's check is found by its id: memory accesses in `addresses.py`, the rest in `checks.py` and `launch.py`.
Severity, worst first: "abort" kills the compiler or hangs the card; "error" is refused, or gives wrong numbers;
"slow" works, by a slower path; "note" is for the reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gcu_compile.errors import UnknownNameError

SEVERITIES = ("abort", "error", "slow", "note")
BOTH = ("gcu300", "gcu400")
PTR = "flagos-ai/FlagTree triton_gcu300/lib/Analysis/PtrAnalysis.cpp at 7915eb9c"
BACKEND = "flagos-ai/FlagTree third_party/enflame/backend"
SKIPS = "flagos-ai/flagtree triton_v3.3.x python/test/unit/language/test_core_skip.csv"
TORCH_FL = "flagos-ai/Torch-FL"
KERNELSWIFT = "PHLens/kernelswift docs/s60-gcu-triton-lessons.md"


@dataclass(frozen=True)
class Rule:
    """One limit of the compiler or the card. `on`: severity on a target where it differs; absent there if ""."""

    id: str
    says: str
    severity: str
    remedy: str
    source: str
    on: dict[str, str] = field(default_factory=dict)

    def severity_on(self, target: str) -> str:
        """The severity on one target; "" if the rule does not hold there."""
        return self.on.get(target, self.severity)


_RULES = (
    # Types
    Rule(
        "no-64-bit-values",
        "No i64 or f64 elements or scalars.",
        "error",
        "cast to 32 bits before the kernel; pass Python floats as fp32",
        f"FlagTree gcu64-type-verifier; {TORCH_FL} torch_fl/compile/triton_64bit_guard.py",
        {"gcu400": "slow"},
    ),
    Rule(
        "no-64-bit-index",
        "i64 only inside index arithmetic crashes the compiler.",
        "abort",
        "keep offsets in i32: no .to(tl.int64), no i64 size or stride arguments",
        f"{TORCH_FL} issue #400 (SIGSEGV on S60)",
        {"gcu400": "slow"},
    ),
    Rule("dtype", "Element types are those of the profile.", "error", "cast to one of them", BACKEND),
    Rule(
        "unsupported-operation",
        "Operations without a lowering.",
        "error",
        "rewrite without it, or leave it to another kernel",
        SKIPS,
    ),
    Rule(
        "atomics", "Atomics exist for some operations and element types only.", "error", "reduce in two passes", SKIPS
    ),
    Rule(
        "extern-function",
        "libdevice is the fp32 __nv_* subset, and some of it crashes.",
        "abort",
        "compute it from exp, log, sqrt and the like in fp32",
        f"{TORCH_FL} docs/vendors/gcu; triton.language.extra.gcu.libdevice",
    ),
    # Memory accesses: one slice, or element by element
    Rule("address-gather", "A tensor address through these operations is a gather.", "slow", "do it on scalars", PTR),
    Rule(
        "address-abort",
        "A tensor address through any other operation reaches llvm_unreachable.",
        "abort",
        "do it on scalars; clamp by tl.where(in_range, i, 0), never tl.maximum, & or >>. A tl.where of the two values "
        "that its condition compares is folded to a maximum too",
        f"{PTR}; {TORCH_FL} (arith.maxsi, measured)",
    ),
    Rule(
        "address-loop-carried",
        "A loop-carried address needs a for loop and a start that is not a bare argument.",
        "slow",
        "add the offset to the argument before the loop",
        PTR,
    ),
    Rule("slice-rank", "A slice has rank 1 to 4.", "slow", "fold dimensions", PTR),
    Rule("dte-rank", "The DMA engine has at most 5 dimensions.", "error", "fold dimensions", SKIPS),
    Rule("slice-rank-4", "A slice of rank 4 has a dimension of stride 1.", "slow", "reorder the dimensions", PTR),
    Rule("slice-all-ones", "A tile whose sizes are all 1 is no slice.", "slow", "use a scalar access", PTR),
    Rule("slice-strides", "Static strides divide each other and fit 32 bits.", "slow", "pad the rows", PTR),
    Rule("slice-unit-stride", "At most one dimension has stride 1.", "slow", "split into separate accesses", PTR),
    Rule("slice-continual", "Each dimension moves by one stride.", "slow", "one arange per dimension", PTR),
    Rule("dynamic-stride", "A run-time stride must not be 0.", "note", "make the stride a tl.constexpr", PTR),
    Rule("mask-gather", "A mask through these operations is a gather.", "slow", "compare i32 aranges with <", PTR),
    Rule("mask-full-compare", "Masks compare 1-D tensors.", "slow", "compare before broadcasting", PTR),
    Rule("mask-abort", "| , min, max and shifts in a mask abort.", "abort", "use & of < comparisons", PTR),
    Rule("mask-other", "`other` of a masked load is one value.", "slow", "load, then tl.where", PTR),
    Rule(
        "indirect-clamp",
        "Addresses are validated before masks: a loaded index must be in range even where masked.",
        "error",
        "clamp it with tl.where(mask, index, 0)",
        "flagos-ai/FlagGems runtime/backend/_enflame",
    ),
    Rule(
        "scalar-access-in-loop",
        "Every scalar load or store is a DMA of its own.",
        "slow",
        "load a tile before the loop",
        PTR,
    ),
    Rule(
        "toolchain-3.3",
        "Triton 3.3 toolchains turn more into gathers and aborts.",
        "note",
        "use a Triton 3.6 toolchain",
        "flagos-ai/flagtree triton_v3.3.x PtrAnalysis.cpp",
    ),
    # Known-wrong patterns
    Rule(
        "strided-reduction-block",
        "A reduction over the non-contiguous axis is wrong at one row per program, and fails to compile at two.",
        "error",
        "take at least 4 rows",
        f"{TORCH_FL} #187 (measured on S60)",
        {"gcu400": "slow"},
    ),
    Rule(
        "transposed-tile",
        "tl.trans and transposed 2-D tile loads fail layout inference, sometimes with wrong values.",
        "error",
        "load the tile along its contiguous dimension",
        f"{TORCH_FL} docs/vendors/gcu (measured on S60)",
        {"gcu400": "slow"},
    ),
    # Compute
    Rule(
        "dot-dtype",
        "Dot operands have one type, and a result type that goes with it.",
        "error",
        "cast both operands to the same type",
        f"{KERNELSWIFT}; FlagTree native dot",
    ),
    Rule(
        "dot-precision", "An f32 dot has one of the profile's precisions.", "error", "input_precision='ieee'", BACKEND
    ),
    Rule(
        "dot-shape",
        "A warp's share of a dot is a multiple of the tile that the unit takes.",
        "slow",
        "larger tiles or fewer warps",
        "flagos-ai/FlagTree OptimizeDotLayout.cpp, accelerate-matmul",
    ),
    Rule(
        "dot-warps", "A native dot needs the profile's number of warps.", "slow", "raise num_warps", "FlagTree gcu400"
    ),
    Rule(
        "dot-many-warps",
        "An f16 dot at 8 warps is about twice as slow as at 1.",
        "slow",
        "try num_warps=1",
        f"{KERNELSWIFT} (measured on S60)",
        {"gcu400": ""},
    ),
    Rule(
        "reduce-shape",
        "Fast reductions need aligned sizes.",
        "slow",
        "pad the tile",
        "flagos-ai/FlagTree Dialect/GCU/IR/Ops.cpp",
    ),
    Rule(
        "scan-shape",
        "A scan vectorises only across another dimension of at least one vector.",
        "slow",
        "scan the first dimension of a wide tile, or leave the scan to the vendor's kernel",
        "flagos-ai/FlagTree triton_gcu",
    ),
    # Launch and memories
    Rule("grid", "The grid has at most so many programs in x, y, z.", "error", "loop inside the program", BACKEND),
    Rule("warps", "num_warps is a power of two up to the card's limit.", "error", "1, 2, 4 or 8 within it", BACKEND),
    Rule(
        "stages",
        "Ping-pong needs the profile's least num_stages; more than its most is cut.",
        "note",
        "num_stages=3",
        "FlagTree triton-gcu-pingpong",
    ),
    Rule(
        "tile-dim", "A tile's dimension fits the DMA engine.", "error", "smaller tiles", "FlagGems gcu400/ops/mean.py"
    ),
    Rule("l1-bytes", "What a program holds at once fits L1.", "error", "smaller tiles or more warps", BACKEND),
    Rule("l1-pingpong", "With ping-pong buffers it fits too.", "slow", "smaller tiles or num_stages=1", BACKEND),
    Rule("l2-bytes", "What its warps share fits the shared memory.", "error", "smaller dot tiles", BACKEND),
    Rule("compiles", "Triton compiles the kernel with this specimen.", "error", "see the message", "Triton"),
)
RULES = {rule.id: rule for rule in _RULES}


def rule(name: str) -> Rule:
    """A rule by its id.

    Raises:
        UnknownNameError: no such rule.
    """
    if name not in RULES:
        raise UnknownNameError("legality rule", name, RULES)
    return RULES[name]
