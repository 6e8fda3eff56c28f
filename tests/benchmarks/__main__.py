"""``python -m tests.benchmarks``: measure; write docs/performance.md, a plot and raw figures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import platformdirs

from holdfast.engine.compiling.devices import KEPT_PRIMITIVES
from tests.benchmarks import report
from tests.benchmarks.costs import import_seconds
from tests.benchmarks.fleet import Worker
from tests.benchmarks.model import make_model
from tests.benchmarks.peers import FAR, INT8_GROUP, NEAR, compare, draw_alike, measure_peers
from tests.benchmarks.quality import measure_quality
from tests.benchmarks.sizes import DEFAULT, DEMO, SD15, measure_sizes
from tests.benchmarks.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Mapping

PARTS = ("peers", "int8", "images", "quality", "costs", "changes", "tiles", "sizes", "large")


def main() -> None:
    """Measure one part after the other; each is written when it is done."""
    arguments = _arguments()
    folder = arguments.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    places = make_model(folder, tiny=arguments.tiny)
    if arguments.tiny:
        workload = Workload(**places, side=64, hires_side=96, steps=4, hires_steps=4)
        report.PLACES.move(folder)
    elif arguments.quick:
        workload = Workload(**places, steps=4, hires_steps=4)
    else:
        workload = Workload(**places)
    rounds, warm = (2, 3) if arguments.full else (1, 2)
    parts = arguments.only or PARTS[: None if arguments.full else -1]
    if "peers" in parts:
        measured = measure_peers(workload, NEAR, folder, rounds=rounds, warm=warm)
        for group in ((), *FAR):
            measured |= measure_peers(workload, [group], folder, rounds=1, warm=1)
            report.report_peers("peers", workload, measured)
            report.plot(measured)
    if "int8" in parts:
        measured = measure_peers(workload, [INT8_GROUP], folder, rounds=rounds, warm=warm)
        report.report_peers("int8", workload, measured)
    if "images" in parts:
        alike = draw_alike(workload, folder, int8="int8" in parts)
        report.report_images({to: compare(alike, to) for to in ("Holdfast", "Diffusers")})
    single = {"quality": _quality, "costs": _costs, "changes": _changes, "tiles": _tiles,
              "sizes": _sizes, "large": _large}  # fmt: skip
    for part in (name for name in single if name in parts):
        single[part](workload, folder)
    report.report_goals()


def _quality(workload: Workload, _: Path) -> None:
    report.report_quality(measure_quality(Path(workload.cache)))


def _costs(workload: Workload, folder: Path) -> None:
    dynamic = _ask("costs:Costs", workload, folder, "second", "switches", "bookkeeping", "batch")
    static = _ask("costs:StaticCosts", workload, folder, "second")
    silent = _ask("costs:Silent", workload, folder, "bookkeeping")
    imports = import_seconds()
    batch, switches = dynamic["batch"], dynamic["switches"]
    report.report_costs(
        [
            ["switch txt2img <-> img2img, all held", f"{switches['milliseconds']:.2f} ms", "5 ms"],
            ["... components compiled", f"{switches['compiled']:.0f}", "0"],
            [
                "lifecycle, plan and log of one request of 30 steps, CPU",
                f"{silent['bookkeeping']['milliseconds']:.2f} ms",
                "2 ms",
            ],
            ["... written to a file", f"{dynamic['bookkeeping']['milliseconds']:.2f} ms", ""],
            ["`import holdfast.engine.engine`, CPU", f"{imports:.2f} s", "0.3 s"],
            [
                "second hires of the same sizes: compiled, `dynamic`",
                f"{dynamic['second']['compiled']:.0f}",
                "0",
            ],
            ["... `static`", f"{static['second']['compiled']:.0f}", "0"],
            [
                "throughput of a batch of 4 against 4 single runs",
                f"{batch['throughput']:.2f}",
                "1.0",
            ],
        ],
        {"dynamic": dynamic, "silent": silent, "static": static, "import_seconds": imports},
    )


def _changes(workload: Workload, folder: Path) -> None:
    names = {
        "lora_on": "a LoRA on all attention of the UNet",
        "lora_weight": "its weight",
        "lora_back": "the LoRA toggled back",
        "precision": "precision: `f32`",
        "device": "the VAE decoder's device",
        "scheduler": "the scheduler",
        "size": "another size, `static`",
    }
    changes = _ask("changes:Changes", workload, folder, *(name for name in names if name != "size"))
    changes |= _ask("changes:StaticChanges", workload, folder, "size")
    shown = {names[name]: each for name, each in changes.items()}
    exported = _ask("changes:ByExport", workload, folder, "lora_on")["lora_on"]
    shown["for comparison: that LoRA fused in PyTorch, exported by optimum-intel, loaded"] = (
        exported
    )
    report.report_changes(shown)


def _tiles(workload: Workload, folder: Path) -> None:
    small = Workload(**make_model(folder, tiny=True), vae=workload.model)
    report.report_tiles(_ask("tiles:Tiles", small, folder, "hires")["hires"])


def _sizes(workload: Workload, folder: Path) -> None:
    report.report_sizes(
        {
            "the demo model": measure_sizes(
                "demo", workload, DEMO, (DEFAULT, 200, KEPT_PRIMITIVES), folder
            ),
            "Stable Diffusion 1.5's size": measure_sizes(
                workload.model, workload, SD15, (DEFAULT, 200, KEPT_PRIMITIVES), folder
            ),
        }
    )


def _large(workload: Workload, folder: Path) -> None:
    large = msgspec.structs.replace(workload, side=512, hires_side=1024)
    measured = measure_peers(large, [("Holdfast", "GenAI")], folder, rounds=1, warm=1)
    report.report_peers("large", large, measured)


def _ask(
    system: str, workload: Workload, folder: Path, *methods: str
) -> dict[str, Mapping[str, float]]:
    with Worker(system, workload, folder / "costs.log") as worker:
        worker.ask("load")
        return {method: worker.ask(method).result for method in methods}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="4 + 4 steps, one round: minutes")
    how.add_argument("--full", action="store_true", help="more rounds, and 512 to 1024: hours")
    how.add_argument("--tiny", action="store_true", help="a trial of the benchmark itself")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="some parts instead of all")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(platformdirs.user_cache_dir("holdfast")) / "benchmarks",
        help="models, caches, images and logs (default: %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
