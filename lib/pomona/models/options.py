"""The options of commands that ask an endpoint, with their ranges; light enough for `--help`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pomona.errors import UsageError
from pomona.runtime.ranges import positive

if TYPE_CHECKING:
    from pomona.models.budget import Budget
    from pomona.models.endpoint import Endpoint


@dataclass(frozen=True)
class EndpointOptions:
    """Which endpoint to ask, how hard, and what it may cost; a command's own options inherit from these."""

    base_url: Annotated[str | None, "address of the endpoint, e.g. http://localhost:8000/v1"] = None
    api_key_env: Annotated[str, "environment variable that holds the endpoint's key"] = "OPENAI_API_KEY"
    concurrency: Annotated[int, "requests in flight at most"] = 32
    rpm: Annotated[int | None, "requests per minute at most"] = None
    tpm: Annotated[int | None, "tokens per minute at most"] = None
    timeout: Annotated[float, "seconds to wait for one reply"] = 60.0
    retries: Annotated[int, "further attempts at a request that failed in a way that can pass"] = 6
    max_wait: Annotated[float, "stop if the endpoint asks to wait for more seconds than this"] = 300.0
    max_cost: Annotated[float | None, "stop before this much is spent, in the unit of the prices"] = None
    max_tokens_total: Annotated[int | None, "stop before this many tokens are used, prompt and reply together"] = None
    price_in: Annotated[float | None, "price of a million prompt tokens"] = None
    price_out: Annotated[float | None, "price of a million reply tokens"] = None

    def __post_init__(self) -> None:
        positive(self, "concurrency", "rpm", "tpm", "timeout", "max_cost", "max_tokens_total")
        for name in ("retries", "max_wait", "price_in", "price_out"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"--{name.replace('_', '-')} must not be negative, not {value}")
        if self.max_cost is not None and (self.price_in is None or self.price_out is None):
            raise UsageError(
                "--max-cost needs prices",
                hint="add --price-in and --price-out, per million tokens; or cap tokens with --max-tokens-total",
            )

    def endpoint(self, model: str, *, empty_is_final: bool = False) -> Endpoint:
        """Where to ask for `model`; see `Endpoint` for `empty_is_final`."""
        from pomona.models.endpoint import Endpoint

        return Endpoint(
            base_url=self.base_url,
            model=model,
            api_key_env=self.api_key_env,
            concurrency=self.concurrency,
            rpm=self.rpm,
            tpm=self.tpm,
            timeout=self.timeout,
            retries=self.retries,
            max_wait=self.max_wait,
            empty_is_final=empty_is_final,
        )

    def budget(self) -> Budget:
        """What may be spent."""
        from pomona.models.budget import Budget

        return Budget(
            max_cost=self.max_cost,
            max_tokens=self.max_tokens_total,
            price_in=self.price_in,
            price_out=self.price_out,
        )
