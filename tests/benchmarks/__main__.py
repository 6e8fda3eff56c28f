"""``python -m tests.benchmarks``: measure, and write docs/performance.md, its plots and raw figures."""

from __future__ import annotations

import argparse
from pathlib import Path

import platformdirs

from tests.benchmarks.model import make_model
from tests.benchmarks.peers import GROUPS, compare_images, measure_peers
from tests.benchmarks.workload import Workload


def main() -> None:
    arguments = _arguments()
    folder = arguments.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    places = make_model(folder, tiny=arguments.tiny)
    workload = Workload(**places)
    if arguments.tiny:
        workload = Workload(**places, side=64, hires_side=96, steps=4, hires_steps=4)
    elif arguments.quick:
        workload = Workload(**places, steps=4, hires_steps=4)
    print(measure_peers(workload, GROUPS, folder, rounds=1, warm=2))
    print(compare_images(workload, folder))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="4 + 4 steps, one round: minutes")
    how.add_argument("--full", action="store_true", help="512 to 1024 once, too: hours")
    how.add_argument("--tiny", action="store_true", help="a trial of the benchmark itself")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(platformdirs.user_cache_dir("holdfast")) / "benchmarks",
        help="models, caches, images and logs (default: %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
