"""What a merge says of itself, for people: the sections of report.md, and the model card."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pomona.methods.mera_merge.merging import NAMES
from pomona.report.cards import Parent, command_line, model_card
from pomona.report.sections import Section, Table

TITLE = "Adapters merged into one"
PREAMBLE = (
    "By the command for *Merging Pretrained Adapters for Few-Shot Learning* (MerA, arXiv 2308.15982). Every number "
    "below was measured or counted on this merge; none is quoted from the paper."
)
_SOURCES = {
    "bottleneck": "Merged after MerA (arXiv 2308.15982).",
    "lora": "MerA (arXiv 2308.15982) matches the units of bottleneck adapters; LoRA has none, so maps are summed.",
    "ia3": "MerA (arXiv 2308.15982) matches the units of bottleneck adapters; (IA)³ has none, so scales are averaged.",
}
_HEADS = {"drop": "dropped", "keep-reference": "the reference's is kept", "average": "averaged"}
_ARMS = {
    "merged": "the merged adapter",
    "single": "one of the adapters",
    "average": "their plain average, units as they come",
    "fusion": "AdapterFusion over all of them, frozen",
    "fresh": "an untrained adapter",
    "full": "the whole base model, without an adapter",
}
_METHODS = {
    "avg": "averaged as they are",
    "sum": "summed as they are",
    "wts": "averaged after optimal transport on their units' weights",
    "acts": "averaged after optimal transport on their units' activations",
    "assign": "averaged after one-to-one assignment of their units by weights",
    "delta-svd": "summed as maps, cut to a rank by singular values",
    "delta-cat": "summed as maps, exactly, at the sum of their ranks",
    "linear": "summed factor by factor",
}
_WORST = 5
_USAGE = {
    "adapters": """from adapters import AutoAdapterModel

model = AutoAdapterModel.from_pretrained("BASE")
model.load_adapter("DIR", use_safetensors=True, set_active=True)
""",
    "peft": """from peft import PeftModel

model = PeftModel.from_pretrained(base, "DIR")  # base: the base model, as transformers loads it
""",
}


def sections(found: Mapping[str, Any]) -> list[Section]:
    """The report's sections, of what report.json holds."""
    parts = [_merge(found)]
    if found["sites"]:
        parts.append(_sites(found))
    if found["drift"]:
        parts.append(_drift(found))
    parts.append(_cost(found))
    if found["few_shot"]:
        parts.append(_few_shot(found["few_shot"]))
    return parts


def _merge(found: Mapping[str, Any]) -> Section:
    alignment = found["alignment"]
    said = [f"{_made(found)}: {found['parameters']['after']:,} parameters."]
    notes = [f"Tracks: {found['tracks']}.", *_heads(found)]
    if alignment["cost_after"] is not None:
        before = "" if alignment["cost_before"] is None else f" from {_number(alignment['cost_before'])}"
        said.append(
            f"Matching to {found['reference']} moved {alignment['moved']:.1%} of the hidden units and brought the "
            f"distance between matched units{before} to {_number(alignment['cost_after'])}."
        )
        notes.append(f"Distances are {found['distance']}, summed over units and sites.")
    matched = alignment["cost_after"] is not None
    rows = []
    for each in found["adapters"]:
        costs = [_number(each["cost_before"]), _number(each["cost_after"]), _share(each["moved"])]
        origin = [_shown(each["base"]) or "not said", each["licence"] or "not said"]
        rows.append([each["label"], f"{each['weight']:.4g}", *(costs if matched else []), *origin])
    head = [
        *("adapter", "weight"),
        *(("distance before", "after", "moved") if matched else ()),
        *("base model", "licence"),
    ]
    caption = "The adapters" + (
        ", the distance of each one's units from the reference's before and after matching, and how many moved."
        if matched
        else "."
    )
    return Section("Merge", "What was merged, and how?", said, notes, [Table(caption, head, rows)])


def _heads(found: Mapping[str, Any]) -> Iterator[str]:
    having = [each["label"] for each in found["adapters"] if each["head"]]
    if having:
        yield f"Prediction heads, of {', '.join(having)}: {_HEADS[found['heads']]}."


def _shown(base: str | None) -> str | None:
    """What a configuration calls the base model, without the folders of the machine it was trained on."""
    return PurePath(base).name if base and PurePath(base).is_absolute() else base


