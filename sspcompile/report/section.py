"""What every section of a report is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """NaN and infinity are refused: JSON cannot hold them, and a report with them says nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
