"""What a merge says of itself: every number is that of the facts, every sentence is true of what was merged."""

from __future__ import annotations

import copy
import shlex
from typing import Any

import pytest

from pomona.methods.mera_merge import report
from pomona.methods.mera_merge.config import Config
from pomona.report.sections import Section, markdown
from pomona.runtime.settings import Settings

NO_MATCH: dict[str, Any] = {"cost_before": None, "cost_after": None, "moved": None}
FOUND: dict[str, Any] = {
    "method": "wts",
    "kind": "bottleneck",
    "reference": "one",
    "distance": "euclidean, of incoming weights and bias",
    "tracks": "none are given, and all 2 adapters are merged; they call their tasks task",
    "heads": "drop",
    "adapters": [
        {"label": "one", "weight": 0.25, "base": "tiny/bert", "licence": "mit", "head": True, **NO_MATCH},
        {
            **{"label": "two", "weight": 0.75, "base": "tiny/bert", "licence": None, "head": False},
            **{"cost_before": 8.5, "cost_after": 2.25, "moved": 0.75},
        },
    ],
    "alignment": {"cost_before": 8.5, "cost_after": 2.25, "moved": 0.75},
    "sites": {f"encoder.layer.{n}.output": error for n, error in enumerate((0.1, 0.4, 0.2, 0.3, 0.6, 0.5))},
    "drift": None,
    "parameters": {"before": 2000, "after": 1000},
    "flops": {"1": {"before": 6_000_000, "after": 2000}, "128": {"before": 768_000_000, "after": 256_000}},
    "few_shot": None,
}
DRIFT: dict[str, Any] = {
    "output": "logits",
    "maximum": 0.5,
    "relative": 0.125,
    "divergence": 0.0625,
    "agreement": 0.9,
    "perplexity_before": 20.0,
    "perplexity_after": 21.5,
    "no_perplexity": None,
    "texts": 3,
    "tokens": 1234,
}


def arm(name: str, mean: float | None, behind: float | None = None, **more: Any) -> dict[str, Any]:
    measured = None if mean is None else {"mean": mean, "deviation": 0.02, "half_interval": 0.05}
    entry: dict[str, Any] = {"arm": name, "draws": 2, "trained_parameters": 1234, "accuracy": measured, "nll": measured}
    if name != "merged":
        ahead = None if behind is None else {"mean": behind, "deviation": 0.01, "half_interval": 0.02}
        entry["behind"] = ahead and {"accuracy": ahead}
    return entry | more


def few_shot(*arms: dict[str, Any]) -> dict[str, Any]:
    return {"shots": 4, "labels": ["no", "yes"], "draws": 2, "tests": 50, "arms": list(arms), "rows": []}


def told(**changed: Any) -> dict[str, Any]:
    return copy.deepcopy(FOUND) | changed


def section(found: dict[str, Any], title: str) -> Section:
    return next(part for part in report.sections(found) if part.title == title)


def text(found: dict[str, Any]) -> str:
    return markdown(report.TITLE, report.PREAMBLE, report.sections(found), {})


def test_the_merge_is_told_with_what_matching_cost() -> None:
    part = section(FOUND, "Merge")
    assert part.verdict == [
        "2 bottleneck adapters averaged after optimal transport on their units' weights (wts): 1,000 parameters.",
        "Matching to one moved 75.0% of the hidden units and brought the distance between matched units "
        "from 8.5 to 2.25.",
    ]
    assert part.tables[0].rows == [
        ["one", "0.25", "–", "–", "–", "tiny/bert", "mit"],
        ["two", "0.75", "8.5", "2.25", "75.0%", "tiny/bert", "not said"],
    ]
    assert "Distances are euclidean, of incoming weights and bias, summed over units and sites." in part.notes
    assert "Prediction heads, of one: dropped." in part.notes