def _made(found: Mapping[str, Any]) -> str:
    count, name = len(found["adapters"]), NAMES[found["kind"]]
    if count == 1:
        weight = found["adapters"][0]["weight"]
        how = "as it is" if weight == 1 else f"with the weight {weight:.4g} ({found['method']})"
        return f"One {name.removesuffix('s')}, {how}"
    return f"{count} {name} {_METHODS[found['method']]} ({found['method']})"


def _sites(found: Mapping[str, Any]) -> Section:
    errors: Mapping[str, float] = found["sites"]
    worst = sorted(errors.items(), key=lambda item: (-item[1], item[0]))[:_WORST]
    of = (
        "relative L2 distance of what the merged bottleneck puts out from the weighted sum of what the adapters' do, "
        "on Gaussian input of unit variance"
        if found["kind"] == "bottleneck"
        else "relative Frobenius distance of the merged map from the weighted sum of the adapters' maps"
    )
    median, most = _number(statistics.median(errors.values())), _number(worst[0][1])
    said = [f"At the median site {median}; at the worst, {worst[0][0]}, {most}."]
    which = f"The {len(worst)} worst of {len(errors)} sites" if len(errors) > len(worst) else "All sites, worst first"
    table = Table(f"{which}.", ["site", "error"], [[n, _number(e)] for n, e in worst])
    return Section(
        "Sites",
        "How far is the merged adapter from what the adapters compute together?",
        said,
        [f"Error: {of}."],
        [table],
        [("sites", "The error at every site, in the order of the model.")],
    )


def _drift(found: Mapping[str, Any]) -> Section:
    drifts = found["drift"]
    some = drifts[found["reference"]]
    rows = [
        [
            label,
            _number(drift["relative"]),
            _number(drift["maximum"]),
            _number(drift["divergence"]),
            _share(drift["agreement"]),
            _number(drift["perplexity_before"]),
            _number(drift["perplexity_after"]),
        ]
        for label, drift in drifts.items()
    ]
    head = ["with", "relative", "maximum", "KL, nats", "top-1", "perplexity", "if merged"]
    known = [place for place in range(len(head)) if any(row[place] != "–" for row in rows)]
    caption = (
        f"The base model with the merged adapter against the base with each one, {some['output']} of "
        f"{some['tokens']:,} tokens of {some['texts']:,} texts: relative L2 distance, largest difference"
        + (", mean KL, how often the largest logit is the same" if some["divergence"] is not None else "")
        + (", perplexity with each one and with the merged adapter." if some["perplexity_before"] is not None else ".")
    )
    said = [
        f"From the model with {found['reference']}, the reference, the outputs drift by {_number(some['relative'])}."
    ]
    notes = [f"There is no perplexity: {some['no_perplexity']}."] if some["no_perplexity"] else []
    question = "How far is the model with the merged adapter from the models with each adapter?"
    shown = [[row[place] for place in known] for row in rows]
    return Section("Drift", question, said, notes, [Table(caption, [head[place] for place in known], shown)])


def _cost(found: Mapping[str, Any]) -> Section:
    before, after = found["parameters"]["before"], found["parameters"]["after"]
    several = len(found["adapters"]) > 1
    said = [f"{after:,} parameters, where the adapter{'s have' if several else ' has'} {before:,}"]
    said[0] += " together." if several else "."
    rows = [
        [tokens, f"{cost['before']:,}", f"{cost['after']:,}", f"{cost['before'] / cost['after']:.2f}"]
        for tokens, cost in found["flops"].items()
        if cost["after"]
    ]
    fused = found["kind"] == "bottleneck" and several
    caption = "Floating-point operations for one sequence, the base model's own left out."
    notes = [
        f"Before: all adapters side by side{', joined by AdapterFusion' if fused else ''}; after: the merged one. "
        "Counted from the shapes of the products; a multiplication and an addition are two operations."
    ]
    table = Table(caption, ["tokens", "before", "after", "ratio"], rows)
    return Section("Cost", "What does one adapter cost instead of several?", said, notes, [table])


