"""What the gradient of the policy costs, by the ways there are to compute it.

    python tests/bench/madaug_policy_step.py [--network cnn-small,wrn-16-1] [--rounds 7] [--quick]

One inner step, one outer loss and the derivative through them, relaxation "loss" and batch statistics, float32, all
contenders on the same weights, copies and labels, taking turns in one process of one thread:

unrolled             autograd through the step with torch's own batch norm, as the released code does it by `higher`
unrolled, ours       `--hypergradient unrolled`: the same with our batch norm and the channels last in memory
jvp                  `--hypergradient jvp`: dual numbers in the reverse pass
differences          of the gradients at w +- eps v (DARTS), with eps such that the weights move by 1e-2 in all

first in probabilities alone, where jvp is one forward pass, and then in magnitudes too, straight through the copies of
images, which a policy step computes. `cnn-small` sees 16 digits of 8 x 8 under 17 operations and 50 to validate on,
networks of photographs 4 images of 32 x 32 and 16. Errors are L2, relative to the unrolled gradient in float64; a time
is only printed of what is about as right as `unrolled` is in float32, but for differences, whose steps jump over kinks
of ReLU. Seconds are of the processor, medians over the rounds, since the machine may not be ours alone; peaks are of a
process with that contender alone. Results go to results/madaug_policy_step.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from processes import ROOT, machine, surroundings, target, watched

PATH = ROOT / "tests/bench/results/madaug_policy_step.json"
NAMES = ("unrolled", "unrolled, ours", "jvp", "differences")
JOBS = ("p", "p and magnitudes")
SHAPES = {"cnn-small": (16, 50, 1, 8), "wrn": (4, 16, 3, 32)}
LR, OPERATIONS, CLASSES, MOVE = 0.1, 17, 10, 1e-2

Gradient = Callable[[], Sequence[Any]]


class Place:
    """A network about to take a step, in one number format."""

    def __init__(self, name: str, double: bool = False) -> None:
        import torch

        from pomona.methods.madaug_train.config import Config
        from pomona.methods.madaug_train.networks import build
        from pomona.methods.madaug_train.recipe import recipe

        images, val, channels, side = SHAPES["cnn-small" if name == "cnn-small" else "wrn"]
        self.network = build(name, channels, CLASSES, side, 0)
        generator = torch.Generator().manual_seed(0)
        self.p = torch.randn(images, OPERATIONS, generator=generator).softmax(-1)
        self.copies = torch.randn(images, OPERATIONS, channels, side, side, generator=generator)
        self.val_images = torch.randn(val, channels, side, side, generator=generator)
        self.labels = torch.randint(CLASSES, (images,), generator=generator)
        self.val_labels = torch.randint(CLASSES, (val,), generator=generator)
        self.momentum = torch.zeros(sum(each.numel() for each in self.network.parameters()))
        self.recipe = recipe(Config(), "digits")
        if double:
            self.network.double()
            for each in ("p", "copies", "val_images", "momentum"):
                setattr(self, each, getattr(self, each).double())

    def gradient(self, name: str, job: str) -> Gradient:
        """What the contender computes for the job."""
        copies = job == "p and magnitudes"
        if name == "unrolled":
            return lambda: self._natively(lambda: self._unrolled(copies))
        if name == "differences":
            return lambda: self._natively(lambda: self._differences(copies))
        if not copies:
            return self._forward if name == "jvp" else lambda: self._ours("unrolled")[:1]
        return lambda: self._ours("jvp" if name == "jvp" else "unrolled")

    def _ours(self, route: str) -> Sequence[Any]:
        from pomona.methods.madaug_train.hypergradient import hypergradient
        from pomona.methods.madaug_train.normalisation import statistics

        told = dataclasses.replace(self.recipe, hypergradient=route)
        given = (self.momentum, self.p, self.copies, self.labels, self.val_images, self.val_labels)
        with statistics(self.network, "batch"):
            return hypergradient(self.network, *given, recipe=told, lr=LR)

    def _forward(self) -> Sequence[Any]:
        """Section 1.3's closed form: the losses of all copies, moved along v, by one forward pass."""
        from torch.autograd import forward_ad, grad
        from torch.func import functional_call

        from pomona.methods.madaug_train.hypergradient import _channels_last
        from pomona.methods.madaug_train.normalisation import statistics

        with statistics(self.network, "batch"):
            weights = {name: _channels_last(each).requires_grad_() for name, each in self.network.named_parameters()}
            flat = _channels_last(self.copies.flatten(0, 1))
            losses = self._losses(functional_call(self.network, weights, (flat,)))
            slopes = grad((self.p * losses).sum() / len(self.p), list(weights.values()))
            directions = self._directions(weights, slopes, _channels_last(self.val_images))
            with forward_ad.dual_level():
                moving = {
                    name: forward_ad.make_dual(each.detach(), direction)
                    for (name, each), direction in zip(weights.items(), directions, strict=True)
                }
                moved = self._losses(functional_call(self.network, moving, (flat,)))
                return [forward_ad.unpack_dual(moved).tangent * (-LR / len(self.p))]

    def _directions(self, weights: Any, slopes: Any, val_images: Any) -> Any:
        from torch.autograd import grad
        from torch.func import functional_call
        from torch.nn.functional import cross_entropy

        stepped = self._stepped(weights, slopes)
        stepped = {name: each.detach().requires_grad_() for name, each in stepped.items()}
        outer = cross_entropy(functional_call(self.network, stepped, (val_images,)), self.val_labels)
        return grad(outer, list(stepped.values()))

    def _stepped(self, weights: Any, slopes: Any) -> Any:
        decay = self.recipe.weight_decay
        return {
            name: each - LR * (slope + decay * each)
            for (name, each), slope in zip(weights.items(), slopes, strict=True)
        }

    def _losses(self, logits: Any) -> Any:
        from torch.nn.functional import cross_entropy

        targets = self.labels.repeat_interleave(OPERATIONS)
        return cross_entropy(logits, targets, reduction="none").view(self.p.shape)

    def _inner(self, weights: Any, p: Any, copies: Any) -> Any:
        from torch.func import functional_call

        return (p * self._losses(functional_call(self.network, weights, (copies.flatten(0, 1),)))).sum() / len(p)

    def _unrolled(self, copies: bool) -> Sequence[Any]:
        from torch.autograd import grad
        from torch.func import functional_call
        from torch.nn.functional import cross_entropy

        p, c = self.p.clone().requires_grad_(), self.copies.clone().requires_grad_(copies)
        weights = {name: each.detach().requires_grad_() for name, each in self.network.named_parameters()}
        slopes = grad(self._inner(weights, p, c), list(weights.values()), create_graph=True)
        stepped = self._stepped(weights, slopes)
        outer = cross_entropy(functional_call(self.network, stepped, (self.val_images,)), self.val_labels)
        return grad(outer, (p, c) if copies else (p,))

    def _differences(self, copies: bool) -> Sequence[Any]:
        import torch
        from torch.autograd import grad

        p, c = self.p.clone().requires_grad_(), self.copies.clone().requires_grad_(copies)
        weights = {name: each.detach().requires_grad_() for name, each in self.network.named_parameters()}
        slopes = grad(self._inner(weights, p.detach(), c.detach()), list(weights.values()))
        directions = self._directions(weights, slopes, self.val_images)
        eps = MOVE / float(torch.cat([each.flatten() for each in directions]).norm())
        found = []
        for sign in (1, -1):
            moved = {
                name: each.detach() + sign * eps * direction
                for (name, each), direction in zip(weights.items(), directions, strict=True)
            }
            with torch.set_grad_enabled(True):
                found.append(grad(self._inner(moved, p, c), (p, c) if copies else (p,)))
        return [(one - other) * (-LR / (2 * eps)) for one, other in zip(*found, strict=True)]

    def _natively(self, work: Gradient) -> Sequence[Any]:
        """`work` with torch's batch norm."""
        from torch.nn.functional import batch_norm

        from pomona.methods.madaug_train import normalisation

        ours = normalisation.batch_normalised
        normalisation.batch_normalised = lambda x, w, b, eps: batch_norm(x, None, None, w, b, True, 0.0, eps)
        try:
            with normalisation.statistics(self.network, "batch"):
                return work()
        finally:
            normalisation.batch_normalised = ours


