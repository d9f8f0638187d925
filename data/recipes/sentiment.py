"""Write data/sentiment.jsonl: sentences made from templates, whose label a negation turns round.

Usage: python data/recipes/sentiment.py > data/sentiment.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator

SUBJECTS = {
    "films": ["film", "plot", "acting", "soundtrack", "ending", "dialogue", "cast", "script", "camera work", "editing"],
    "food": ["soup", "bread", "dinner", "coffee", "dessert", "salad", "curry", "breakfast", "sauce", "cake"],
    "hotels": ["room", "lobby", "pool", "staff", "bed", "view", "garden", "lift", "terrace", "reception"],
}
GOOD = "excellent wonderful lovely superb delightful brilliant pleasant great splendid charming".split()
BAD = "terrible awful dreadful horrible disappointing poor bad dull mediocre unpleasant".split()
PLAIN = (
    "The {subject} was {word}.",
    "I found the {subject} {word}.",
    "Everyone said the {subject} was {word}.",
    "In the end the {subject} turned out {word}.",
    "We thought the {subject} was really {word}.",
)
NEGATED = (
    "The {subject} was not {word}.",
    "I never found the {subject} {word}.",
    "Nobody said the {subject} was {word}.",
    "In the end the {subject} did not turn out {word}.",
    "We did not think the {subject} was really {word}.",
)


def sentences(domain: str, seed: int = 0) -> Iterator[dict[str, str]]:
    """All sentences of `domain`, shuffled: 2,000, half of each label, half of each negated."""
    made = [
        {
            "text": template.format(subject=subject, word=word),
            "label": "positive" if (words is GOOD) != (templates is NEGATED) else "negative",
        }
        for templates in (PLAIN, NEGATED)
        for template in templates
        for subject in SUBJECTS[domain]
        for words in (GOOD, BAD)
        for word in words
    ]
    random.Random(f"{domain}/{seed}").shuffle(made)
    yield from made


def main() -> None:
    """384 sentences to train on, then 256 to test on."""
    for number, sentence in zip(range(640), sentences("films"), strict=False):
        split = "train" if number < 384 else "test"
        sys.stdout.write(json.dumps({**sentence, "split": split}) + "\n")


if __name__ == "__main__":
    main()
