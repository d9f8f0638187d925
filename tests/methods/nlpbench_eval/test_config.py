"""Options that are out of range or do not go together are refused before anything is read."""

from __future__ import annotations

from typing import Any

import pytest

from pomona.errors import UsageError
from pomona.methods.nlpbench_eval.config import Config
from pomona.runtime.settings import Settings


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"fail_under": 80.0}, "--fail-under is 80.0"),
        ({"fail_under": float("nan")}, "--fail-under is nan"),
        ({"samples": 0}, "--samples is 0"),
        ({"tot_beam": 0}, "--tot-beam is 0"),
        ({"thought_tokens": 0}, "--thought-tokens is 0"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"temperature_inner": -0.1}, "--temperature-inner is -0.1"),
        ({"shots": 4}, "--shots 4"),
        ({"shots": -1}, "--shots -1"),
        ({"compat": "thought-limit"}, "go with --profile released"),
        ({"compat": "thought-limit,x", "profile": "released"}, "--compat x"),
        ({"types": "mc,essay"}, "--types essay"),
        ({"judge": "human", "redact": "text"}, "verdicts.csv, which --redact text forbids"),
        ({"judge": ""}, "--judge ''"),
        ({"judge": "openai:"}, "--judge 'openai:'"),
        ({"judge": "mock:oracle"}, "--judge 'mock:oracle'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Config(**options)
    assert told in caught.value.message


@pytest.mark.parametrize("options", [{"seed": 2**63}, {"seed": -(2**63) - 1}, {"model": ""}, {"model": "a\udce9"}])
def test_a_seed_or_a_model_that_no_file_could_hold_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Settings(**options)
    assert Settings(seed=2**63 - 1, model="é").seed == 2**63 - 1