def race(name: str, rounds: int, quick: bool) -> dict[str, Any]:
    """One network: errors, then times and peaks, of all contenders in both jobs."""
    place, exact = Place(name), Place(name, double=True)
    found: dict[str, Any] = {
        "network": name,
        "parameters": len(place.momentum),
        "copies": list(place.copies.shape),
        "validation": len(place.val_images),
        "jobs": {},
    }
    for job in JOBS:
        expected = exact.gradient("unrolled", job)()
        work = {each: place.gradient(each, job) for each in NAMES}
        errors = {each: _error(run(), expected) for each, run in work.items()}
        for each, error in errors.items():
            if each != "differences" and not error <= max(1e-5, 10 * errors["unrolled"]):
                raise SystemExit(f"{name}, {job}: {each} is {error:.2g} from the gradient in float64")
        seconds: dict[str, list[float]] = {each: [] for each in NAMES}
        for _ in range(rounds):
            for each, run in work.items():
                begin = time.process_time()
                run()
                seconds[each].append(time.process_time() - begin)
        ms = {each: 1000 * statistics.median(taken) for each, taken in seconds.items()}
        found["jobs"][job] = {
            "ms": {each: round(value, 2) for each, value in ms.items()},
            "ms_range": {each: [round(1000 * f(taken), 2) for f in (min, max)] for each, taken in seconds.items()},
            "of_unrolled": {each: round(value / ms["unrolled"], 3) for each, value in ms.items()},
            "error": {each: float(f"{error:.3g}") for each, error in errors.items()},
            "peak_mb": {} if quick else {each: _peak(name, each, job) for each in NAMES},
        }
        print(name, job, file=sys.stderr)
    return found


