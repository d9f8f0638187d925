"""A loopback server's script that sits the exam: it finds the question in a request and answers as told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from loopback import Reply, Seen, ok

GRADING = "You grade an exam"


def gold(record: dict[str, Any]) -> str:
    """The gold answer as a model would write it."""
    return ",".join(map(str, record["answer"])) if record["type"] == "mc" else str(record["answer"][0])


def wrong(record: dict[str, Any]) -> str:
    """An answer in the right form that is wrong."""
    if record["type"] != "mc":
        return "12345.5"
    return str(next(i for i in range(len(record["options"])) if [i] != record["answer"]))


class Examinee:
    """Answers the questions of `records`: those whose ids are in `known` right, the others wrong.

    As a judge it tells the truth. Replies depend on the request alone. `n` choices are given when asked for, unless
    `several` is off.
    """

    def __init__(
        self, records: Sequence[dict[str, Any]], known: Collection[str] | None = None, *, several: bool = True
    ) -> None:
        self._records: dict[str, list[dict[str, Any]]] = {}
        for record in sorted(records, key=lambda r: len(r["question"]), reverse=True):
            self._records.setdefault(record["question"].split("\n", 1)[0], []).append(record)
        self._known = known
        self._several = several

    def record(self, text: str) -> dict[str, Any]:
        """The question that is asked last in `text`."""
        asked = text[text.rindex("Question: ") + len("Question: ") :]
        return next(r for r in self._records[asked.split("\n", 1)[0]] if asked.startswith(r["question"]))

    def say(self, text: str) -> str:
        """What is answered to a message."""
        if "The best choice is N" in text:
            return "The best choice is 2"
        if "Student's answer: " in text:
            record = self.record(text)
            student = text.split("Student's answer: ")[1].split("\n")[0]
            right = student.removeprefix("Answer: ") == record["answer"][0]
            return json.dumps({"reason": "as the teacher says", "verdict": "correct" if right else "incorrect"})
        if "thoughts only" in text or "Write down thought" in text:
            return "thought " + hashlib.sha256(text.encode()).hexdigest()[:8]
        record = self.record(text)
        right = self._known is None or record["id"] in self._known
        reply = gold(record) if right else wrong(record)
        return f"I think.\nAnswer: {reply}" if text.endswith("Thoughts:") else reply

    def __call__(self, seen: Seen) -> Reply:
        text = next(m["content"] for m in reversed(seen.body["messages"]) if m["role"] == "user")
        reply = ok(self.say(text), (len(seen.text) // 4, 3))
        count = seen.body.get("n", 1) if self._several else 1
        if count == 1:
            return reply
        body = json.loads(reply.body)
        body["choices"] = [{**body["choices"][0], "index": index} for index in range(count)]
        body["usage"]["completion_tokens"] *= count
        return replace(reply, body=json.dumps(body).encode())


def but(script: Callable[[Seen], Reply], faults: Callable[[Seen], Reply | None]) -> Callable[[Seen], Reply]:
    """`script`, except where `faults` gives a reply of its own."""
    return lambda seen: faults(seen) or script(seen)
