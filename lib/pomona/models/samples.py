"""Samples of one conversation that share a call: which belong together, and what each gets of the reply."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from pomona.models.budget import Usage, estimate_prompt_tokens, estimate_text_tokens
from pomona.models.endpoint import Answer, Request
from pomona.models.reply import Reply, Trouble


@dataclass(slots=True, eq=False)
class Call:
    """Requests by journal key, alike but for their samples; more than one are asked for with n."""

    requests: dict[str, Request]

    @property
    def first(self) -> Request:
        """What is sent."""
        return next(iter(self.requests.values()))

    def singles(self) -> list[Call]:
        """The samples, each in a call of its own."""
        return [Call({key: request}) for key, request in self.requests.items()]


def calls(requests: dict[str, Request]) -> list[Call]:
    """`requests`, those alike but for their samples together."""
    if len(requests) < 2:
        return [Call(requests)] if requests else []
    alike: dict[Request, dict[str, Request]] = {}
    for key, request in requests.items():
        alike.setdefault(replace(request, sample=0), {})[key] = request
    return [Call(samples) for samples in alike.values()]


def deal(call: Call, reply: Reply, model: str) -> tuple[list[Answer | Trouble], Usage | None]:
    """An answer or trouble for each sample of `call`, as far as the choices go, and the tokens of all together.

    The first answer has the prompt's tokens and the call; the reply's are shared out by length. None for the tokens
    where nothing was usable and the server did not count.
    """
    choices = reply.choices[: len(call.requests)]
    lengths = [max(1, estimate_text_tokens(choice.text)) for choice in choices if not isinstance(choice, Trouble)]
    if not lengths:
        return [choice for choice in choices if isinstance(choice, Trouble)], reply.usage
    used = reply.usage or Usage(estimate_prompt_tokens(call.first.messages), sum(lengths))
    ends = [used.completion * end // sum(lengths) for end in accumulate(lengths, initial=0)]
    shares = deque(end - start for start, end in pairwise(ends))
    dealt: list[Answer | Trouble] = []
    for choice in choices:
        if isinstance(choice, Trouble):
            dealt.append(choice)
            continue
        first = len(shares) == len(lengths)
        answer = Answer(
            choice.text,
            used.prompt if first else 0,
            shares.popleft(),
            choice.finish_reason,
            reply.model or model,
            cached=False,
            estimated=reply.usage is None,
            calls=int(first),
        )
        dealt.append(answer)
    return dealt, used
