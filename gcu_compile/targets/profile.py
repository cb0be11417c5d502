"""What a card is, as facts: each with its unit, its source and how sure the source makes it.

    >>> load_profile("gcu300").value("sip_count")
    24

The facts of a target are in `<target>.yaml` beside this file. A user's YAML file overrides any of them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

PROFILES = ("gcu300", "gcu400")
Confidence = Literal["measured", "documented", "assumed"]

Count = StrictInt
Rate = StrictFloat | StrictInt
Flag = StrictBool
Names = list[StrictStr]
Counts = list[StrictInt]
Rates = dict[StrictStr, Rate]
Table = dict[StrictStr, list[StrictStr]]
Shapes = dict[StrictStr, list[list[StrictInt]]]


class Fact[T](BaseModel):
    """One fact. `source` names the publication; an assumption says there what it was derived from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: T
    unit: str
    source: str = Field(min_length=1)
    confidence: Confidence