def _error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The larger one of both parts; what magnitudes get is the sum over a copy's pixels."""
    parts = (
        [each.double().flatten(2).sum(2) if each.ndim > 2 else each.double() for each in side]
        for side in (found, expected)
    )
    return max(float((one - other).norm() / other.norm()) for one, other in zip(*parts, strict=True))


def _peak(name: str, contender: str, job: str) -> float:
    """Most memory of a process that runs the contender alone."""
    command = [sys.executable, __file__, "--network", name, "--alone", contender, "--job", job]
    return round(watched(command, surroundings(ROOT / "lib", threads=1)).peak_mb)


def show(result: dict[str, Any]) -> None:
    """The table, in Markdown."""
    print("| network | gradient in | contender | ms | of unrolled | peak MB | error |\n|" + "---|" * 7)
    for place in result["places"]:
        for job, told in place["jobs"].items():
            for each in NAMES:
                row = (told["ms"][each], f"{told['of_unrolled'][each]:.2f}x", told["peak_mb"].get(each, ""))
                print(
                    f"| {place['network']} | {job} | {each} | {' | '.join(map(str, row))} | {told['error'][each]:g} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cnn-small,wrn-16-1", help="by comma")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="no peaks; writes nothing")
    parser.add_argument("--alone", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "lib"))
    import torch

    torch.set_num_threads(1)
    if options.alone:
        run = Place(options.network).gradient(options.alone, options.job)
        for _ in range(2):
            run()
        return
    before = os.getloadavg()[0]
    places = [race(name, options.rounds, options.quick) for name in options.network.split(",")]
    targets = {
        f"{place['network']}, {job}: jvp of unrolled": target(place["jobs"][job]["of_unrolled"]["jvp"], 0.6)
        for place in places
        for job in JOBS
    }
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(before),
        "versions": {"torch": metadata.version("torch")},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "targets": targets,
        "places": places,
    }
    show(result)
    for name, told in targets.items():
        print(f"\n{name}: {told}")
    if not options.quick:
        PATH.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
