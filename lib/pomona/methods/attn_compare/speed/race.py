"""One pass at one width of head: every implementation at every length, in turns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pomona.methods.attn_compare import kernels, linear
from pomona.methods.attn_compare.speed import costs, memory
from pomona.methods.attn_compare.speed import implementations as forms
from pomona.methods.attn_compare.speed import timing as stopwatch
from pomona.methods.attn_compare.speed.implementations import Implementation
from pomona.methods.attn_compare.speed.timing import Clock

PILOT = 256  # tokens of the pass that predicts how long the first length will take
TUNED = 2048  # tokens at which a chunk is chosen for all longer sequences
_CHUNKED = ("chunked", "batched")


def rows(settings: Mapping[str, Any], device: str, clock: Clock | None = None) -> list[dict[str, Any]]:
    """The rows of a point, by length and implementation; `settings` are those of `study.plan`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that errors are the same at any number of threads
    race = _Race(settings, device, clock or stopwatch.clock_for(device))
    try:
        race.qualify()
        torch.set_num_threads(settings["threads"])
        for length in settings["lengths"]:
            race.run(length)
        race.weigh()
    finally:
        torch.set_num_threads(threads)
    return race.rows


def prepared(settings: Mapping[str, Any]) -> tuple[Callable[[], object], int]:
    """A pass ready to be run, and the bytes of its inputs; `settings` are those of `_Race.pass_settings`."""
    implementation = Implementation(settings["form"], kernels.find(settings["kernel"]), settings["causal"])
    given = _inputs(settings, settings["length"], settings["device"])
    work = task(implementation, settings["pass"], given, settings["chunk"])
    return work, sum(x.nbytes for x in given)


def task(implementation: Implementation, way: str, given: list[Tensor], chunk: int) -> Callable[[], object]:
    """The pass over q, k, v, feature maps and all: forward, forward and backward, or one step of decoding."""
    q, k, v = given
    maps = implementation.maps(q.shape[-1], q.shape[-2], q)
    if way == "train":
        return _with_backward(lambda q, k, v: implementation.attend(q, k, v, maps, chunk), given, v)
    if way == "decode":
        with torch.no_grad():
            return _without_gradient(implementation.decoder(q, k, v, maps))
    return _without_gradient(lambda: implementation.attend(q, k, v, maps, chunk))


def mapping(implementation: Implementation, way: str, given: list[Tensor]) -> Callable[[], object] | None:
    """What the feature maps alone take of the pass; None of softmax."""
    q, k = given[0], given[1]
    maps = implementation.maps(q.shape[-1], q.shape[-2], q)
    if maps is None:
        return None
    pairs = tuple(zip(maps, (q, k), strict=True))
    if way == "train":
        each = [_with_backward(lambda x, of=of: of(x).values, [x], None) for of, x in pairs]
        return lambda: [work() for work in each]
    last = slice(-1, None) if way == "decode" else slice(None)
    start = q.shape[-2] - 1 if way == "decode" else 0
    return _without_gradient(lambda: [of(x[..., last, :], start=start) for of, x in pairs])


