"""What judging will cost, what it has cost, and where it must stop."""

from __future__ import annotations

import math
from dataclasses import dataclass

_BYTES_PER_TOKEN = 4.0
_TOKENS_PER_MESSAGE = 8


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens of the prompt, and of the reply."""

    input: float
    output: float

    def dollars(self, tokens_in: float, tokens_out: float) -> float:
        """Cost of so many tokens."""
        return (tokens_in * self.input + tokens_out * self.output) / 1e6


PRICES_AS_OF = "2025-06"
PRICES: dict[str, Price] = {
    "openai/gpt-4o": Price(2.50, 10.00),
    "openai/gpt-4o-mini": Price(0.15, 0.60),
    "openai/gpt-4.1": Price(2.00, 8.00),
    "openai/gpt-4.1-mini": Price(0.40, 1.60),
    "openai/gpt-4.1-nano": Price(0.10, 0.40),
}
"""List prices as they were in ``PRICES_AS_OF``; prices change, so pass ``price=`` where money matters."""


@dataclass(frozen=True)
class Budget:
    """Where to stop: dollars, calls, or tokens in and out together; None sets no limit.

    It holds for one judge object, controls included. Each attempt is a call, those that fail and are made again too.
    What is in flight counts at its estimated size, so a run may stop a little early and goes over by no more than the
    error of that estimate.
    """

    dollars: float | None = None
    calls: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("dollars", "calls", "tokens"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} of a budget is {value!r}; it must be a number of zero or more, or None")

    def __str__(self) -> str:
        told = [None if self.dollars is None else f"${self.dollars:g}"]
        told += [
            None if limit is None else f"{limit:,} {unit}"
            for limit, unit in ((self.calls, "calls"), (self.tokens, "tokens"))
        ]
        return " and ".join(part for part in told if part) or "no limit"


@dataclass(frozen=True)
class Estimate:
    """What judging a frame will take.

    Attributes:
        judgements: Scores to fill in: rows times rubrics, less rows without a text.
        calls: Calls that are left after the cache and repeated answers, controls included.
        tokens_in: Of these calls; a rough count from the length of the texts, about a quarter off either way.
        tokens_out: At most.
        dollars: Cost, or None where no price is known.
        seconds: At the given time per call and the judge's number of connections.
    """

    judgements: int
    calls: int
    tokens_in: int
    tokens_out: int
    dollars: float | None
    seconds: float

    def __str__(self) -> str:
        cost = "price unknown" if self.dollars is None else f"about ${self.dollars:.2f}"
        return (
            f"{self.judgements:,} judgements, {self.calls:,} calls to make, about {self.tokens_in:,} tokens in and at "
            f"most {self.tokens_out:,} out, {cost}, about {self.seconds:,.0f} s"
        )


@dataclass
class Spent:
    """What a judge has used so far, and whether its budget allows another call.

    Attributes:
        budget: The limits.
        price: For dollars; None where no price is known.
        calls: Attempts that were begun.
        tokens_in: Tokens of prompts, as the server counted them (estimated where it did not).
        tokens_out: Tokens of replies.
        exhausted: A call was refused.
    """

    budget: Budget
    price: Price | None
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    exhausted: bool = False

    @property
    def dollars(self) -> float | None:
        """Cost so far, calls in flight at their estimate; None where no price is known."""
        return None if self.price is None else self.price.dollars(self.tokens_in, self.tokens_out)

    def begin(self, tokens_in: int, tokens_out: int) -> bool:
        """Set tokens aside for a call; False, once and for all, if the budget does not hold it."""
        calls, tokens = self.calls + 1, self.tokens_in + tokens_in + self.tokens_out + tokens_out
        over = [self.budget.calls is not None and calls > self.budget.calls]
        over.append(self.budget.tokens is not None and tokens > self.budget.tokens)
        if self.budget.dollars is not None and self.price is not None:
            cost = self.price.dollars(self.tokens_in + tokens_in, self.tokens_out + tokens_out)
            over.append(cost > self.budget.dollars)
        self.exhausted = self.exhausted or any(over)
        if not self.exhausted:
            self.calls, self.tokens_in, self.tokens_out = (
                calls,
                self.tokens_in + tokens_in,
                self.tokens_out + tokens_out,
            )
        return not self.exhausted

    def settle(self, reserved: tuple[int, int], used: tuple[int, int]) -> None:
        """Replace what was set aside by what was used."""
        self.tokens_in += used[0] - reserved[0]
        self.tokens_out += used[1] - reserved[1]


def rough_tokens(text: str) -> int:
    """Tokens of a prompt, roughly: a quarter of its bytes, and a few for the message around it."""
    return math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN) + _TOKENS_PER_MESSAGE
