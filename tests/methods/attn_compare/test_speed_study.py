"""The speed study from its options to its report: proofs, skips, rows, verdicts, and the curves that it must find."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pomona.errors import UnavailableError, UsageError
from pomona.methods.attn_compare import kernels
from pomona.methods.attn_compare.config import Config
from pomona.methods.attn_compare.rows import Point, Workshop
from pomona.methods.attn_compare.speed import findings, implementations, memory, options, race, study
from pomona.methods.attn_compare.speed import timing as stopwatch
from pomona.methods.attn_compare.speed.implementations import Implementation
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings

SHOP = Workshop(Path("unused"), "cpu")


@pytest.fixture
def unweighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second process that measures memory."""
    monkeypatch.setattr(memory, "in_fresh_process", lambda passes: [None] * len(passes))


def measured(**chosen: Any) -> list[dict[str, Any]]:
    points = study.plan(Config(**chosen), Settings())
    return [row for point in points for row in study.measure(point, SHOP)]


def by_length(rows: Sequence[Mapping[str, Any]], name: str) -> dict[int, Mapping[str, Any]]:
    return {row["point"]["length"]: row for row in rows if row["point"]["implementation"] == name}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128:1024:x2", [128, 256, 512, 1024]),
        ("128:1000:x2", [128, 256, 512]),
        ("64:256:64", [64, 128, 192, 256]),
        ("300, 7,300", [7, 300]),
        ("5", [5]),
        ("5:5:x2", [5]),
    ],
)
def test_lengths_are_a_factor_a_step_or_a_list(text: str, expected: list[int]) -> None:
    assert options.lengths(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("4GB", 4 * 10**9), ("200MB", 2 * 10**8), ("1.5GiB", 3 << 29), ("512", 512), ("8k", 8000)]
)
def test_sizes_are_decimal_unless_they_say_otherwise(text: str, expected: int) -> None:
    assert options.memory(text) == expected


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ({"lengths": "128:64:x2"}, "--lengths 128:64:x2"),
        ({"lengths": "1:8:x1"}, "--lengths 1:8:x1"),
        ({"lengths": "0"}, "--lengths 0"),
        ({"lengths": ""}, "--lengths"),
        ({"dim": "64,x"}, "--dim 64,x"),
        ({"passes": "forward"}, "expected fwd, train, decode"),
        ({"impls": "sdpa,fla"}, "there is no fla"),
        ({"impls": ","}, "--impls is empty"),
        ({"max_mem": "lots"}, "--max-mem lots"),
        ({"max_mem": "0GB"}, "--max-mem 0GB"),
        ({"max_seconds": 0.0}, "--max-seconds"),
        ({"max_seconds": math.nan}, "--max-seconds"),
        ({"repeats": 1}, "--repeats is 1"),
        ({"threads": 0}, "--threads is 0"),
        ({"heads": 0}, "--heads is 0"),
        ({"heads": 10**20}, "--heads is 1"),
        ({"threads": 100_000}, "--threads is 100000"),
        ({"repeats": 10**20}, "--repeats is 1"),
        ({"lengths": "9" * 5000}, "--lengths 9"),
        ({"lengths": "٣:٨:x٢"}, "--lengths ٣"),
        ({"dim": "9" * 5000}, "--dim 9"),
        ({"dim": "٣"}, "--dim ٣"),
        ({"max_mem": "9" * 400}, "--max-mem 9"),
        ({"max_mem": "99999999TB"}, "--max-mem 9"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(chosen: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Config(**chosen)


def test_the_plan_needs_no_torch() -> None:
    code = "import sys; import pomona.methods.attn_compare.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_point_is_a_pass_at_a_width() -> None:
    points = study.plan(Config(dim="8,64", passes="fwd,decode", kernels="exp,elu1,pow:8"), Settings(seed=3))
    assert [point.name for point in points] == [
        "speed fwd d=8",
        "speed fwd d=64",
        "speed decode d=8",
        "speed decode d=64",
    ]
    assert points[0].settings["implementations"] == [
        ["sdpa", "exp"],
        ["eager", "exp"],
        ["chunked", "elu1"],
        ["chunked", "pow:8"],
        ["batched", "elu1"],
        ["quadratic", "elu1"],
        ["prefix-sum", "elu1"],
    ]
    assert points[2].settings["implementations"] == [
        ["sdpa", "exp"],
        ["eager", "exp"],
        ["state", "elu1"],
        ["state", "pow:8"],
    ]
    assert json.loads(json.dumps(points[0].settings)) == points[0].settings
    (small,) = study.plan(Config(dim="16", passes="decode"), Settings())
    assert small.settings["implementations"][-1] == ["state", "taylor2"]  # which is affordable only there


def test_the_shared_shape_of_xformers_is_one_length_forward() -> None:
    (point,) = study.plan(Config(xf_8192=True, passes="train", dim="16"), Settings())
    assert (point.settings["pass"], point.settings["dim"], point.settings["heads"]) == ("fwd", 128, 8)
    assert point.settings["lengths"] == [8192]


@pytest.mark.parametrize("way", options.PASSES)
@pytest.mark.parametrize("kernel", [k for k in kernels.registered() if k.map is not None], ids=lambda k: k.name)
def test_every_implementation_of_every_kernel_is_the_quadratic_form(way: str, kernel: Any) -> None:
    found = implementations.chosen([n for n in options.IMPLEMENTATIONS if n != "flex"], [kernel], way, causal=True)
    assert len(found) == {"decode": 3}.get(way, 3 if kernel.subtractive else 6)
    for each in found:
        assert implementations.proof(each, way, 8, seed=1, device="cpu") <= each.tolerance, each.name


@pytest.mark.parametrize("way", ("fwd", "train"))
def test_without_a_mask_too(way: str) -> None:
    chosen = [kernels.find(name) for name in ("elu1", "inline", "favor:32")]
    found = implementations.chosen(options.BY_DEFAULT, chosen, way, causal=False)
    assert [each.name for each in found] == [
        "sdpa",
        "eager",
        "full elu1",
        "full inline",
        "full favor:32",
        "quadratic elu1",
        "quadratic favor:32",
    ]
    for each in found:
        assert implementations.proof(each, way, 8, seed=1, device="cpu") <= each.tolerance, each.name


def test_a_prefill_in_several_blocks_is_decoded_from_as_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "PREFILL", 50)
    for name in ("elu1", "favor:32", "inline", "cosformer"):
        each = Implementation("state", kernels.find(name))
        assert implementations.proof(each, "decode", 8, seed=1, device="cpu") <= each.tolerance


def test_a_wrong_implementation_is_marked_and_not_timed(monkeypatch: pytest.MonkeyPatch, unweighed: None) -> None:
    def wrong(queries: Any, keys: Any, v: Tensor, chunk: int, causal: bool) -> Tensor:
        return implementations._chunked(queries, keys, v, chunk, causal) * (1 + 1e-9)

    monkeypatch.setitem(implementations.LINEAR, "chunked", wrong)
    rows = measured(lengths="32", dim="8", heads=2, passes="fwd", impls="sdpa,chunked", kernels="elu1")
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert "differs from the float64 reference" in rows[1]["reason"] and "timing" not in rows[1]
    assert rows[1]["values"]["error"] > 1e-10
    assert study.section(rows).verdict == [
        "Nothing was timed of both softmax and a linear form, so there is no crossover to tell."
    ]


def test_rows_hold_what_is_the_same_in_every_run_apart_from_what_is_not(unweighed: None) -> None:
    chosen: dict[str, Any] = {"lengths": "32,100", "dim": "8", "heads": 2, "kernels": "elu1,favor:16", "repeats": 2}
    first, second = measured(**chosen), measured(**chosen)
    assert len(first) == 2 * (2 * 10 + 4)
    for row in first:
        assert row["status"] == "done" and row["study"] == "speed" and row["values"]["error"] <= 1e-10
        timing = row["timing"]
        assert timing["ms"] > 0 and timing["threads"] == 1 and timing["clock"] in ("wall", "cpu")
        assert len(timing["ms_all"]) == 2
        assert ("chunk" in timing) == (row["point"]["implementation"].split()[0] in ("chunked", "batched"))
        assert ("map_ms" in timing) == (row["kernel"] != "exp")
    without = [[{k: v for k, v in row.items() if k != "timing"} for row in rows] for rows in (first, second)]
    assert json.dumps(without[0], allow_nan=False) == json.dumps(without[1], allow_nan=False)


def test_threads_are_put_back_and_errors_do_not_depend_on_them(unweighed: None) -> None:
    before = torch.get_num_threads()
    chosen: dict[str, Any] = {"lengths": "64", "dim": "8", "heads": 2, "passes": "fwd", "impls": "sdpa,chunked"}
    one, two = measured(**chosen, threads=1), measured(**chosen, threads=2)
    assert torch.get_num_threads() == before
    assert [row["values"]["error"] for row in one] == [row["values"]["error"] for row in two]


def test_what_would_take_too_long_is_skipped_before_it_is_tried(unweighed: None) -> None:
    rows = measured(
        lengths="64,128,4096", dim="8", heads=2, passes="fwd", impls="sdpa,quadratic", max_seconds=0.03, kernels="elu1"
    )
    assert by_length(rows, "quadratic elu1")[64]["status"] == "done"
    last = by_length(rows, "quadratic elu1")[4096]
    assert last["status"] == "skipped" and last["reason"] == "predicted to take longer than --max-seconds 0.03"


def test_the_first_length_is_predicted_from_a_shorter_pass(monkeypatch: pytest.MonkeyPatch, unweighed: None) -> None:
    longest = 0

    def watch(*arguments: Any, **named: Any) -> Any:
        nonlocal longest
        longest = max(longest, arguments[0])
        return original(*arguments, **named)

    original = implementations.inputs
    monkeypatch.setattr(implementations, "inputs", watch)
    monkeypatch.setattr(stopwatch, "once", lambda work, clock: 1.0)
    (row,) = measured(lengths="100000", dim="8", heads=1, passes="fwd", impls="sdpa", max_seconds=5.0)
    assert row["status"] == "skipped" and longest == implementations.PROOF_LENGTH


def test_a_prefix_sum_that_would_not_fit_is_skipped_and_memory_stays_within_the_limit() -> None:
    code = """
import json, resource, sys
from pathlib import Path
from pomona.methods.attn_compare.config import Config
from pomona.methods.attn_compare.rows import Workshop
from pomona.methods.attn_compare.speed import study
from pomona.runtime.settings import Settings
config = Config(lengths="8192", passes="fwd", impls="prefix-sum,chunked", max_mem="200MB", kernels="elu1", repeats=2)
shop = Workshop(Path("unused"), "cpu")
(tiny,) = study.plan(Config(lengths="64", passes="fwd", impls="prefix-sum,chunked", kernels="elu1"), Settings())
study.measure(tiny, shop)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(point,) = study.plan(config, Settings())
rows = study.measure(point, shop)
print(json.dumps([rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base]))
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    rows, rise = json.loads(said)
    chunked, prefix = by_length(rows, "chunked elu1")[8192], by_length(rows, "prefix-sum elu1")[8192]
    assert chunked["status"] == "done"
    assert prefix["status"] == "skipped"
    assert prefix["reason"] == "predicted to need 2,282 MB, more than --max-mem of 200 MB"
    assert 1024 * rise <= 200e6
    peak = chunked["timing"]["peak_bytes"]
    assert peak is None or peak == pytest.approx(chunked["values"]["bytes"], rel=1 / 3)


CONDITIONS = {"heads": 8, "causal": True, "device": "cpu", "dtype": "float32", "threads": 1}


def row_of(name: str, length: int, seconds: float, way: str = "fwd", **other: Any) -> dict[str, Any]:
    form, _, kernel = name.partition(" ")
    timing = stopwatch.Timing([seconds, seconds, seconds], [seconds] * 3, 0.1, False, 1).as_row("wall")
    remembered = {"remembered_bytes": 1000 * (length if form == "sdpa" else 7)} if way == "decode" else {}
    values = {"flops": 10, "bytes": 20, "features": 64 if kernel else None, "error": 1e-16, **remembered}
    return {
        "study": "speed",
        "kernel": kernel or "exp",
        "point": {"pass": way, "dim": 64, "length": length, "implementation": name, **CONDITIONS},
        "status": "done",
        "values": values,
        "timing": timing,
        **other,
    }


def test_timings_under_other_conditions_are_never_compared() -> None:
    rows = [row_of("sdpa", n, 3e-6 * n**2) for n in (128, 1024)] + [
        row_of("chunked elu1", n, 1e-3 * n) for n in (128, 1024)
    ]
    fast = [
        {**row, "point": {**row["point"], "device": "a GPU"}, "timing": {**row["timing"], "ms_all": [1.0, 1.0]}}
        for row in rows[:2]
    ]
    (found,) = findings.overtakings(rows + fast)
    assert found.name == "forward, head width 64, cpu" and found.crossover == findings.overtakings(rows)[0].crossover
    assert study.summary(rows + fast)["crossover"].keys() == {"fwd d=64, cpu"}
    assert [table.caption for table in study.section(rows + fast).tables] == [
        "Speed, forward, head width 64, cpu",
        "Speed, forward, head width 64, a GPU",
    ]


def test_the_verdict_tells_where_and_by_how_much() -> None:
    lengths = (128, 256, 512, 1024)
    rows = [row_of("sdpa", n, 3e-6 * n**2) for n in lengths]
    rows += [row_of("chunked elu1", n, 1e-3 * n) for n in lengths]
    rows += [row_of("sdpa", n, 1e-6 * n, "decode") for n in lengths]
    rows += [row_of("state elu1", n, 1e-2, "decode") for n in lengths]
    section = study.section(rows)
    assert section.verdict == [
        "Forward, head width 64: chunked elu1 overtakes SDPA at about n = 333 (interval 333 to 333), and is 3.1 times "
        "as fast as SDPA at n = 1,024.",
        "One step of decoding, head width 64: state elu1 does not overtake SDPA up to n = 1,024, where it takes 9.8 "
        "times as long.",
        "Decoding with elu1 remembers 0.01 MB at any length; keys and values take 1.02 MB at n = 1,024.",
    ]
    assert study.summary(rows) == {
        "crossover": {
            "fwd d=64": {"elu1": {"at": 333, "where": "within", "low": 333, "high": 333}},
            "decode d=64": {"elu1": {"at": None, "where": "beyond", "low": None, "high": None}},
        },
        "at_longest": {
            "fwd d=64": {"elu1": {"length": 1024, "times_as_fast": 3.07}},
            "decode d=64": {"elu1": {"length": 1024, "times_as_fast": 0.1}},
        },
        "points": {"done": 16, "skipped": 0, "failed": 0},
        "noisy": 0,
    }
    assert any("n = 259" in note and "n = 33." in note for note in section.notes)
    assert any("sdpa 2.00, chunked elu1 1.00" in note for note in section.notes)
    assert [len(table.rows) for table in section.tables] == [8, 8]


def test_the_report_marks_what_was_disturbed_and_what_was_left_out() -> None:
    shaken = row_of("sdpa", 128, 1.0)
    shaken["timing"] = stopwatch.Timing([1.0, 2.0], [0.5, 0.5], 0.1, False, 1).as_row("cpu")
    left = {**row_of("eager", 128, 1.0), "status": "skipped", "reason": "predicted to need 9 MB"}
    del left["timing"]
    section = study.section([shaken, left])
    remarks = [row[-1] for row in section.tables[0].rows]
    assert remarks == ["noisy", "skipped: predicted to need 9 MB"]
    assert any(note.startswith("1 of 1 timings are noisy") for note in section.notes)
    assert findings.summary([shaken, left])["points"] == {"done": 1, "skipped": 1, "failed": 0}


def test_a_proof_that_would_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch, unweighed: None) -> None:
    tried: list[str] = []
    monkeypatch.setattr(implementations, "proof", lambda each, *_, **__: tried.append(each.name) or 0.0)
    rows = measured(lengths="4", dim="256", passes="train", impls="sdpa,prefix-sum", kernels="elu1", max_mem="1GB")
    # In float64, 2 heads: 257 x 256 x 257 numbers four times, besides some of 257 x 256 each.
    assert tried == ["sdpa"] and [row["status"] for row in rows] == ["done", "skipped"]
    assert 8 * 2 * 4 * 257 * 256 * 257 > 10**9 and "its proof at n = 257" in rows[1]["reason"]


def test_half_precision_is_timed_when_asked_for(unweighed: None) -> None:
    config = Config(lengths="64", dim="8", heads=2, passes="fwd,decode", impls="sdpa,chunked", kernels="elu1")
    for point in study.plan(config, Settings(dtype="bfloat16")):
        rows = study.measure(point, SHOP)
        assert {row["status"] for row in rows} == {"done"}
        full = [race._Race(dict(point.settings) | {"dtype": "auto"}, "cpu", stopwatch.ProcessorClock())]
        for row, each in zip(rows, full[0].contenders, strict=True):
            if each.form == "sdpa":  # bfloat16 halves what is remembered, though not the sums of a state
                assert row["values"]["bytes"] * 2 == full[0].row(each, 64)["values"]["bytes"]


def test_a_device_without_a_clock_here_is_refused() -> None:
    with pytest.raises(UnavailableError, match="mps"):
        study.prepare(Config(), Settings(), dataclasses.replace(SHOP, device="mps"), Quiet())
    study.prepare(Config(), Settings(), SHOP, Quiet())
    assert study.sources(Config(), Settings()) == {}


def test_flex_attention_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch, unweighed: None) -> None:
    (row,) = measured(lengths="64", dim="8", heads=2, passes="train", impls="flex")
    assert (row["status"], row["reason"]) == ("skipped", "flex attention has no backward on a processor")
    monkeypatch.setattr("shutil.which", lambda name: None)
    (row,) = measured(lengths="64", dim="8", heads=2, passes="fwd", impls="flex")
    assert (row["status"], row["reason"]) == ("skipped", "flex attention on a processor needs a C++ compiler")


def test_a_kernel_without_a_map_is_told_of(unweighed: None) -> None:
    (softmax, degree8) = measured(lengths="64", dim="8", heads=2, passes="fwd", impls="sdpa,chunked", kernels="pow:8")
    assert (softmax["status"], degree8["status"], degree8["kernel"]) == ("done", "skipped", "pow:8")
    assert "has no feature map" in degree8["reason"]


@pytest.mark.slow
def test_time_grows_and_crosses_as_it_should() -> None:
    began = time.process_time()
    config = Config(lengths="128:8192:x2", passes="fwd", impls="sdpa,chunked", kernels="elu1", threads=1, repeats=5)
    (point,) = study.plan(config, Settings())
    rows = study.measure(Point("speed", point.name, point.settings), SHOP)
    assert time.process_time() - began < 60
    assert {row["status"] for row in rows} == {"done"}
    least = {
        name: {n: row["timing"]["cpu_ms_min"] for n, row in by_length(rows, name).items()}
        for name in ("sdpa", "chunked elu1")
    }
    slopes = {name: np.polyfit(np.log(list(t)), np.log(list(t.values())), 1)[0] for name, t in least.items()}
    assert 1.7 <= slopes["sdpa"] <= 2.2
    assert 0.9 <= slopes["chunked elu1"] <= 1.4
    assert least["sdpa"][8192] >= 4 * least["chunked elu1"][8192]
    (found,) = findings.overtakings(rows)
    assert found.crossover.at is not None and 64 <= found.crossover.at <= 1024
