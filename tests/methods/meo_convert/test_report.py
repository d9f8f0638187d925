"""What report.md and the model card say: true of the conversion, whole, and never markup of others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from methods.meo_convert import mixtures
from methods.meo_convert.conversions import TEXTS, go, sentences
from methods.meo_convert.upcycled import save_dense
from pomona.methods.meo_convert import report
from pomona.methods.meo_convert.config import Config
from pomona.report.sections import markdown
from small_bert import tokenizer

DRIFT = {
    "output": "logits",
    "maximum": 0.5,
    "relative": 0.0123456,
    "divergence": 0.001,
    "agreement": 0.987,
    "perplexity_before": 20.0,
    "perplexity_after": 21.5,
    "no_perplexity": None,
    "texts": 8,
    "tokens": 1234,
}
MERGED: dict[str, Any] = {
    "action": "merge",
    "family": "olmoe",
    "source": "olmoe",
    "licence": "apache-2.0",
    "arch": "single-expert",
    "architecture": "OlmoeForCausalLM",
    "level": "task",
    "scope": None,
    "experts": {"before": 8, "after": 1, "selected": 2},
    "unprompted": False,
    "weights": "uniform",
    "mass_kept": True,
    "dropped": [],
    "mass": {"0": 0.4, "1": 0.5},
    "parameters": {"before": 2000, "after": 1000},
    "flops": {tokens: {"before": 4e9, "mixture": 4e9, "after": 2e9} for tokens in ("1", "128", "512")},
    "alignment": {},
    "cosine": {"0": 0.91, "1": 0.95},
    "drift": DRIFT,
    "layers": {"0": 0.02, "1": 0.03},
    "layers_of_experts": True,
    "spoken": True,
    "failed": None,
    "training": None,
}


def told(**changed: Any) -> str:
    found = copy.deepcopy(MERGED) | changed
    return markdown(report.TITLE, report.PREAMBLE, report.sections(found), {})


def card(**changed: Any) -> str:
    return report.card(copy.deepcopy(MERGED) | changed, "meo-convert", changed.pop("options", []))


def test_figures_are_told_with_what_they_are() -> None:
    text = told()
    for said in (
        "The 8 experts of each of 2 layers were merged once.",
        "Mean cosine between two experts of a layer: 0.910 to 0.950.",
        "The gates of the source sum to 0.400 to 0.500 on average, not to 1; the output maps are scaled by that.",
        "Drift of the logits: 0.01235 (relative L2), 0.5 at most, over 1,234 tokens of text.",
        "The largest logit is the same one at 98.7% of the places; KL 0.001 nats.",
        "Perplexity 20 before, 21.5 after.",
        "From 0.02 to 0.03",
        "1,000 parameters, 2,000 before. At 128 tokens 2 GFLOP, 4 before.",
    ):
        assert said in text
    assert "forgets" in told(mass_kept=False) and "A check failed" not in text and "Measured before" not in text


def test_layers_that_are_not_off_need_no_table_and_no_figure() -> None:
    text = told(layers={"1": 0.0, "2": 0.0})
    assert "Nowhere: all 2 layers give the same numbers." in text and "layers.svg" not in text


def test_a_failed_check_is_said_in_report_and_card() -> None:
    why = "the outputs drift by 0.5, above --max-drift 0.1"
    assert f"A check failed: {why}." in told(failed=why)
    assert f"A check failed, and it was kept even so: {why}." in card(failed=why)


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [
        (None, "AutoModel"),
        ("BertModel", "AutoModel"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("OlmoeForCausalLM", "AutoModelForCausalLM"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("BartForSequenceClassification", "AutoModelForSequenceClassification"),
    ],
)
def test_the_card_loads_a_model_with_its_head(architecture: str | None, auto: str) -> None:
    import transformers

    plain, own = card(architecture=architecture), card(architecture=architecture, arch="meo")
    assert f'{auto}.from_pretrained(".")\n' in plain and hasattr(transformers, auto)
    assert f'{auto}.from_pretrained(".", trust_remote_code=True)' in own


def test_the_card_has_the_command_with_what_decides_its_output(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "a b", "gpt2")
    calib = sentences(tmp_path / "calib.jsonl", *TEXTS)
    go(source, tmp_path / "out", init="noise:0.01", seed=3, calib=calib)
    text = (tmp_path / "out/README.md").read_text()
    assert "pomona meo-convert 'a b' --init noise:0.01 --calib calib.jsonl --seed 3 -o DIR\n" in text
    assert str(tmp_path) not in text and "keep-failed" not in text


def test_a_flag_of_the_command_has_no_value() -> None:
    text = report.card(copy.deepcopy(MERGED), "meo-convert", [Config(keep_failed=True, max_drift=0.5)])
    assert "pomona meo-convert olmoe --max-drift 0.5 --keep-failed -o DIR\n" in text


def test_what_was_measured_before_training_is_said_to_be(tmp_path: Path) -> None:
    scores = {"accuracy": 0.5, "nll": 0.7, "perplexity": None, "predicted": 4}
    training = {
        "objective": "classification",
        "before": scores,
        "after": scores | {"accuracy": 0.75},
        "losses": [0.7, 0.6],
        "texts": 12,
        "tested": 4,
        "truncated": 0,
    }
    text = told(training=training, arch="meo", action="upcycle", family="bert")
    assert "Measured before training." in text and "With the head of the source" in text
    assert "Trained for 2 steps on 12 texts, it tells 75.0% of the classes of 4 other texts, 50.0% before." in text
    shown = card(training=training, arch="meo", action="upcycle", family="bert")
    assert "relative drift of the logits before training" in shown and "accuracy after training" in shown


def test_the_level_is_called_a_level() -> None:
    text = told(
        action="keep", arch="meo", level="token", experts={"before": 8, "after": 8, "selected": 3}, weights=None
    )
    assert "The 8 experts of each layer are kept, 3 of them selected at the token level." in text


def test_the_card_of_a_kept_mixture_says_what_it_gives_up() -> None:
    assert "chose some for each token" in card(action="keep", arch="meo")
    assert "each token" not in card() and "each token" not in card(action="keep", arch="moe")


def test_names_of_others_become_no_markup(tmp_path: Path) -> None:
    name = "we\x1b[31mird <img src=x onerror=alert(1)> `x` | [a](b)"
    source = tmp_path / name
    tokenizer().save_pretrained(source)
    mixtures.save(mixtures.alike(mixtures.make("mixtral")), source)
    (source / "README.md").write_text("---\nlicense: <script>alert(2)</script>\n---\n")
    _, _, seen = go(source, tmp_path / "out")
    for text in ((tmp_path / "out/report.md").read_text(), (tmp_path / "out/README.md").read_text(), *seen.shown):
        assert "\x1b" not in text
    outside = (tmp_path / "out/README.md").read_text().split("```")[::2]
    for text in ((tmp_path / "out/report.md").read_text(), *outside):
        assert "<img" not in text and "<script" not in text and "[a](b)" not in text
    assert json.loads((tmp_path / "out/report.json").read_bytes())["source"]
