"""What a judge would be asked, and what that would cost, without asking."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from pomona.errors import PomonaError
from pomona.io.conversation import BadRecord, turns
from pomona.io.stream import Stream
from pomona.methods.alpagasus_filter import judges
from pomona.methods.alpagasus_filter.config import Config
from pomona.methods.alpagasus_filter.prompts import Messages, Prompt
from pomona.models.budget import estimate_prompt_tokens
from pomona.models.endpoint import Request, request_key
from pomona.runtime.settings import Settings

_ENOUGH_ANSWERS = 20
_SECONDS_PER_REPLY = {False: 1.0, True: 6.0}  # assumed, by whether a review is asked for


def plan(config: Config, settings: Settings, stream: Stream, prompt: Prompt) -> dict[str, Any]:
    """Requests, tokens, cost and time that a run would take from here; nothing is sent or written.

    Prompt tokens are counted with the model's own tokenizer where it is at hand (the embedded model, a local
    directory). Otherwise they are estimated from characters, and what earlier answers in the journal really took
    corrects the estimate. Reply tokens are the most that can come back, or the journal's mean.
    """
    count, basis = _token_counter(config, settings)
    answered = _answered(stream.journal_path) if settings.resume or not settings.overwrite else {}
    key = _request_keys(config, settings)
    most = judges.reply_tokens(config.explain)
    seen: set[bytes] = set()
    records = requests = estimated = 0
    known_estimated = known_prompt = known_reply = known = 0
    for located in stream.records():
        try:
            messages = prompt.messages(turns(located.record, stream.fields))
        except BadRecord as error:
            stream.reject(located, str(error))
            continue
        records += 1
        digest = _digest(messages)
        if digest in seen:
            continue
        seen.add(digest)
        tokens = count(messages)
        usage = answered.get(key(messages)) if answered else None
        if usage is None:
            requests += 1
            estimated += tokens
        else:
            known += 1
            known_estimated += tokens
            known_prompt += usage[0]
            known_reply += usage[1]
    prompt_tokens, reply_tokens = float(estimated), float(requests * most)
    if known >= _ENOUGH_ANSWERS and known_estimated:
        reply_tokens = requests * known_reply / known
        if basis != "tokenizer":
            prompt_tokens *= known_prompt / known_estimated
            basis = f"characters, corrected by {known} answers"
    entry: dict[str, Any] = {
        "records": records,
        "requests": requests,
        "answered": known,
        "prompt_tokens": round(prompt_tokens),
        "completion_tokens": round(reply_tokens),
        "tokens_from": basis,
    }
    if config.judge == "openai":
        entry["cost"] = _cost(config, prompt_tokens, reply_tokens)
        entry["seconds"] = _seconds(config, requests, prompt_tokens + reply_tokens)
    return entry


def _cost(config: Config, prompt_tokens: float, reply_tokens: float) -> float | None:
    if config.price_in is None or config.price_out is None:
        return None
    return round((prompt_tokens * config.price_in + reply_tokens * config.price_out) / 1e6, 6)


def _seconds(config: Config, requests: int, tokens: float) -> float:
    """The longest of what latency at full concurrency and the two rate limits ask for."""
    bounds = [requests / config.concurrency * _SECONDS_PER_REPLY[config.explain]]
    if config.rpm is not None:
        bounds.append(requests / config.rpm * 60)
    if config.tpm is not None:
        bounds.append(tokens / config.tpm * 60)
    return round(max(bounds), 1)


def _token_counter(config: Config, settings: Settings) -> tuple[Callable[[Messages], int], str]:
    model = settings.model
    if config.judge == "local" or model == "smollm2" or (model is not None and Path(model).is_dir()):
        from pomona.models.loading import load_tokenizer

        try:
            tokenizer = load_tokenizer(model)
        except PomonaError:
            if config.judge == "local":
                raise
        else:
            return lambda messages: len(judges.chat_ids(tokenizer, messages)), "tokenizer"
    return estimate_prompt_tokens, "characters"


def _request_keys(config: Config, settings: Settings) -> Callable[[Messages], str]:
    if config.judge != "openai" or settings.model is None:
        return lambda messages: ""
    model, most = settings.model, judges.reply_tokens(config.explain)
    return lambda messages: request_key(model, Request(messages, most))


def _answered(journal: Path | None) -> dict[str, tuple[int, int]]:
    """Prompt and reply tokens of the answers in an earlier run's journal, by request key."""
    found: dict[str, tuple[int, int]] = {}
    if journal is None or not journal.exists():
        return found
    with journal.open("rb") as lines:
        for line in lines:
            try:
                entry = orjson.loads(line)
                value = entry["value"]
                found[entry["key"]] = value["prompt_tokens"], value["completion_tokens"]
            except (ValueError, KeyError, TypeError):  # the header, a torn line, a local judge's entry
                continue
    return found


def _digest(messages: Messages) -> bytes:
    return blake2b(repr(messages).encode("utf-8", "surrogatepass"), digest_size=16).digest()
