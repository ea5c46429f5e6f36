"""Options that are typed as more than one number: whole numbers with a unit, falling shares, shares by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from sspcompile.errors import BudgetError, InputError
from sspcompile.request.documents import NAME_PATTERN, shown
from sspcompile.request.sizes import COUNTS, TIMES, UNITS, parsed, time_text


@dataclass(frozen=True, eq=False)  # pydantic hashes it, and a mapping has no hash
class Amount:
    """How such an option is typed: `units` as those of `request.sizes`, and an `example` for errors. Typed without a
    unit, less than `least_bare` is one that was forgotten."""

    units: Mapping[str, int]
    example: str
    least_bare: int = 1

    def read(self, value: Any) -> Any:
        """Text as the number that it stands for; what is no text is left to the type. Raises ValueError."""
        if not isinstance(value, str):
            return value
        found = parsed(value, self.units)
        if found is None:
            raise ValueError(f"must be {self.example}, not {shown(value)}")
        if found < self.least_bare and not value.strip()[-1].isalpha():
            raise ValueError(f"must be {self.example}; {value.strip()} has no unit, give it one, as {value.strip()}GB")
        return found


# No model is so small, and nobody means so many gigabytes.
LEAST_BYTES = 100_000
_PARAMETERS = Amount(COUNTS, "a number as 120M, 1.1B or 120000000")
_BYTES = Amount(UNITS, "a size as 6GB, 512MiB or a number of bytes", LEAST_BYTES)
_NANOSECONDS = Amount(TIMES, "a time as 35ms, 800us or 1.5s")
_TYPED = WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]})

Parameters = Annotated[int, Field(ge=1, le=10**15), BeforeValidator(_PARAMETERS.read), _TYPED, _PARAMETERS]
Bytes = Annotated[int, Field(ge=1, le=10**18), BeforeValidator(_BYTES.read), _TYPED, _BYTES]
# Text needs its unit; a bare number, which nobody types, is one of nanoseconds. A recipe has it as text.
Time = Annotated[
    int,
    Field(ge=1, le=10**18),
    BeforeValidator(_NANOSECONDS.read),
    PlainSerializer(time_text, return_type=str, when_used="json"),
    _TYPED,
    _NANOSECONDS,
]


@dataclass(frozen=True)
class Pairs:
    """How an option is typed that maps names to shares: NAME=SHARE, several times."""

    example: str

    def read(self, value: Any) -> Any:
        """Texts as the mapping that they stand for; what is none is left to the type. Raises ValueError."""
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            return value
        found: dict[str, float] = {}
        for text in texts:
            name, _, share = (part.strip() for part in text.rpartition("="))
            try:
                number = float(share)
            except ValueError:
                number = None
            if not name or number is None:
                raise ValueError(f"must be {self.example}, not {shown(text)}")
            if name in found:
                raise ValueError(f"names {name} twice")
            found[name] = number
        return found


def _by_name(losses: dict[str, float]) -> dict[str, float]:
    """Equal requests are equal recipes."""
    return dict(sorted(losses.items()))


_LOSSES = Pairs("DOMAIN=LOSS, as medicine=0.05")
_Domain = Annotated[str, Field(pattern=NAME_PATTERN)]
_Loss = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]

Losses = Annotated[
    dict[_Domain, _Loss], Field(min_length=1), BeforeValidator(_LOSSES.read), AfterValidator(_by_name), _LOSSES
]

MOST_SHARES = 12
# A share that was typed is one of those that there are in spite of rounding.
CLOSE = 1e-9


def shares_of(text: str) -> tuple[float, ...]:
    """`1,0.9,0.7` as numbers, falling, each once, the whole (1) always among them. Raises ValueError."""
    try:
        given = {float(part) for part in text.split(",") if part.strip()}
    except ValueError:
        given = set()
    if not given or not all(0 < share <= 1 for share in given) or len(given | {1.0}) not in range(2, MOST_SHARES + 1):
        raise ValueError(f"must be shares above 0 and up to 1, as 1,0.9,0.8 ({MOST_SHARES} at most), not {shown(text)}")
    return tuple(sorted(given | {1.0}, reverse=True))


def largest_within(shares: Sequence[float], size: float, what: str) -> float:
    """The largest of `shares` that is at most `size`; `what` has them is said in errors.

    Raises InputError for a `size` that is no share, and BudgetError below the smallest.
    """
    if not 0 < size <= 1:
        raise InputError(f"--size {size:g} is not a share of the parameters.", hint="Give one up to 1, as --size 0.8.")
    found = [share for share in shares if share <= size + CLOSE]
    if not found:
        raise BudgetError(
            f"--size {size:g} is less than the smallest size of {what}.",
            hint=f"It holds {', '.join(f'{share:g}' for share in shares)}.",
        )
    return max(found)


def _settled(text: str) -> str:
    """Equal requests are equal recipes."""
    return ",".join(f"{share:g}" for share in shares_of(text))


Shares = Annotated[str, AfterValidator(_settled)]
