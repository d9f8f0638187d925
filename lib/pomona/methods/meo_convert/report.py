"""What a conversion says of itself, for people: the sections of report.md, and the model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pomona.methods.meo_convert.families import DENSE
from pomona.report.cards import Parent, command_line, model_card
from pomona.report.layers import worst_layers
from pomona.report.sections import Section, Table

TITLE = "Experts merged into one"
FIGURE = "Error of each layer"
PREAMBLE = (
    "After *Merging Experts into One* (MEO, arXiv 2310.09832). Every number below was measured on this conversion or "
    "follows from its shapes; none is quoted from the paper."
)
_ARCHES = {
    "single-expert": "a model of the same family with one expert in each layer",
    "dense-twin": "a dense model",
    "meo": "a model that merges its selected experts for each input",
    "moe": "a vanilla mixture, which sums the outputs of its selected experts",
}


def sections(found: Mapping[str, Any]) -> list[Section]:
    """The report's sections, of what report.json holds."""
    parts = [_conversion(found)]
    if found["drift"]:
        parts += [_drift(found), _layers(found)]
    parts.append(_cost(found))
    if found["training"]:
        parts.append(_training(found["training"]))
    return parts


def _conversion(found: Mapping[str, Any]) -> Section:
    experts = found["experts"]
    said = [f"{found['source']} ({found['family']}) became {_ARCHES[found['arch']]} ({found['arch']})."]
    notes = []
    if found["action"] == "merge":
        said.append(f"The {experts['before']} experts of each of {len(found['cosine'])} layers were merged once.")
        cosines = [cosine for cosine in found["cosine"].values() if cosine is not None]
        if cosines:
            said.append(
                f"Mean cosine between two experts of a layer: {min(cosines):.3f} to {max(cosines):.3f}. Experts that "
                "are alike merge well; near 0 they have nothing in common."
            )
        notes.append(f"Weights of the experts: {found['weights'].rpartition('/')[2]}.")
        masses = [mass for mass in found["mass"].values() if abs(mass - 1) > 1e-6]
        if masses:
            done = "the output maps are scaled by that" if found["mass_kept"] else "--mass one forgets that"
            notes.append(
                f"The gates of the source sum to {min(masses):.3f} to {max(masses):.3f} on average, not to 1; {done}."
            )
    elif found["action"] == "upcycle":
        said.append(
            f"Every feed-forward map is {experts['after']} experts now, {experts['selected']} of them selected at the "
            f"{found['level']} level."
        )
    elif found["action"] == "keep":
        said.append(
            f"The {experts['before']} experts of each layer are kept, {experts['selected']} of them selected at the "
            f"{found['level']} level."
        )
    else:
        said.append(f"Its {experts['before']} experts are those of its source, trained further.")
    if found["scope"] not in (None, "sequence") and found["arch"] == "meo" and found["level"] != "task":
        notes.append(f"What the gates of the decoder see: {found['scope']}.")
    if found["dropped"]:
        notes.append(f"--compat reference lost {len(found['dropped'])} biases, as the released code does.")
    tables = [_alignment(found["alignment"])] if found["alignment"] else []
    return Section("Conversion", "What became of the experts?", said, notes, tables)


def _alignment(alignment: Mapping[str, Mapping[str, float]]) -> Table:
    rows = [
        [layer, _number(of["cost_before"]), _number(of["cost_after"]), f"{of['moved']:.1%}"]
        for layer, of in alignment.items()
    ]
    caption = "Distance between hidden units of the same number, before and after matching, and units that moved."
    return Table(caption, ["layer", "cost before", "after", "moved"], rows)


def _drift(found: Mapping[str, Any]) -> Section:
    drift = found["drift"]
    what = "tokens of text" if found["spoken"] else "random tokens, as the model has no tokenizer"
    said = [
        f"Drift of the {drift['output']}: {_number(drift['relative'])} (relative L2), {_number(drift['maximum'])} at "
        f"most, over {drift['tokens']:,} {what}."
    ]
    if drift["agreement"] is not None:
        said.append(
            f"The largest logit is the same one at {drift['agreement']:.1%} of the places; KL "
            f"{_number(drift['divergence'])} nats."
        )
    if drift["perplexity_before"] is not None:
        said.append(
            f"Perplexity {_number(drift['perplexity_before'])} before, {_number(drift['perplexity_after'])} after."
        )
    notes = [f"No perplexity: {drift['no_perplexity']}."] if drift["no_perplexity"] else []
    if found["unprompted"]:
        notes.append(
            "No text was a prompt here: the gates of the decoder saw its first token alone, so that no prediction "
            "rests on tokens after it."
        )
    if found["training"]:
        notes.append("Measured before training.")
    if found["failed"]:
        notes.append(f"A check failed: {found['failed']}.")
    return Section("Drift", "How far is the new model from its source?", said, notes)


def _layers(found: Mapping[str, Any]) -> Section:
    errors: Mapping[str, float] = found["layers"]
    ordered = sorted(errors.values())
    of = (
        "what the merged expert puts out against what the mixture does, on the input the layer has in the source"
        if found["layers_of_experts"]
        else "hidden states behind each layer"
    )
    if not ordered[-1]:
        return Section("Layers", "Where is it off?", [f"Nowhere: all {len(errors)} layers give the same numbers."])
    said = [f"From {_number(ordered[0])} to {_number(ordered[-1])}, at the median layer {_number(_median(ordered))}."]
    table = worst_layers(list(errors), list(errors.values()))
    table = Table(f"{table.caption.partition(' Error')[0]} Relative L2 error of {of}.", table.head, table.rows)
    return Section("Layers", "Where is it off?", said, [], [table], [("layers", f"Relative L2 error of {of}.")])


