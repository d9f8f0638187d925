"""What a run says of itself, for people: the sections of report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pomona.methods.madaug_train.figures import shown
from pomona.report.sections import Section, Table

TITLE = "A classifier and its augmentation policy"
PREAMBLE = (
    "By the command for *When to Learn What: Model-Adaptive Data Augmentation Curriculum* (MADAug, arXiv 2309.04747). "
    "Every number below was measured in this run; none is quoted from the paper."
)
_CLASSES = 12  # in the table


def sections(told: Mapping[str, Any], drawn: Sequence[tuple[str, str]] = ()) -> list[Section]:
    """The report's sections, of what report.json holds.

    Args:
        drawn: stem and caption of each figure.
    """
    parts = [_accuracy(told)]
    if told["policy"] is not None:
        parts.append(_policy(told))
    parts += [_classes(told), _images(told)]
    if told["main"] == "madaug":
        parts.append(_elsewhere())
    homes = {"accuracy": "Accuracy", "per_class": "Classes"}
    return [
        replace(part, figures=[each for each in drawn if homes.get(each[0], "Policy") == part.title]) for part in parts
    ]


def evaluated(found: Mapping[str, Any]) -> list[Section]:
    """The sections of an evaluation."""
    every, classes = found["all"], found["classes"]
    there = {name: row for name, row in classes.items() if row["images"]}
    worst = min(there, key=lambda name: there[name]["accuracy"])
    said = [
        f"{_percent(every['accuracy'])} of {_count(every['images'], 'image')} are classified correctly "
        f"(95 % interval {_percent(every['low'])} to {_percent(every['high'])}).",
        f"Worst is {worst}: {_percent(there[worst]['accuracy'])} of {there[worst]['images']:,}.",
    ]
    if found["shared"]:
        said.append(
            f"The run of the network read {', '.join(found['shared'])} too: it may have learned from some of these "
            "images, and then does better on them than on others. Its own report tells how it does on those it has not "
            "seen."
        )
    rows = [
        [name, f"{row['images']:,}", _percent(row["accuracy"]), f"{_percent(row['low'])} to {_percent(row['high'])}"]
        for name, row in sorted(there.items(), key=lambda item: item[1]["accuracy"])
    ]
    table = Table("Classes, worst first.", ["class", "images", "accuracy", "95 % interval"], rows)
    return [Section("Test", f"How good is the {found['net']} of the run on these images?", said, tables=[table])]


def _accuracy(told: Mapping[str, Any]) -> Section:
    main, rows = told["main"], told["accuracy"]
    seeds = len(told["seeds"])
    ours = rows[main]
    said = [
        f"{shown(main).capitalize()}: {_told(ours)}, over {_count(seeds, 'seed')} "
        f"(95 % interval {_percent(ours['low'])} to {_percent(ours['high'])})."
    ]
    for name, gain in told["differences"].items():
        said.append(
            f"Against {shown(name)} ({_told(rows[name])}): {100 * gain['mean']:+.1f} points "
            f"(95 % interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})."
        )
    notes = [
        f"Tested once, {_tested(told)}, on {_count(told['images']['test'], 'image')} that no training and no "
        "choice has seen.",
    ]
    if seeds == 1:
        notes.append(
            "One seed: intervals tell what other test images might have given, and nothing of how another seed would "
            "do. --seeds 3 or more does."
        )
    else:
        notes.append(
            "± is the standard deviation over seeds. Intervals resample seeds and test images both; differences are "
            "paired, seed by seed and image by image."
        )
    if main == "madaug" or "train+val" in rows:
        notes.append(
            "The labels of the images that a policy is learned on are labels too: trained on instead, they may be "
            "worth more than the policy (--compare train+val)."
        )
    if "uniform" in rows and main != "uniform":
        notes.append("The uniform policy draws magnitudes of every strength alike: what needs no learning at all.")
    if "random" in rows and main != "random":
        notes.append(
            "The random policy is one that has learned nothing: all operations alike likely, magnitudes about the "
            "middle, under the same curriculum."
        )
    table = Table(
        "Test accuracy, and labels that went into the training.",
        ["training", "labels", "accuracy", "sd over seeds, points"],
        [
            [shown(name), f"{told['labels'][name]:,}", _percent(row["mean"]), _points(row["sd"])]
            for name, row in rows.items()
        ],
    )
    return Section(
        "Accuracy",
        "What is the policy worth?" if told["differences"] else "How good is the network?",
        said,
        notes,
        [table],
    )


def _policy(told: Mapping[str, Any]) -> Section:
    policy, recipe = told["policy"], told["recipe"]
    rows = policy["operations"]
    top = ", ".join(f"{row['name']} {row['probability']:.2f} (strength {row['strength']:.2f})" for row in rows[:3])
    when = "at the end" if recipe["select"] == "last" else "in the epoch that was tested"
    said = [f"Most likely {when}: {top}; all alike would be {policy['uniform']:.2f} each."]
    if told["main"] == "madaug":
        updates = policy["updates"]
        said.append(
            f"The policy took {_count(sum(updates), 'step')}"
            + (f" over {_count(len(updates), 'seed')}" if len(updates) > 1 else "")
            + f"; its choice is at {sum(policy['entropy']) / len(updates):.2f} of the entropy of all alike."
        )
    reads = "the network's" if told["main"] == "madaug" else "the source network's"
    notes = [
        f"An image is augmented with probability {curriculum(recipe)}; then {policy['k']} of the operations "
        f"{'is' if policy['k'] == 1 else 'are'} drawn by its own probabilities, which depend on {reads} features of "
        "it; epochs count from 0.",
        "Strength is how far a magnitude is from doing nothing: |2 lam - 1| for shifts, turns and factors, where lam "
        "and 1 - lam of a mirrored operation are one; 1 - lam for Solarize and Posterize; lam for Cutout. Of what "
        "has no magnitude it is 1, and of Identity 0.",
    ]
    table = Table(
        f"The policy {when}: means over the classes of the images to learn from, and over seeds.",
        ["operation", "probability", "strength", "magnitude"],
        [[row["name"], f"{row['probability']:.3f}", f"{row['strength']:.2f}", _direction(row)] for row in rows],
    )
    asked = "What was learned, and does it augment at all?" if told["main"] == "madaug" else "What does it do here?"
    return Section("Policy", asked, said, notes, [table])


def _classes(told: Mapping[str, Any]) -> Section:
    main, classes = told["main"], told["per_class"]
    against = classes["against"]
    said = []
    for name, gain in against.items():
        said.append(
            f"Against {shown(name)}: {gain['gaining']} of {len(classes['classes'])} classes gain; the worst class, "
            f"{gain['hardest_class']}, gains {100 * gain['hardest_class_gain']:+.1f} points; the least gain is "
            f"{100 * gain['smallest_gain']:+.1f}, in {gain['smallest_gain_class']}."
        )
    notes = []
    if said:
        notes.append(
            "The worst class is the one with the lowest accuracy of both trainings together: were it chosen by one of "
            "them alone, chance would favour the other."
        )
    rows = classes["classes"]
    if not said:
        worst = min(rows, key=lambda row: row["accuracy"][main]["mean"])
        said = [f"Worst is {worst['name']}: {_percent(worst['accuracy'][main]['mean'])}."]
    names = list(told["accuracy"])
    hardest = sorted(rows, key=lambda row: min(row["accuracy"][name]["mean"] for name in names))[:_CLASSES]
    table = Table(
        f"Accuracy of {'the hardest ' + str(_CLASSES) if len(rows) > _CLASSES else 'all'} classes, hardest first.",
        ["class", "images", *(shown(name) for name in names)],
        [
            [row["name"], f"{row['images']:,}", *(_percent(row["accuracy"][name]["mean"]) for name in names)]
            for row in hardest
        ],
    )
    return Section("Classes", "Who gains, and do the hard classes?", said, notes, [table])


def _images(told: Mapping[str, Any]) -> Section:
    images = told["images"]
    said = [
        f"{_count(images['train'], 'image')} to learn from, {images['val']:,} for the policy, {images['test']:,} to "
        f"test on; {_count(images['classes'], 'class', 'classes')}."
    ]
    for name, what in (("unused", "in no part"), ("dropped", "dropped, as another part has the same pixels")):
        if images[name]:
            said.append(f"{_count(images[name], 'image')} {what}.")
    if told["rejects"]:
        said.append(f"{_count(len(told['rejects']), 'image')} could not be read.")
    return Section("Images", "What was learned from, and tested on?", said)


def _elsewhere() -> Section:
    said = [
        "policy.json lists the operations with how likely and how strong each is: two policies can be compared line by "
        "line. policy.safetensors holds the weights, with those of the network that they read.",
        "To train with it as it is: pomona madaug-train OTHER -o RUN --policy THIS.",
    ]
    return Section("Elsewhere", "How is the policy used again?", said)


def _direction(operation: Mapping[str, Any]) -> str:
    """The mean magnitude, where it says what the strength does not: that of signed operations is either way."""
    if operation["neutral"] is None or operation["signed"]:
        return "–"
    return f"{operation['magnitude']:.2f}"


def curriculum(recipe: Mapping[str, Any]) -> str:
    """The probability that an image is augmented, as a formula."""
    if not recipe["tau"]:
        return "1"
    return f"tanh(epoch / {recipe['tau']:g})" + (
        f" + {recipe['curriculum_floor']:g}" if recipe["curriculum_floor"] else ""
    )


def _tested(told: Mapping[str, Any]) -> str:
    """When."""
    if told["recipe"]["select"] == "last":
        return "after the last epoch"
    others = " (all labels: after the last)" if "train+val" in told["accuracy"] else ""
    return f"with the weights of the epoch that was best in validation{others}"


def _told(row: Mapping[str, Any]) -> str:
    spread = f" ± {_points(row['sd'])}" if row["sd"] is not None else ""
    return f"{_percent(row['mean'])}{spread}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