class _Race:
    """What is known while lengths grow."""

    def __init__(self, settings: Mapping[str, Any], device: str, clock: Clock) -> None:
        self.settings, self.device, self.clock = settings, device, clock
        self.way: str = settings["pass"]
        self.rows: list[dict[str, Any]] = []
        self.errors: dict[str, float] = {}
        self.out: dict[str, str] = {}  # implementation -> why it is not timed at any length
        self.known: dict[str, tuple[int, float]] = {}  # implementation -> FLOPs and seconds of the last pass timed
        self.chunks: dict[tuple[str, int], int] = {}
        self.contenders = [
            Implementation(form, kernels.find(kernel), not settings["full"])
            for form, kernel in settings["implementations"]
        ]

    def qualify(self) -> None:
        """Hold every implementation against float64."""
        seed = _seed(self.settings, forms.PROOF_LENGTH)
        for each in self.contenders:
            if reason := forms.unavailable(each, self.way, self.device):
                self.out[each.name] = reason
                continue
            need = forms.proof_bytes(each, self.way, self.settings["dim"])
            if need > self.settings["max_bytes"]:
                self.out[each.name] = (
                    f"its proof at n = {forms.PROOF_LENGTH} in float64 is predicted to need {need / 1e6:,.0f} MB, more "
                    f"than --max-mem of {self.settings['max_bytes'] / 1e6:,.0f} MB"
                )
                continue
            try:
                error = forms.proof(each, self.way, self.settings["dim"], seed=seed, device=self.device)
            except (RuntimeError, NotImplementedError) as failure:  # of a compiler, or of a back end
                self.out[each.name] = f"fails at n = {forms.PROOF_LENGTH}: {str(failure).splitlines()[0][:200]}"
                continue
            self.errors[each.name] = error
            if not error <= each.tolerance:
                self.out[each.name] = (
                    f"differs from the float64 reference by {error:.1e} at n = {forms.PROOF_LENGTH}, "
                    f"more than {each.tolerance:.0e}"
                )

    def run(self, length: int) -> None:
        """Time what is predicted to fit, and write a row for everything."""
        entered = {}
        reasons = {}
        for each in self.contenders:
            if reason := self.out.get(each.name) or self.refusal(each, length):
                reasons[each.name] = reason
            else:
                entered[each.name] = each
        timings, clock, alone = self.timed(entered.values(), length) if entered else ({}, "", {})
        for each in self.contenders:
            row = self.row(each, length)
            if each.name in reasons:
                failed = each.name in self.out and each.name in self.errors
                row |= {"status": "failed" if failed else "skipped", "reason": reasons[each.name]}
            else:
                row["timing"] = timings[each.name].as_row(clock)
                if each.form in _CHUNKED:
                    row["timing"]["chunk"] = self.chunk(each, length)
                if each.kernel.name in alone:
                    row["timing"]["map_ms"] = alone[each.kernel.name].as_row(clock)["ms"]
                seconds = row["timing"]["ms"] / 1000
                self.known[each.name] = (row["values"]["flops"], seconds)
            self.rows.append(row)

    def timed(
        self, entered: Iterable[Implementation], length: int
    ) -> tuple[dict[str, stopwatch.Timing], str, dict[str, stopwatch.Timing]]:
        """Timings of the implementations, the clock that counts, and timings of their maps alone."""
        given = _inputs(self.settings, length, self.device)
        work, maps = {}, {}
        for each in entered:
            work[each.name] = task(each, self.way, given, self.chunk(each, length))
            if alone := mapping(each, self.way, given):
                maps[f"map {each.kernel.name}"] = alone
        found, clock = stopwatch.fair({**work, **maps}, self.settings["repeats"], self.clock)
        return found, clock, {name.removeprefix("map "): found[name] for name in maps}

    def refusal(self, each: Implementation, length: int) -> str | None:
        """Why the length is too much for an implementation; None where it is not."""
        shape = self.shape(each, length)
        need = costs.nbytes(each.form, self.way, shape)
        if need > self.settings["max_bytes"]:
            most = self.settings["max_bytes"]
            return f"predicted to need {need / 1e6:,.0f} MB, more than --max-mem of {most / 1e6:,.0f} MB"
        if each.name not in self.known:
            pilot = min(length, PILOT)
            given = _inputs(self.settings, pilot, self.device)
            seconds = stopwatch.once(task(each, self.way, given, linear.CHUNK), self.clock)
            self.known[each.name] = (costs.flops(each.form, self.way, self.shape(each, pilot)), seconds)
        flops, seconds = self.known[each.name]
        if seconds * costs.flops(each.form, self.way, shape) / flops > self.settings["max_seconds"]:
            return f"predicted to take longer than --max-seconds {self.settings['max_seconds']:g}"
        return None

    def chunk(self, each: Implementation, length: int) -> int:
        """The fastest chunk for the length, found once."""
        if each.form not in _CHUNKED:
            return linear.CHUNK
        length = min(length, TUNED)
        key = (each.name, length)
        if key not in self.chunks:
            given = _inputs(self.settings, length, self.device)
            sizes = [size for size in forms.CHUNKS if size == min(forms.CHUNKS) or size < 2 * length]
            work = {str(size): task(each, self.way, given, size) for size in sizes}
            found = stopwatch.interleaved(work, 3, self.clock)
            self.chunks[key] = min(sizes, key=lambda size: min(found[str(size)].steady))
        return self.chunks[key]

    def row(self, each: Implementation, length: int) -> dict[str, Any]:
        """What is known of an implementation at a length without timing it."""
        settings = self.settings
        shape = self.shape(each, length)
        values: dict[str, Any] = {
            "flops": costs.flops(each.form, self.way, shape),
            "bytes": costs.nbytes(each.form, self.way, shape),
            "features": each.features(settings["dim"]) or None,
            "error": self.errors.get(each.name),
        }
        if self.way == "decode":
            values["remembered_bytes"] = settings["heads"] * (
                costs.decode_state(shape.features, shape.width)
                if each.form == "state"
                else costs.decode_cache(length, shape.width, shape.itemsize)
            )
        return {
            "study": "speed",
            "kernel": each.kernel.name,
            "point": {
                "pass": self.way,
                "dim": settings["dim"],
                "heads": settings["heads"],
                "length": length,
                "implementation": each.name,
                "causal": each.causal,
                "device": _device_name(self.device),
                "dtype": str(_number_format(settings["dtype"], self.device)).removeprefix("torch."),
                "threads": settings["threads"],
            },
            "status": "done",
            "values": values,
        }

    def shape(self, each: Implementation, length: int) -> costs.Shape:
        itemsize = _number_format(self.settings["dtype"], self.device).itemsize
        return forms.shape(each, length, self.settings["dim"], self.settings["heads"], itemsize)

    def weigh(self) -> None:
        """Add the peak of memory to every row that was timed."""
        done = [row for row in self.rows if row["status"] == "done"]
        passes = [self.pass_settings(row) for row in done]
        if self.device.startswith("cuda"):
            found: list[int | None] = []
            for each in passes:
                work, held = prepared(each)
                found.append(held + memory.on_device(work))
        else:
            found = memory.in_fresh_process(passes)
        for row, peak in zip(done, found, strict=True):
            row["timing"]["peak_bytes"] = peak

    def pass_settings(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What `prepared` needs to run the pass of a row again."""
        form = row["point"]["implementation"].split(" ")[0]
        return {
            **{name: self.settings[name] for name in ("pass", "dim", "heads", "dtype", "seed")},
            "form": form,
            "kernel": row["kernel"],
            "causal": not self.settings["full"],
            "length": row["point"]["length"],
            "chunk": row["timing"].get("chunk", linear.CHUNK),
            "device": self.device,
        }


def _with_backward(attend: Callable[..., Tensor], given: list[Tensor], gradient: Tensor | None) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_() for x in given]

    def run() -> object:
        found = attend(*leaves)
        into = found.detach() if gradient is None else gradient
        return torch.autograd.grad(found, leaves, into, allow_unused=True) if found.requires_grad else None

    return run


def _without_gradient(work: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return work()

    return run


def _inputs(settings: Mapping[str, Any], length: int, device: str) -> list[Tensor]:
    dtype = _number_format(settings["dtype"], device)
    seed = _seed(settings, length)
    return forms.inputs(length, settings["dim"], settings["heads"], seed=seed, dtype=dtype, device=device)


def _seed(settings: Mapping[str, Any], length: int) -> int:
    content = f"speed {settings['seed']} {settings['pass']} {settings['dim']} {settings['heads']} {length}"
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:7], "big")


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def _number_format(name: str, device: str) -> torch.dtype:
    """The format that is timed: float32 on a processor and bfloat16 on a GPU unless --dtype says otherwise."""
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    found: torch.dtype = getattr(torch, name)
    return found
