"""Which rated records are kept."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.errors import UsageError
from pomona.io.conversation import Fields, Turn, turns
from pomona.methods.alpagasus_filter.selection import (
    CODING_KEYWORDS,
    Histogram,
    KeywordCount,
    Quota,
    balance_rule,
    coding_keywords,
    fill_groups,
    keyword_lines,
    passes,
    top,
)

# The published histogram of ChatGPT's accuracy ratings of Alpaca 52k; below 3 is drawn as one bar there.
PUBLISHED = {2.5: 172, 3.0: 1_550, 3.5: 10_811, 4.0: 30_240, 4.5: 9_218, 5.0: 11}
NAN = math.nan


@pytest.mark.parametrize(("threshold", "kept"), [(5, 11), (4.5, 9_229), (4, 39_469), (3.5, 50_280), (3, 51_830)])
def test_the_published_histogram_gives_the_published_counts(threshold: float, kept: int) -> None:
    assert sum(count for score, count in PUBLISHED.items() if passes(score, threshold)) == kept
    histogram = Histogram(0, 5)
    for score, count in PUBLISHED.items():
        for _ in range(count):
            histogram.add(score)
    assert sum(count for score, count in histogram.bars() if score >= threshold) == kept
    assert sum(count for score, count in histogram.bars() if score < 3) == 172
    assert sum(count for _, count in histogram.bars()) == 52_002


def test_the_threshold_is_inclusive_unless_strict() -> None:
    assert passes(4.5, 4.5) and not passes(4.4999, 4.5)
    assert not passes(4.5, 4.5, strict=True) and passes(4.5001, 4.5, strict=True)


def test_ratings_between_half_points_count_under_the_lower_and_cover_the_scale() -> None:
    histogram = Histogram(0, 5)
    for score in (4.49, 4.5, 4.99, 0.2, None):
        histogram.add(score)
    bars = dict(histogram.bars())
    assert list(bars) == [i / 2 for i in range(11)]
    assert bars[4.0] == 1 and bars[4.5] == 2 and bars[0.0] == 1 and histogram.unrated == 1
    assert histogram.as_dict() == {"0": 1, "4": 1, "4.5": 2}
    assert any("threshold" in line and "4.5" in line for line in histogram.lines(4.5))


def test_a_wide_scale_lists_only_what_occurs() -> None:
    histogram = Histogram(0, 1000)
    histogram.add(7)
    histogram.add(900)
    assert list(histogram.bars()) == [(7.0, 1), (900.0, 1)]


def test_top_takes_the_earlier_of_equals_and_never_the_unrated() -> None:
    assert list(top([3, 5, 4, 5, 4], 3)) == [0, 1, 1, 1, 0]
    assert list(top([NAN, 1, NAN], 2)) == [0, 1, 0]
    assert list(top([1, 2], 0)) == [0, 0]
    assert list(top([1, 2], 9)) == [1, 1]


@given(st.lists(st.sampled_from([NAN, 0.0, 1.5, 4.5, 5.0]), max_size=30), st.integers(0, 35))
def test_top_chooses_no_record_worse_than_one_it_leaves(scores: list[float], count: int) -> None:
    chosen = top(scores, count)
    rated = [s for s in scores if not math.isnan(s)]
    assert sum(chosen) == min(count, len(rated))
    taken = [s for s, c in zip(scores, chosen, strict=True) if c]
    left = [s for s, c in zip(scores, chosen, strict=True) if not c and not math.isnan(s)]
    assert not taken or not left or min(taken) >= max(left)


def test_quotas_are_exact_fractions() -> None:
    assert Quota.parse("6%", "--top").at_most(51_850) == 3_111
    assert Quota.parse("6%", "--top").at_most(51_849) == 3_110
    assert Quota.parse("29%", "--top").at_most(100) == 29  # 0.29 * 100 is 28.999... in floating point
    assert Quota.parse("20%", "--balance").at_least(11) == 3
    assert Quota.parse("20", "--balance").at_least(11) == 11
    assert Quota.parse("0.5%", "--top").at_most(1000) == 5


@pytest.mark.parametrize("text", ["", "x", "-1", "101%", "1.5", "nan", "inf", "1/0", "%"])
def test_a_quota_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--top"):
        Quota.parse(text, "--top")


def test_groups_below_their_floor_are_filled_with_their_best_rated_records() -> None:
    scores = [4.5, 4.0, 3.0, 4.2, 4.0, 1.0, NAN, 2.0]
    groups = [0, 0, 0, 1, 1, 1, 2, 2]
    chosen = bytearray([1, 0, 0, 0, 0, 0, 0, 0])
    assert fill_groups(scores, groups, chosen, Quota.parse("50%", "--balance")) == 4
    assert list(chosen) == [1, 1, 0, 1, 1, 0, 0, 1]


def test_a_group_above_its_floor_is_left_alone() -> None:
    chosen = bytearray([1, 1, 0])
    assert fill_groups([5, 5, 4], [0, 0, 0], chosen, Quota.parse("1", "--balance")) == 0
    assert list(chosen) == [1, 1, 0]


def test_the_balance_rule_splits_at_the_last_equals_sign() -> None:
    assert balance_rule("category=20%") == ("category", Quota.parse("20%", ""))
    assert balance_rule("a=b=5") == ("a=b", Quota.parse("5", ""))
    for wrong in ("category", "=5", "category=", "category=x"):
        with pytest.raises(UsageError, match="--balance"):
            balance_rule(wrong)


def test_a_keyword_counts_as_it_is_written_in_any_field() -> None:
    assert coding_keywords([Turn("Use C++", "", "")]) == {"C++"}
    assert coding_keywords([Turn("", "in javascript", "")]) == {"java"}
    assert coding_keywords([Turn("", "", "JavaScript and Python, python")]) == {"Java", "Python", "python"}
    assert coding_keywords([Turn("JAVA", "PYTHON", "C")]) == frozenset()
    assert coding_keywords([Turn("a", "", "b"), Turn("c#", "", "")]) == {"c#"}


@pytest.mark.parametrize(
    ("name", "any_keyword", "keyword_sum", "per_keyword"),
    [
        ("random_9k", 92, 118, [38, 1, 9, 0, 4, 0, 61, 5]),
        ("claude_t45", 64, 79, None),
    ],
)
def test_the_keyword_counts_of_the_shared_data(
    shared: Callable[[str], Path], name: str, any_keyword: int, keyword_sum: int, per_keyword: list[int] | None
) -> None:
    count = KeywordCount()
    for record in json.loads(shared(f"data/alpaca/{name}.json").read_text()):
        count.add(coding_keywords(turns(record, Fields())))
    figures = count.as_dict()
    assert (figures["any_keyword"], figures["keyword_sum"]) == (any_keyword, keyword_sum)
    assert per_keyword is None or figures["per_keyword"] == dict(zip(CODING_KEYWORDS, per_keyword, strict=True))


def test_keyword_lines_show_both_rules_and_what_was_removed() -> None:
    before, after = KeywordCount(), KeywordCount()
    for _ in range(4):
        before.add(frozenset({"Java", "Python"}))
    after.add(frozenset({"Java", "Python"}))
    lines = keyword_lines(before, after)
    assert any(line.split() == ["any", "keyword", "4", "1", "75.00%"] for line in lines)
    assert any(line.split() == ["sum", "of", "keywords", "8", "2", "75.00%"] for line in lines)
    assert any(line.split() == ["C#", "0", "0", "-"] for line in lines)


def test_random_9k_rated_by_membership_in_claude_t45_keeps_935_records(shared: Callable[[str], Path]) -> None:
    """D2, and the bytes of the two layouts the spec gives hashes for."""
    data: list[dict[str, Any]] = json.loads(shared("data/alpaca/random_9k.json").read_text())
    claude = {json.dumps(r, sort_keys=True) for r in json.loads(shared("data/alpaca/claude_t45.json").read_text())}
    scores = [5.0 if json.dumps(record, sort_keys=True) in claude else 4.0 for record in data]
    kept = [record for record, score in zip(data, scores, strict=True) if passes(score, 4.5)]
    assert len(kept) == 935
    assert kept == [record for record, chosen in zip(data, top(scores, 935), strict=True) if chosen]
    alpaca = json.dumps(kept, indent=4).encode()
    assert (len(alpaca), hashlib.sha256(alpaca).hexdigest()[:16]) == (314_617, "4bf26751381044da")
    lines = "".join(json.dumps(record) + "\n" for record in kept).encode()
    assert (len(lines), hashlib.sha256(lines).hexdigest()[:16]) == (281_890, "ee72d025382ee54e")