def _cost(found: Mapping[str, Any]) -> Section:
    before, after = found["parameters"]["before"], found["parameters"]["after"]
    at = found["flops"]["128"]
    said = [
        f"{after:,} parameters, {before:,} before. At 128 tokens {at['after'] / 1e9:.4g} GFLOP, "
        f"{at['before'] / 1e9:.4g} before."
    ]
    rows = [
        [tokens, *(f"{cost[name] / 1e9:,.4g}" for name in ("before", "mixture", "after")), _times(cost)]
        for tokens, cost in found["flops"].items()
    ]
    caption = "GFLOP of a forward pass for one sequence: the source, a mixture of the selected experts, the output."
    notes = ["Matrix products, a multiplication and an addition as two; the merge of experts likewise."]
    if found["family"] in DENSE and found["arch"] in ("meo", "moe"):
        notes.append("Without the gates, which are small.")
    if found["training"] and found["training"]["objective"] == "classification":
        notes.append("With the head of the source, before and after.")
    head = ["tokens", "before", "mixture", "after", "mixture / after"]
    return Section("Cost", "What does it cost to run?", said, notes, [Table(caption, head, rows)])


def _training(found: Mapping[str, Any]) -> Section:
    before, after = found["before"], found["after"]
    spoken = after["perplexity"] is not None
    kind = {"classification": "classes", "causal": "next tokens", "masked": "masked tokens"}[found["objective"]]
    said = [
        f"Trained for {len(found['losses']):,} steps on {found['texts']:,} texts, it tells {after['accuracy']:.1%} of "
        f"the {kind} of {found['tested']:,} other texts, {before['accuracy']:.1%} before."
    ]
    rows = [
        [when, f"{of['accuracy']:.3f}", _number(of["nll"]), *([_number(of["perplexity"])] if spoken else [])]
        for when, of in (("before", before), ("after", after))
    ]
    also = (
        ", mean negative log-likelihood in nats and perplexity"
        if spoken
        else " and mean negative log-likelihood in nats"
    )
    caption = f"Accuracy{also} over {after['predicted']:,} {kind}."
    notes = [f"{found['truncated']:,} texts were longer than the limit and cut."] if found["truncated"] else []
    return Section(
        "Training",
        "What did training come to?",
        said,
        notes,
        [Table(caption, ["", "accuracy", "NLL", *(["perplexity"] if spoken else [])], rows)],
    )


def card(found: Mapping[str, Any], command: str, options: Sequence[Any]) -> str:
    """The text of README.md.

    Args:
        options: the dataclasses of options that decide what is written.
    """
    metrics = {"parameters": f"{found['parameters']['after']:,} ({found['parameters']['before']:,} before)"}
    cost = found["flops"]["128"]
    metrics["GFLOP at 128 tokens"] = f"{cost['after'] / 1e9:.4g} ({cost['before'] / 1e9:.4g} before)"
    if drift := found["drift"]:
        when = " before training" if found["training"] else ""
        metrics[f"relative drift of the {drift['output']}{when}"] = _number(drift["relative"])
        if drift["perplexity_after"] is not None:
            told = f"{_number(drift['perplexity_after'])} ({_number(drift['perplexity_before'])} before)"
            metrics[f"perplexity on the calibration text{when}"] = told
    if training := found["training"]:
        metrics["accuracy after training"] = f"{training['after']['accuracy']:.3f}"
    return model_card(
        TITLE,
        _conversion(found).verdict[0],
        parents=[Parent(found["source"], "source", found["licence"])],
        method=["Converted after MEO (arXiv 2310.09832).", *_conversion(found).verdict],
        command=command_line(command, [found["source"]], *options),
        metrics=metrics,
        limits=list(_limits(found)),
        tags=["merge", "mixture-of-experts"],
        usage=_usage(found),
    )


_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}
"""The class of transformers that loads an architecture, head and all, by the end of its name."""


def _usage(found: Mapping[str, Any]) -> str:
    named = found["architecture"] or ""
    auto = next((auto for ending, auto in _AUTO.items() if named.endswith(ending)), "AutoModel")
    code = found["arch"] in ("meo", "moe")
    call = '".", trust_remote_code=True)  # runs modeling_meo.py of this directory' if code else '".")'
    return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({call}\n"


def _limits(found: Mapping[str, Any]) -> Iterator[str]:
    if found["failed"]:
        yield f"A check failed, and it was kept even so: {found['failed']}."
    if not found["drift"]:
        yield "It was not run beside its source: how far it drifted is unknown."
    if found["action"] == "merge":
        yield "One expert stands for all: what they did differently for different inputs is gone."
    if found["action"] == "keep" and found["arch"] == "meo":
        yield "Experts are merged for a whole text or segment, where the source chose some for each token."
    if found["action"] == "upcycle" and not found["training"]:
        yield "Its gates are untrained: which experts they select means nothing yet."
    if found["dropped"]:
        yield "It lost the biases of its feed-forward maps, as the released code does."


def _times(cost: Mapping[str, int]) -> str:
    return f"{cost['mixture'] / cost['after']:.2f}" if cost["after"] else "–"


def _median(ordered: list[float]) -> float:
    return ordered[len(ordered) // 2]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
