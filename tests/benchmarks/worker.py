"""One system in a process of its own: takes commands on standard input, tells what each took."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

import msgspec

from tests.benchmarks.workload import Answer, Command, Workload


def main() -> None:
    """Load the system ``module:class`` that is named in the first argument, then obey."""
    channel = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no answer
    module, _, name = sys.argv[1].partition(":")
    workload = msgspec.json.decode(sys.argv[2], type=Workload)
    system = None
    for line in sys.stdin.buffer:
        command = msgspec.json.decode(line, type=Command)
        wall, cpu = time.perf_counter(), cpu_seconds()
        if system is None:
            system = getattr(importlib.import_module(module), name)(workload)
            result = None
        else:
            result = getattr(system, command.do)(**command.arguments)
        answer = Answer(
            wall=time.perf_counter() - wall,
            cpu=cpu_seconds() - cpu,
            cpu_total=cpu_seconds(),
            peak=peak_bytes(),
            result=result or {},
        )
        channel.write(msgspec.json.encode(answer) + b"\n")


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_bytes() -> int:
    """Return the largest resident set that this process has had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    msg = "this system does not tell a process's largest resident set"
    raise OSError(msg)


if __name__ == "__main__":
    main()
