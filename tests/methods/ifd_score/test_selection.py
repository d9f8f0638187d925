"""Selection rules against the specification's figures (checks A7, A8) and a plain restatement of each script."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from fractions import Fraction

import pytest

from pomona.errors import UsageError
from pomona.methods.ifd_score.config import Config, Variant, keep_rule, resolve
from pomona.methods.ifd_score.selection import Selection, recorded, select

RATIOS = [0.2, 0.9, 1.0, 1.0001, None, 0.95]


def chosen(scores: list[float | None], **options: object) -> Selection:
    config = Config(**options)  # type: ignore[arg-type]
    return select(scores, resolve(config), keep=keep_rule(config.keep_top), least=config.min_ifd)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"variant": "cherry", "keep_top": "50%"}, [2, 5]),
        ({"variant": "superfilter", "keep_top": "50%"}, [5, 1, 0]),
        ({"variant": "superfilter", "keep_top": "50%", "order": "source"}, [0, 1, 5]),
        ({"variant": "cherry", "keep_top": "50%", "order": "score"}, [2, 5]),
        ({"variant": "reflection", "keep_top": "50%"}, [0, 1, 5]),
        ({"variant": "cherry", "keep_top": "50%", "rate_base": "all"}, [1, 2, 5]),
        ({"variant": "superfilter", "keep_top": "50%", "rate_base": "eligible"}, [5]),
        ({"variant": "superfilter", "keep_top": "10%"}, []),
        ({"variant": "cherry", "keep_top": "0"}, []),
        ({"variant": "cherry", "keep_top": "99"}, [0, 1, 2, 5]),
        ({"variant": "superfilter", "max_ifd": 1.0}, [2, 5, 1, 0]),
        ({"variant": "cherry", "max_ifd": 2.0, "min_ifd": 0.95}, [2, 3, 5]),
        ({"variant": "superfilter", "min_ifd": 0.9}, [5, 1]),
    ],
)
def test_a7_rules(options: dict[str, object], kept: list[int]) -> None:
    assert chosen(RATIOS, **options).kept == kept


def test_ties_go_to_the_later_record_in_cherry_and_to_the_earlier_in_superfilter() -> None:
    assert chosen([0.5, 0.5, 0.5], variant="cherry", keep_top="1").kept == [2]
    assert chosen([0.5, 0.5, 0.5], variant="superfilter", keep_top="1").kept == [0]


@pytest.mark.parametrize(("eligible", "count"), [(51_849, 3110), (51_850, 3111), (51_866, 3111), (51_867, 3112)])
def test_a8_count_law(eligible: int, count: int) -> None:
    scores: list[float | None] = [0.5] * eligible + [1.5] * 100 + [None] * 4
    assert len(chosen(scores, variant="cherry", keep_top="6%").kept) == count


@pytest.mark.parametrize("percent", [6, 7, 14, 28, 29, 55, 56, 57, 58])
def test_a_share_counts_exactly_where_binary_fractions_slip(percent: int) -> None:
    scores: list[float | None] = [0.5] * 10_000
    assert len(chosen(scores, keep_top=f"{percent}%").kept) == percent * 100


def test_rate_base_restores_superfilters_built_in_constant() -> None:
    scores: list[float | None] = [0.5] * 6000
    assert len(chosen(scores, keep_top="5%", rate_base="52002").kept) == math.floor(52002 * 0.05)


def test_rank_counts_from_the_highest_score_and_everything_else_is_accounted_for() -> None:
    selection = chosen(RATIOS, variant="superfilter", keep_top="2")
    assert selection.rank == {5: 1, 1: 2}
    assert selection.left_out == {"above_max_ifd": 2, "not_in_top": 1}
    assert chosen(RATIOS, variant="superfilter", min_ifd=0.5).left_out == {"above_max_ifd": 2, "below_min_ifd": 1}


def restated_cherry(scores: list[float | None], share: Fraction) -> list[int]:
    """The paper's script in words: sort (ratio, index) upwards, take the last n, back to source order."""
    alive = sorted((s, i) for i, s in enumerate(scores) if s is not None and s <= 1)
    n = (len(alive) * share.numerator) // share.denominator
    return sorted(i for _, i in alive[len(alive) - n :])


def restated_superfilter(scores: list[float | None], share: Fraction) -> list[int]:
    alive = [(s, i) for i, s in enumerate(scores) if s is not None and s < 1]
    n = (len(scores) * share.numerator) // share.denominator
    return [i for _, i in sorted(alive, key=lambda e: e[0], reverse=True)][:n]


@pytest.mark.parametrize("variant", ["cherry", "superfilter"])
def test_random_scores_with_many_ties_agree_with_the_restated_scripts(variant: Variant) -> None:
    random_ = random.Random(3)
    for _ in range(200):
        scores = [random_.choice([None, 0.1, 0.5, 0.9, 1.0, 1.2]) for _ in range(random_.randrange(30))]
        percent = random_.randrange(101)
        restated = restated_cherry if variant == "cherry" else restated_superfilter
        assert chosen(scores, variant=variant, keep_top=f"{percent}%").kept == restated(scores, Fraction(percent, 100))


@pytest.mark.parametrize("text", ["5 percent", "-1", "101%", "0.5", "nan%", "1e9%", "%", "", "1/2%"])
def test_a_keep_rule_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--keep-top"):
        Config(keep_top=text)


def test_recorded_scores_of_ours_and_of_the_reference_scripts() -> None:
    back = {"ifd": 0.7, "status": "ok"}
    ours = {"ifd": {"ifd": 0.4, "ifd_loss": 0.4, "ifd_ppl": 0.1, "status": "ok", "reverse": back}}
    assert recorded(ours, reverse=False, ratio=None) == (True, 0.4)
    assert recorded(ours, reverse=False, ratio="ppl") == (True, 0.1)
    assert recorded(ours, reverse=True, ratio=None) == (True, 0.7)
    assert recorded({"ifd": {"ifd": 0.4, "status": "over_length"}}, reverse=False, ratio=None) == (True, None)
    assert recorded({"ifd": "a field of the user's"}, reverse=False, ratio=None) == (False, None)
    theirs = {"ppl_A_direct": math.exp(4.0), "ppl_A_condition": math.exp(3.0), "ifd_ppl": math.exp(-1.0)}
    assert recorded(theirs, reverse=False, ratio=None) == (True, math.exp(-1.0))
    carried, loss_ratio = recorded(theirs, reverse=False, ratio="loss")
    assert carried and loss_ratio == pytest.approx(0.75)
    assert recorded({**theirs, "ppl_A_condition": 0, "ifd_ppl": 0.0}, reverse=False, ratio=None) == (True, None)
    assert recorded({"ifd_ppl": None}, reverse=False, ratio=None) == (True, None)
    assert recorded({"ifd_score": float("nan")}, reverse=False, ratio=None) == (True, None)


def test_selecting_imports_no_model_library() -> None:
    code = (
        "import sys, pomona.methods.ifd_score.run; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