@pytest.mark.parametrize("method", ["avg", "sum"])
def test_where_nothing_was_matched_nothing_is_said_of_matching(method: str) -> None:
    adapters = [{**each, **NO_MATCH} for each in FOUND["adapters"]]
    found = told(method=method, adapters=adapters, alignment=NO_MATCH)
    part = section(found, "Merge")
    assert part.tables[0].head == ["adapter", "weight", "base model", "licence"]
    assert (
        part.tables[0].rows[1] == ["two", "0.75", "tiny/bert", "not said"] and part.tables[0].caption == "The adapters."
    )
    assert "istance" not in " ".join([*part.verdict, *part.notes])
    assert any("Units were not matched" in said for said in report.card(found, "mera-merge", []).splitlines())


@pytest.mark.parametrize(
    ("weight", "kind", "said"),
    [
        (1.0, "bottleneck", "One bottleneck adapter, as it is"),
        (0.5, "bottleneck", "One bottleneck adapter, with the weight 0.5 (wts)"),
        (1.0, "lora", "One LoRA adapter, as it is"),
    ],
)
def test_one_adapter_is_as_it_is_unless_it_was_weighted(weight: float, kind: str, said: str) -> None:
    found = told(kind=kind, adapters=[{**FOUND["adapters"][0], "weight": weight}], alignment=NO_MATCH, sites={})
    assert section(found, "Merge").verdict[0] == f"{said}: 1,000 parameters."


def test_heads_that_no_adapter_has_are_not_spoken_of() -> None:
    adapters = [{**each, "head": False} for each in FOUND["adapters"]]
    assert "head" not in text(told(adapters=adapters)) and "head" not in report.card(told(adapters=adapters), "x", [])
    assert "those of the adapters were dropped" in report.card(FOUND, "x", [])


def test_the_median_of_an_even_number_of_sites_is_between_two() -> None:
    part = section(FOUND, "Sites")
    assert part.verdict == ["At the median site 0.35; at the worst, encoder.layer.4.output, 0.6."]
    assert part.tables[0].caption == "The 5 worst of 6 sites."
    assert [row[1] for row in part.tables[0].rows] == ["0.6", "0.5", "0.4", "0.3", "0.2"]
    few = section(told(sites={"b": 0.5, "a": 0.5}), "Sites")
    assert few.tables[0].caption == "All sites, worst first." and [row[0] for row in few.tables[0].rows] == ["a", "b"]


def test_only_what_was_measured_of_the_drift_has_a_column() -> None:
    part = section(told(drift={"one": DRIFT, "two": {**DRIFT, "relative": 0.25}}), "Drift")
    assert part.tables[0].rows == [
        ["one", "0.125", "0.5", "0.0625", "90.0%", "20", "21.5"],
        ["two", "0.25", "0.5", "0.0625", "90.0%", "20", "21.5"],
    ]
    assert part.verdict == ["From the model with one, the reference, the outputs drift by 0.125."]
    mute = dict.fromkeys(("divergence", "agreement", "perplexity_before", "perplexity_after"))
    mute |= {"no_perplexity": "the model gives no logits", "output": "last hidden state"}
    part = section(told(drift={"one": DRIFT | mute}), "Drift")
    assert part.tables[0].head == ["with", "relative", "maximum"]
    assert part.tables[0].caption.endswith(
        "last hidden state of 1,234 tokens of 3 texts: relative L2 distance, largest difference."
    )
    assert part.notes == ["There is no perplexity: the model gives no logits."]


def test_operations_are_told_whole() -> None:
    part = section(FOUND, "Cost")
    assert part.verdict == ["1,000 parameters, where the adapters have 2,000 together."]
    assert part.tables[0].rows == [["1", "6,000,000", "2,000", "3000.00"], ["128", "768,000,000", "256,000", "3000.00"]]
    assert "joined by AdapterFusion" in part.notes[0]
    small = told(kind="ia3", flops={"1": {"before": 320, "after": 160}})
    assert section(small, "Cost").tables[0].rows == [["1", "320", "160", "2.00"]]
    assert "AdapterFusion" not in section(small, "Cost").notes[0]


