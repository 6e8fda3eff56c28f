"""Figures to tables, plots and one JSON file; the prose around the tables is left alone."""

from __future__ import annotations

import json
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil

from tests.benchmarks.fleet import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tests.benchmarks.peers import Difference, Measured
    from tests.benchmarks.quality import Quality
    from tests.benchmarks.workload import Workload

LABELS = {
    "Holdfast": "Holdfast",
    "HoldfastInt8": 'Holdfast, `precision="int8"`',
    "HoldfastInt8Static": 'Holdfast, `precision="int8"`, `shapes="static"`',
    "HoldfastInt8Weights": 'Holdfast, `precision="int8-weights"`',
    "GenAI": "openvino-genai, shared models",
    "Optimum": "optimum-intel, two pipelines",
    "Reload": "optimum-intel, unload + reload",
    "Diffusers": "diffusers, PyTorch float32",
    "Floor": "the bare inferences (floor)",
}
LIBRARIES = (
    "openvino", "openvino-genai", "optimum-intel", "diffusers", "transformers", "torch", "nncf",
)  # fmt: skip
GIB = 2**30
GOALS = (
    ("warm hires against openvino-genai, CPU", ("peers", "Holdfast", "GenAI", "warm_cpu"), 1.0),
    ("... wall", ("peers", "Holdfast", "GenAI", "warm"), 1.0),
    ("... against the floor, CPU", ("peers", "Holdfast", "Floor", "warm_cpu"), 1.03),
    ("... `int8` against openvino-genai, CPU", ("int8", "HoldfastInt8", "GenAI", "warm_cpu"), 0.65),
    (
        "... `int8` with static shapes, CPU",
        ("int8", "HoldfastInt8Static", "GenAI", "warm_cpu"),
        0.65,
    ),
    ("start to first image against openvino-genai, CPU",
     ("peers", "Holdfast", "GenAI", "start_cpu"), 1.1),
    ("... wall", ("peers", "Holdfast", "GenAI", "start"), 1.1),
    ("peak resident memory against openvino-genai", ("peers", "Holdfast", "GenAI", "peak"), 0.7),
    ("switch between the modes, all held, ms", ("costs", "dynamic", "switches", "milliseconds"), 5),
    ("lifecycle, plan and log of one request, CPU ms",
     ("costs", "silent", "bookkeeping", "milliseconds"), 2),
    ("`import holdfast.engine`, CPU s", ("costs", "import_seconds"), 0.3),
    ("compiled by a second hires, `dynamic`", ("costs", "dynamic", "second", "compiled"), 0),
    ("... `static`", ("costs", "static", "second", "compiled"), 0),
    ("four single runs against a batch of 4, CPU", ("costs", "dynamic", "batch", "throughput"), 1),
)  # fmt: skip


@dataclass
class Places:
    """Where the page is, its raw figures and its plot."""

    folder: Path = ROOT / "docs"

    @property
    def page(self) -> Path:
        """The page with the tables."""
        return self.folder / "performance.md"

    @property
    def raw(self) -> Path:
        """All figures."""
        return self.folder / "performance.json"

    @property
    def plot(self) -> Path:
        """Two bars for each system."""
        return self.folder / "performance.svg"

    def move(self, folder: Path) -> None:
        """Write to a copy of the page in another folder."""
        shutil.copy(self.page, folder)
        self.folder = folder


PLACES = Places()


def machine() -> dict[str, Any]:
    """Describe the machine without naming it."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "logical_cpus": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def write_raw(name: str, figures: Mapping[str, Any]) -> None:
    """Put one measurement's figures beside the others in the JSON file."""
    known = json.loads(PLACES.raw.read_text()) if PLACES.raw.exists() else {}
    known[name] = figures
    PLACES.raw.write_text(json.dumps(known, indent=1, sort_keys=True, default=str) + "\n")


def write_table(name: str, rows: Sequence[Sequence[str]]) -> None:
    """Replace what stands between the page's markers of this name; the first row is the head."""
    head, *body = rows
    lines = [_row(head), _row(["---"] * len(head)), *map(_row, body)]
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    text, found = pattern.subn(
        lambda _: "\n".join([begin, *lines, end]), PLACES.page.read_text(encoding="utf-8")
    )
    if found != 1:
        msg = f"{PLACES.page} has {found} places for the table {name!r}; it needs one"
        raise ValueError(msg)
    PLACES.page.write_text(text, encoding="utf-8")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def report_peers(name: str, workload: Workload, measured: Mapping[str, Measured]) -> None:
    """Write one table of systems, their medians and ratios to openvino-genai."""
    job = {
        field: getattr(workload, field)
        for field in ("side", "hires_side", "steps", "hires_steps", "strength", "guidance")
    }
    systems = {system: asdict(each) for system, each in measured.items()}
    write_raw(name, {"machine": machine(), "workload": job, "systems": systems})
    head = [
        "way", "first image, s", "CPU s", "warm hires, s", "CPU s", "peak, GiB",
        "warm CPU against genai", "against the floor", "peak against genai",
    ]  # fmt: skip
    rows = [head]
    for system, each in measured.items():
        ratios = [
            f"{each.median(field) / measured[peer].median(field):.2f}" if peer in measured else ""
            for field, peer in (("warm_cpu", "GenAI"), ("warm_cpu", "Floor"), ("peak", "GenAI"))
        ]
        rows.append(
            [
                LABELS[system],
                f"{each.median('start'):.1f}",
                f"{each.median('start_cpu'):.1f}",
                f"{each.median('warm'):.1f}",
                f"{each.median('warm_cpu'):.1f}",
                f"{each.median('peak') / GIB:.2f}",
                *ratios,
            ]
        )
    write_table(name, rows)