def _few_shot(found: Mapping[str, Any]) -> Section:
    rows = []
    for arm in found["arms"]:
        accuracy, nll = arm["accuracy"], arm["nll"]
        behind = (arm.get("behind") or {}).get("accuracy")
        rows.append(
            [
                arm["arm"],
                "failed" if accuracy is None else f"{accuracy['mean']:.3f}{_half(accuracy)}",
                "–" if accuracy is None or accuracy["deviation"] is None else f"{accuracy['deviation']:.3f}",
                "–" if nll is None else _number(nll["mean"]),
                "–" if behind is None else f"{behind['mean']:+.3f}{_half(behind)}",
                f"{arm['trained_parameters']:,}",
            ]
        )
    draws = found["draws"]
    caption = (
        f"Accuracy (mean ± half of Student's 95 % interval), its standard deviation, and negative log-likelihood on "
        f"{found['tests']:,} texts, over {draws} draw{'s' * (draws != 1)} of {found['shots']} shots of each of "
        f"{len(found['labels'])} labels; how far the merged adapter is ahead on the same draws; parameters trained."
    )
    head = ["arm", "accuracy", "s.d.", "NLL", "merged ahead by", "trained"]
    question = "What does the merged adapter come to, tuned on a few examples?"
    kinds = dict.fromkeys(arm["arm"].partition(":")[0] for arm in found["arms"])
    tuned = "; ".join(f"{kind}, {_ARMS[kind]}" for kind in kinds)
    notes = [
        f"Tuned beside a linear head, the base frozen unless said: {tuned}.",
        "The folder tuned holds the merged adapter as the first draw tuned it, with its head.",
    ]
    notes += [f"{arm['arm']}: {arm['reason']}." for arm in found["arms"] if arm.get("reason")]
    return Section("Few-shot", question, list(_verdict(found)), notes, [Table(caption, head, rows)])


def _verdict(found: Mapping[str, Any]) -> Iterator[str]:
    arms = {arm["arm"]: arm for arm in found["arms"] if arm["accuracy"] is not None}
    if "merged" not in arms:
        yield "The merged adapter could not be tuned."
        return
    reached = _share(_mean(arms["merged"]))
    yield f"Tuned on {found['shots']} shots of each label, the merged adapter is right on {reached} of the texts."
    if len(arms) > 1:
        best = max(arms.values(), key=_mean)
        if best["arm"] == "merged":
            yield "No other arm has a better mean."
        else:
            yield f"The best mean is {best['arm']}'s, {_share(_mean(best))}."


def _mean(arm: Mapping[str, Any]) -> float:
    return float(arm["accuracy"]["mean"])


def card(found: Mapping[str, Any], command: str, options: Sequence[Any]) -> str:
    """The text of README.md.

    Args:
        options: the dataclasses of options that decide what is written.
    """
    parents = [
        Parent(each["label"], f"adapter, weight {each['weight']:.4g}", each["licence"]) for each in found["adapters"]
    ]
    bases = dict.fromkeys(each["base"] for each in found["adapters"] if each["base"])
    parents += [Parent(_shown(base) or base, "base model", None, base) for base in bases]
    drift = found["drift"] and found["drift"][found["reference"]]
    metrics = {"parameters": f"{found['parameters']['after']:,}"}
    if found["sites"]:
        metrics["largest error at a site (report.md says of what)"] = _number(max(found["sites"].values()))
    if drift:
        metrics[f"relative drift of the {drift['output']} from {found['reference']}"] = _number(drift["relative"])
    for arm in (found["few_shot"] or {"arms": []})["arms"]:
        if arm["accuracy"] is not None:
            metrics[f"few-shot accuracy, {arm['arm']}"] = f"{arm['accuracy']['mean']:.3f}{_half(arm['accuracy'])}"
    return model_card(
        TITLE,
        f"{_made(found)}.",
        parents=parents,
        method=[_SOURCES[found["kind"]], *_merge(found).verdict[1:]],
        command=command_line(command, [each["label"] for each in found["adapters"]], *options),
        metrics=metrics,
        limits=list(_limits(found)),
        tags=["adapters" if found["kind"] == "bottleneck" else "peft", "merge"],
        usage=_USAGE["adapters" if found["kind"] == "bottleneck" else "peft"],
        library="adapters" if found["kind"] == "bottleneck" else "peft",
    )


def _limits(found: Mapping[str, Any]) -> Iterator[str]:
    if not found["drift"]:
        yield "Nothing was run through the base model: drift and accuracy are unknown."
    if len(found["adapters"]) > 1 and found["kind"] == "bottleneck" and found["method"] in ("avg", "sum"):
        yield "Units were not matched: adapters that were trained apart have them in different orders."
    if found["method"] == "linear":
        yield "Factors were summed one by one: the map has cross terms between adapters."
    if found["heads"] == "drop" and any(each["head"] for each in found["adapters"]):
        yield "It has no prediction head: those of the adapters were dropped."


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _half(spread: Mapping[str, float | None]) -> str:
    return "" if spread["half_interval"] is None else f" ± {spread['half_interval']:.3f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