def test_the_arms_are_told_and_explained() -> None:
    found = few_shot(arm("merged", 0.75), arm("single:one", 0.7, 0.05), arm("fusion", 0.8, -0.05))
    part = section(told(few_shot=found), "Few-shot")
    assert part.verdict == [
        "Tuned on 4 shots of each label, the merged adapter is right on 75.0% of the texts.",
        "The best mean is fusion's, 80.0%.",
    ]
    assert part.tables[0].rows[1] == ["single:one", "0.700 ± 0.050", "0.020", "0.7", "+0.050 ± 0.020", "1,234"]
    assert "merged, the merged adapter; single, one of the adapters; fusion, AdapterFusion" in part.notes[0]
    assert "The folder tuned holds the merged adapter" in part.notes[1]
    equal = section(told(few_shot=few_shot(arm("merged", 0.8), arm("fresh", 0.8, 0.0))), "Few-shot")
    assert equal.verdict[1] == "No other arm has a better mean."


def test_an_arm_that_failed_says_why() -> None:
    reason = "fusion, draw 1: the loss was not finite in epoch 2"
    found = few_shot(arm("merged", 0.75), arm("fusion", None, reason=reason))
    part = section(told(few_shot=found), "Few-shot")
    assert part.tables[0].rows[1] == ["fusion", "failed", "–", "–", "–", "1,234"]
    assert f"fusion: {reason}." in part.notes
    lost = section(told(few_shot=few_shot(arm("merged", None), arm("fresh", 0.5))), "Few-shot")
    assert lost.verdict == ["The merged adapter could not be tuned."]


def test_a_single_draw_has_no_interval() -> None:
    found = few_shot(arm("merged", 0.75))
    found["arms"][0]["accuracy"] |= {"deviation": None, "half_interval": None}
    assert section(told(few_shot=found), "Few-shot").tables[0].rows == [["merged", "0.750", "–", "0.75", "–", "1,234"]]


def test_the_card_gives_the_command_as_it_can_be_typed() -> None:
    adapters = [{**FOUND["adapters"][0], "label": "a b; rm"}, FOUND["adapters"][1]]
    config = Config(few_shot=FILE, baselines=True, normalize=False, base_model="minilm", weights="-1,2")
    card = report.card(told(adapters=adapters, reference="two"), "mera-merge", [config, Settings(seed=3)])
    (line,) = (line for line in card.splitlines() if line.startswith("pomona"))
    assert shlex.split(line) == [
        *("pomona", "mera-merge", "a b; rm", "two"),
        *("--few-shot", "shots.jsonl", "--baselines", "--weights", "-1,2", "--no-normalize"),
        *("--base-model", "minilm", "--seed", "3", "-o", "DIR"),
    ]


FILE: Any = "/data/somebody/shots.jsonl"


def test_the_card_tells_no_place_on_this_machine() -> None:
    adapters = [{**each, "base": "/data/somebody/models/bert"} for each in FOUND["adapters"]]
    config = Config(few_shot=FILE, base_model="/data/somebody/models/bert")
    card = report.card(told(adapters=adapters), "mera-merge", [config])
    assert "somebody" not in card and "| bert " in card and "base_model:" not in card
    assert "somebody" not in text(told(adapters=adapters))


@pytest.mark.parametrize(("kind", "words"), [("lora", "LoRA has none"), ("ia3", "(IA)³ has none")])
def test_the_card_claims_the_paper_for_what_the_paper_is_about(kind: str, words: str) -> None:
    other = report.card(told(kind=kind, alignment=NO_MATCH), "mera-merge", [])
    assert words in other and "Merged after MerA" not in other and "PeftModel" in other
    card = report.card(FOUND, "mera-merge", [])
    assert "Merged after MerA (arXiv 2308.15982)." in card and "use&#95;safetensors" not in card
    assert "use_safetensors=True" in card and card.count("averaged after optimal transport") == 1


def test_hostile_names_stay_text() -> None:
    evil = "\x1b[31m<script>|`x\n# head"
    adapters = [{**each, "label": evil, "base": evil, "licence": evil} for each in FOUND["adapters"]]
    found = told(adapters=adapters, reference=evil, tracks=evil, sites={evil: 0.5}, drift={evil: DRIFT})
    found["few_shot"] = few_shot(arm("merged", 0.5), arm(f"single:{evil}", None, reason=evil))
    for said in (text(found), report.card(found, "mera-merge", [Config()])):
        assert "\x1b" not in said and "\n# head" not in said
        prose = said.split("```")
        assert "<script>" not in "".join(prose[::2])