def report_images(differences: Mapping[str, Mapping[str, Difference]]) -> None:
    """Write how far the pictures are from Holdfast's, and from those of PyTorch in float32."""
    write_raw(
        "images",
        {
            to: {name: asdict(each) for name, each in rows.items()}
            for to, rows in differences.items()
        },
    )
    head = ["way"]
    for to in ("Holdfast", "PyTorch float32"):
        head += [f"from {to}: mean, 1/255", "largest, 1/255", "PSNR, dB"]
    rows = [head]
    for system in differences["Holdfast"]:
        pair = [differences[to][system] for to in ("Holdfast", "Diffusers")]
        figures = [[f"{e.mean:.2f}", f"{e.largest:.0f}", f"{e.psnr:.1f}"] for e in pair]
        rows.append([LABELS[system], *figures[0], *figures[1]])
    write_table("images", rows)


def report_quality(qualities: Mapping[str, Quality]) -> None:
    """Write what each precision's pictures are like."""
    write_raw("quality", {precision: asdict(each) for precision, each in qualities.items()})
    write_table(
        "quality",
        [
            ["precision", "pictures as asked", "PSNR to f32, dB", "distance in features"],
            *(
                [f"`{name}`", f"{each.right:.0%}", f"{each.psnr:.1f}", f"{each.features:.4f}"]
                for name, each in qualities.items()
            ),
        ],
    )


def report_costs(rows: Sequence[Sequence[str]], raw: Mapping[str, Any]) -> None:
    """Write what Holdfast's own work costs."""
    write_raw("costs", raw)
    write_table("costs", [["what", "measured", "goal"], *rows])


def report_changes(changes: Mapping[str, Mapping[str, float]]) -> None:
    """Write what each kind of change compiles and takes."""
    write_raw("changes", changes)
    rows = [["change", "compiled", "s", "CPU s", "bare compile, s", "CPU s", "reload, s", "CPU s"]]
    for change, each in changes.items():
        compiled = [name.partition(":")[2] for name in each if name.startswith("compiled:")]
        fields = ("seconds", "cpu", "bare", "bare_cpu", "reload", "reload_cpu")
        figures = [f"{each[field]:.3f}" if field in each else "" for field in fields]
        nothing = "nothing" if "bare" in each else "everything"
        rows.append([change, ", ".join(compiled) or nothing, *figures])
    write_table("changes", rows)


def report_tiles(taken: Mapping[str, float]) -> None:
    """Write what a large image takes in tiles."""
    write_raw("tiles", taken)
    side = int(taken["side"])
    write_table(
        "tiles",
        [
            ["hires", "memory budget", "peak resident", "first decode", "encode", "decode"],
            [
                f"{side // 2}x{side // 2} to {side}x{side}",
                *(f"{taken[name] / GIB:.1f} GiB" for name in ("budget", "peak")),
                *(f"{taken[name]:.0f} s" for name in ("first_decode", "encode", "decode")),
            ],
        ],
    )


def report_sizes(models: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
    """Write what many sizes leave in memory, and what they take, by what each graph keeps."""
    write_raw("sizes", {"machine": machine(), "models": models})
    rows = [
        ["model", "sizes", "kept of each kind", "resident before, MB", "after, MB",
         "CPU s of all sizes", "CPU s of an image, two sizes in turn"]
    ]  # fmt: skip
    for model, capacities in models.items():
        for capacity, each in capacities.items():
            resident = [f"{each[when] / 1e6:.0f}" for when in ("before", "after")]
            seconds = [f"{each['cpu']:.1f}", f"{each['turns']:.3f}"]
            rows.append([model, f"{each['sizes']:.0f}", f"{capacity}", *resident, *seconds])
    write_table("sizes", rows)


def report_goals() -> None:
    """Write what is aimed at beside what was measured, as far as it was."""
    raw = json.loads(PLACES.raw.read_text())
    rows = [["measure", "measured", "goal"]]
    for name, place, goal in GOALS:
        value = _ratio(raw, *place) if place[0] in ("peers", "int8") else _found(raw, place)
        if value is not None:
            bound = "at least" if place[-1] == "throughput" else "at most"
            rows.append([name, f"{value:.2f}", f"{bound} {goal:g}"])
    write_table("goals", rows)


def _ratio(raw: Any, table: str, system: str, peer: str, field: str) -> float | None:
    one, other = (_found(raw, (table, "systems", name, field)) for name in (system, peer))
    return None if one is None or other is None else median(one) / median(other)


def _found(raw: Any, place: Sequence[str]) -> Any:
    for name in place:
        raw = None if raw is None else raw.get(name)
    return raw


def plot(measured: Mapping[str, Measured]) -> None:
    """Draw warm CPU seconds and peak memory of each system side by side."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    shown = [system for system in measured if system != "Floor"]
    labels = [LABELS[system].replace("`", "") for system in shown]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.5 * len(shown) + 1.2), sharey=True)
    left.barh(labels, [measured[system].median("warm_cpu") for system in shown], color="#4c72b0")
    if "Floor" in measured:
        left.axvline(measured["Floor"].median("warm_cpu"), color="black", linestyle=":")
    left.set_xlabel("warm hires, CPU seconds (dotted: the bare inferences)")
    right.barh(labels, [measured[system].median("peak") / GIB for system in shown], color="#dd8452")
    right.set_xlabel("peak resident memory, GiB")
    left.invert_yaxis()
    figure.tight_layout()
    figure.savefig(PLACES.plot, metadata={"Date": None, "Creator": None})
