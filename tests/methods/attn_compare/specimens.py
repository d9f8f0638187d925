"""Sections and rows as the studies write them, with made-up but likely figures."""

from __future__ import annotations

from typing import Any

from pomona.report.sections import Section, Table


def sections() -> list[Section]:
    return [
        Section(
            "separation",
            "Which kernels tell the two data sets of the construction apart?",
            ["exp, pow:8 and pow:16 do.", "linear and the eleven others do not: below 0.1 % of 1,000 draws."],
            notes=[
                "The constants are recalled, not read in the paper (n = 1,000, d = 102).",
                "Intervals are Wilson's.",
            ],
            tables=[
                Table(
                    "Success: F > 0 on D1 and F = 0 on D0; 95 % interval.",
                    ["kernel", "success", "95 %", "AUC"],
                    [
                        ["exp", "0.998", "0.993 to 0.999", "0.998"],
                        ["linear", "0.000", "0.000 to 0.004", "0.530"],
                        ["polysketch:4", "0.000", "0.000 to 0.004", "–"],
                    ],
                ),
                Table("Where each begins to separate.", ["kernel", "a1"], [["exp", "0.507"], ["linear", "10.1"]]),
            ],
            figures=[("separation-sweeps", "Success against each constant.")],
        ),
        Section("speed", "From which length does linear attention pay?", ["From 210 tokens forward."]),
    ]


def row(kernel: str = "exp", study: str = "separation", **changed: Any) -> dict[str, Any]:
    return {
        "study": study,
        "kernel": kernel,
        "point": {"n": 1000, "a1": 0.5},
        "status": "done",
        "values": {"success": 0.317, "auc": 0.9},
        "intervals": {"success": [0.289, 0.347]},
        "theory": {"success": 0.3},
        "timing": {"seconds": 0.01},
        **changed,
    }
