"""The query and the answer of ``GET /usage``: names and types. What they mean is ``prefixes.usage``'s."""

from __future__ import annotations

from typing import Annotated, NotRequired

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from prefixes.usage.model import Kind, Outcome
from prefixes.usage.table import BY
from server.schemas import Name
from server.web.answer_types import CLOSED

DAY_PATTERN = r"^\d{4}-\d{2}-\d{2}$"
Day = Annotated[str, Field(pattern=DAY_PATTERN)]
QueriedDay = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date"})]
Money = Annotated[str, Field(pattern=r"^\d+(\.\d+)?$", description="An exact decimal number of the currency.")]
_NAMES = "|".join(BY)


class UsageQuery(BaseModel):
    """``GET /usage?…``: text, therefore not strict."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: QueriedDay | None = Field(default=None, alias="from", description="A day in UTC; default: the month's 1st.")
    last: QueriedDay | None = Field(default=None, alias="to", description="A day in UTC, included; default: today.")
    by: str = Field(
        default="task", max_length=200, description="What is told apart, with commas.",
        json_schema_extra={"pattern": f"^({_NAMES})(,({_NAMES}))*$"},
    )  # fmt: skip
    tenant: Name | None = Field(default=None, description="Another than one's own, for operators; default: all.")


class UsageNumbers(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    requests: int
    input_tokens: int
    prefix_tokens: int
    output_tokens: int
    jobs: int
    training_steps: int
    training_tokens: int
    training_seconds: float
    cost: NotRequired[Money]


class UsageRow(UsageNumbers):
    """What is told apart is here too."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    day: NotRequired[Day]
    tenant: NotRequired[str]
    key: NotRequired[str | None]
    task: NotRequired[str | None]
    version: NotRequired[str | None]
    outcome: NotRequired[Outcome]
    kind: NotRequired[Kind]


_Days = TypedDict("_Days", {"from": Day, "to": Day})


class UsageAnswer(_Days):
    """``of_shared`` is others' use of the tenant's own tasks."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    tenant: str | None
    by: list[str]
    currency: str | None
    rows: list[UsageRow]
    total: UsageNumbers
    of_shared: list[UsageRow]
