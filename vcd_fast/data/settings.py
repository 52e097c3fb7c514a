"""The section `data` of a run's configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class DataSettings(BaseModel):
    """Where pictures and prompts are, and which of them are kept from training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pictures: str = Field(
        description="folder with metadata.jsonl, metadata.csv, or pictures and a text file of the same name beside each"
    )
    held_out: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="fraction of the pictures kept from training, 0 for none; unset: those marked in the metadata",
    )
    enlarge: bool = Field(False, description="accept pictures smaller than the video and enlarge them")
