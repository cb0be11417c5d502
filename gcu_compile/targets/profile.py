"""What a card is, as facts: each with its unit, its source and how sure the source makes it.

    >>> load_profile("gcu300").value("sip_count")
    24

The facts of a target are in `<target>.yaml` beside this file. A user's YAML file overrides any of them.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from gcu_compile.errors import InvalidValueError, UnknownNameError

PROFILES = ("gcu300", "gcu400")
Confidence = Literal["measured", "documented", "assumed"]
T = TypeVar("T")

Count = StrictInt
Number = StrictInt | StrictFloat
Names = list[StrictStr]
Counts = list[StrictInt]
Rates = dict[StrictStr, Number]
NameTable = dict[StrictStr, Names]
Shapes = dict[StrictStr, list[Counts]]


class Fact(BaseModel, Generic[T]):
    """One fact. `source` names the publication; for an assumption it says what it was derived from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: T
    unit: StrictStr
    source: StrictStr = Field(min_length=1)
    confidence: Confidence


class Profile(BaseModel):
    """The facts of one target. A null value says that no source gives one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Processors and memories
    sip_count: Fact[Count]
    cluster_count: Fact[Count | None]
    sm_clock: Fact[Number]
    l1_bytes: Fact[Count]
    l1_usable_bytes: Fact[Count]
    l2_bytes: Fact[Count | None]
    l2_reserved_bytes: Fact[Count | None]
    shared_bytes_per_warp: Fact[Count | None]
    shared_bytes_per_block: Fact[Count | None]
    accumulator_bytes: Fact[Count]
    vector_register_bytes: Fact[Count]
    vector_length_bytes: Fact[Count]
    mmu_window_bytes: Fact[Count | None]
    dram_bytes: Fact[Count]
    dram_bandwidth: Fact[Number]
    allocator_granule: Fact[Count]
    device_capability: Fact[Count]

    # Launch
    triton_arch: Fact[StrictStr]
    warp_size: Fact[Count]
    default_warps: Fact[Count]
    max_warps: Fact[Count]
    grid_max: Fact[Counts]
    max_cluster_programs: Fact[Count]
    pingpong_min_stages: Fact[Count]
    pingpong_max_stages: Fact[Count]
    pingpong_min_bytes: Fact[Count]
    inductor_block_max: Fact[dict[StrictStr, Count]]

    # Types and operations
    dtypes: Fact[Names]
    refuses_64_bit: Fact[StrictBool]
    atomics: Fact[NameTable]
    refused_operations: Fact[Names]
    aborting_externs: Fact[Names]
    slice_max_rank: Fact[Count]
    dte_max_rank: Fact[Count]
    tile_dim_max: Fact[Count | None]
    reduce_sum_multiple: Fact[Counts]
    reduce_minmax_multiple: Fact[Counts]
    dot_precisions: Fact[Names]
    dot_pairs: Fact[NameTable]
    dot_warp_multiple: Fact[Shapes]
    dot_min_m: Fact[Count | None]
    dot_min_warps: Fact[Count]

    # Rates, for the cost model
    launch_cost: Fact[Number]
    dot_rate: Fact[Rates]
    vector_rate: Fact[Number]
    dma_setup_cost: Fact[Number]
    dma_row_cost: Fact[Number]
    gather_element_cost: Fact[Number]

    def value(self, name: str) -> Any:
        """The value of one fact.

        Raises:
            UnknownNameError: no such fact.
        """
        if name not in FACTS:
            raise UnknownNameError("fact", name, FACTS)
        return getattr(self, name).value

    def facts(self) -> dict[str, dict[str, Any]]:
        """Every fact by name, as {value, unit, source, confidence}."""
        return self.model_dump()


FACTS = tuple(Profile.model_fields)


def load_profile(target: str, override_file: str = "") -> Profile:
    """The facts of `target`, with those that `override_file` names replaced.

    Args:
        target: one of `PROFILES`.
        override_file: a YAML mapping from fact name to a new value, or to a mapping with `value` and any of
            `unit`, `source`, `confidence`. A bare value gets the file as its source and confidence "assumed".

    Raises:
        UnknownNameError: no such target, fact, or key of a fact.
        InvalidValueError: a file that cannot be read, or a value of the wrong type.
    """
    if target not in PROFILES:
        raise UnknownNameError("target profile", target, PROFILES)
    facts = _shipped(target)
    if override_file:
        facts = facts | _overrides(facts, override_file)
    try:
        return Profile(**facts)
    except ValidationError as error:
        first = error.errors()[0]
        place = override_file or f"{target}.yaml"
        what = "fact " + ".".join(str(part) for part in first["loc"])
        raise InvalidValueError(what, first["input"], first["msg"], place) from error


@lru_cache
def _shipped(target: str) -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / f"{target}.yaml").read_text())


def _overrides(facts: dict[str, Any], file: str) -> dict[str, Any]:
    """The facts that `file` replaces, complete with unit and source."""
    try:
        given = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidValueError("target profile", file, f"a readable YAML file ({error})") from error
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise InvalidValueError("target profile", type(given).__name__, "a mapping from fact names to values", file)
    replaced = {}
    for name, entry in given.items():
        if name not in FACTS:
            raise UnknownNameError("fact", name, FACTS, file)
        # A fact's value may itself be a mapping; only one with a `value` key is a fact written out.
        entry = entry if isinstance(entry, dict) and "value" in entry else {"value": entry}
        for key in entry:
            if key not in Fact.model_fields:
                raise UnknownNameError(f"key of fact {name}", key, Fact.model_fields, file)
        unit = facts[name]["unit"]
        if entry.get("unit", unit) != unit:
            raise InvalidValueError(f"unit of fact {name}", entry["unit"], repr(unit), file)
        replaced[name] = {"unit": unit, "source": f"override in {file}", "confidence": "assumed"} | entry
    return replaced
