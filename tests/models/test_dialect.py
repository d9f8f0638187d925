"""What a server does not support is found out from its refusals, once, and never sent again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from endpoints import Ear, client, question, surroundings  # noqa: F401
from loopback import Loopback, Reply, Seen, answer, raw
from pomona.models.chat import Answer, Chain, Endpoint, Failure, Request
from pomona.models.dialect import Dialect

SCHEMA = json.dumps({"type": "object"})
FULL = question("q", temperature=0.7, top_p=0.9, seed=1, schema=SCHEMA)


def openai(message: str, param: str | None = None, code: str | None = None) -> Reply:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return raw({"error": error}, 400)


def fastapi(name: str) -> Reply:
    entry = {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted", "input": 1}
    return raw({"detail": [entry]}, 422)


REFUSALS: dict[str, tuple[str, Reply]] = {
    "OpenAI, reasoning model, limit": (
        "max_tokens",
        openai(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
            "instead.",
            "max_tokens",
            "unsupported_parameter",
        ),
    ),
    "OpenAI, reasoning model, temperature": (
        "temperature",
        openai(
            "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is "
            "supported.",
            "temperature",
            "unsupported_value",
        ),
    ),
    "OpenAI, older": ("seed", openai("Unrecognized request argument supplied: seed")),
    "Anthropic": ("top_p", openai("`temperature` and `top_p` cannot both be specified for this model.")),
    "FastAPI": ("seed", fastapi("seed")),
    "Mistral": (
        "top_p",
        raw({"object": "error", "message": {"detail": json.loads(fastapi("top_p").body)["detail"]}}, 422),
    ),
    "Gemini": ("seed", raw({"error": {"code": 400, "message": 'Unknown name "seed": Cannot find field.'}}, 400)),
    "DeepSeek": ("response_format", openai("This response_format type is unavailable now")),
    "older llama.cpp": (
        "response_format",
        raw({"error": {"code": 400, "message": 'response_format type must be one of "text" or "json_object"'}}, 400),
    ),
    "plain text": ("temperature", raw(b"temperature is not supported", 400)),
}
KEPT = {
    "range": openai("temperature must be at most 2", "temperature"),
    "a limit too high": openai("max_tokens is too large: 99. This model supports at most 16.", "max_tokens"),
    "another parameter": openai("Unsupported parameter: 'logprobs'", "logprobs", "unsupported_parameter"),
    "no parameter": openai("bad request"),
    "an echo of the prompt": raw(
        {
            "detail": [
                {"type": "not supported", "loc": ["body", "messages"], "msg": "no", "input": "temperature seed top_p"}
            ]
        },
        422,
    ),
    "an odd shape": raw({"detail": [{"loc": 3}]}, 400),
}


def test_the_first_body_is_complete() -> None:
    with Loopback() as server:
        list(client(server.url).answers([(0, FULL)]))
        sent = server.seen[0].body
    assert sent.keys() == {
        "model",
        "messages",
        "temperature",
        "top_p",
        "max_tokens",
        "seed",
        "response_format",
    }
    assert (sent["temperature"], sent["top_p"], sent["seed"], sent["max_tokens"]) == (0.7, 0.9, 1, 16)


@pytest.mark.parametrize(("name", "refusal"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refused_parameter_is_given_up_for_the_rest_of_the_run_with_one_warning(name: str, refusal: Reply) -> None:
    ear = Ear()
    requests = [(number, question(str(number), temperature=0.7, seed=1, schema=SCHEMA)) for number in range(30)]
    with Loopback(lambda seen: refusal if name in seen.body else answer(seen), latency=0.005) as server:
        asked = client(server.url, progress=ear)
        assert all(isinstance(outcome, Answer) for _, outcome in asked.answers(requests))
        assert server.calls == 31  # the first request found it out, alone
        assert sum(name in seen.body for seen in server.seen) == 1
        lost = server.seen[0].body.keys() - server.seen[1].body.keys()
        assert lost == {name}
        list(asked.answers([(0, question("later", seed=1))]))
        assert name not in server.seen[-1].body
    assert list(asked.downgrades) == [name]
    assert len(ear.warnings) == 1 and name in ear.warnings[0]
    if name == "max_tokens":
        assert all(seen.body["max_completion_tokens"] == 16 for seen in server.seen[1:])


@pytest.mark.parametrize("refusal", KEPT.values(), ids=KEPT.keys())
def test_other_complaints_change_nothing(refusal: Reply) -> None:
    ear = Ear()
    with Loopback([refusal]) as server:
        asked = client(server.url, progress=ear)
        outcomes = dict(asked.answers([(0, FULL), (1, question("other", seed=1))]))
        assert server.calls == 2
    assert isinstance(outcomes[0], Failure) and outcomes[0].reason == f"http {refusal.status}"
    assert (asked.downgrades, ear.warnings) == ({}, [])


def test_each_of_many_refusals_costs_one_repetition_also_when_they_come_back_together() -> None:
    names = ("response_format", "seed", "n", "top_p", "temperature", "max_tokens")

    def script(seen: Seen) -> Reply:
        if seen.number <= 2:  # slow enough for others to go out before the first refusal comes back
            return Reply(**{**_fields(answer(seen)), "delay": 2.3})
        for name in names:
            if name in seen.body:
                return openai(f"Unsupported parameter: '{name}'", name)
        return answer(seen)

    def chain(number: int) -> Chain[list[Any]]:
        many = [question(str(number), sample=sample, seed=1, schema=SCHEMA) for sample in range(2)]
        return list((yield many))

    ear = Ear()
    with Loopback(script, latency=0.02) as server:
        asked = client(server.url, progress=ear, timeout=20.0)
        outcomes = [outcome for _, both in asked.conversations((n, chain(n)) for n in range(20)) for outcome in both]
        assert server.calls <= 40 + 8 * len(names)
        assert server.seen[-1].body.keys() == {"model", "messages", "max_completion_tokens"}
    assert len(outcomes) == 40 and all(isinstance(outcome, Answer) for outcome in outcomes)
    assert sorted(asked.downgrades) == sorted(names)
    assert len(ear.warnings) == len(names)


def test_a_server_that_refuses_everything_is_asked_a_bounded_number_of_times() -> None:
    def script(seen: Seen) -> Reply:
        return openai(f"Unsupported: {', '.join(seen.body)}")

    with Loopback(script) as server:
        ((_, outcome),) = client(server.url).answers([(0, FULL)])
        assert server.calls == 6  # as it was, less each of four, under the limit's other name
    assert isinstance(outcome, Failure) and outcome.reason == "http 400"


def test_a_limit_that_is_refused_under_both_names_is_still_sent() -> None:
    dialect = Dialect(Endpoint("http://h/v1", "m"), lambda message: None)
    request = Request((("user", "q"),), 16)
    assert dialect.give_way(dialect.body(request, 1), openai("'max_tokens' is not supported").body)
    assert not dialect.give_way(dialect.body(request, 1), openai("'max_completion_tokens' is not supported").body)
    assert dialect.body(request, 1)["max_completion_tokens"] == 16


def test_openai_itself_is_asked_with_the_newer_name_and_older_servers_with_theirs() -> None:
    request = Request((("user", "q"),), 16)
    dialect = Dialect(Endpoint("https://api.openai.com/v1", "m"), lambda message: None)
    sent = dialect.body(request, 1)
    assert sent["max_completion_tokens"] == 16
    assert dialect.give_way(sent, openai("Unrecognized request argument supplied: max_completion_tokens").body)
    assert dialect.body(request, 1)["max_tokens"] == 16
    assert dialect.give_way(sent, openai("Unrecognized request argument supplied: max_completion_tokens").body)
    assert "max_completion_tokens" not in dialect.body(request, 1)


@pytest.mark.parametrize(
    "message",
    [
        "Only one completion choice is allowed",
        "n must be 1 when using greedy sampling, got 3.",
        "'n' : number must be at most 1",
        "`n` > 1 is not supported",
        "n: extra inputs",
    ],
)
def test_many_wordings_of_no_to_several_choices_are_understood(message: str) -> None:
    dialect = Dialect(Endpoint("http://h/v1", "m"), lambda message: None)
    sent = dialect.body(Request((("user", "q"),), 16), 3)
    assert dialect.give_way(sent, openai(message).body)
    assert not dialect.takes_n


def test_a_word_that_ends_in_n_is_not_the_parameter() -> None:
    dialect = Dialect(Endpoint("http://h/v1", "m"), lambda message: None)
    sent = dialect.body(Request((("user", "q"),), 16), 3)
    assert not dialect.give_way(sent, openai("reason: the question must be shorter").body)


def _fields(reply: Reply) -> dict[str, Any]:
    return {name: getattr(reply, name) for name in ("status", "body", "headers", "fate", "valid")}
