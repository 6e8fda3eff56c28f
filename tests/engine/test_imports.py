from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest

from holdfast.engine.imports import quiet
from tests.support.audited import events_of

if TYPE_CHECKING:
    from pathlib import Path

# Runs in every Python process that inherits PYTHONPATH, the exporter's included.
WATCH = """
import os, sys
def note(text, file=os.environ["WATCH_LOG"]):
    with open(file, "a") as log:
        log.write(text + "\\n")
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        if not isinstance(arguments[-1], (str, bytes)):  # A path: a socket of this machine.
            note(f"{event} {arguments!r}")
            raise ConnectionRefusedError("watched")
note("python " + " ".join(sys.orig_argv[1:4]).replace("\\n", " "))
sys.addaudithook(watch)
"""
BROKEN_TORCHVISION = """
import torchvision.extension
raise RuntimeError("operator torchvision::nms does not exist")
"""
WORKING_TORCHVISION = """
import sys, types
from unittest.mock import MagicMock
class Anything(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)
for name in ("transforms", "transforms.v2", "transforms.v2.functional", "io", "ops"):
    sys.modules["torchvision." + name] = Anything("torchvision." + name)
transforms = sys.modules["torchvision.transforms"]
"""


class Host:
    """A host application in a process of its own, watched for what it says and whom it calls."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "path"
        self._path.mkdir()
        (self._path / "sitecustomize.py").write_text(WATCH)
        self._log = folder / "watch.log"

    def add_module(self, name: str, text: str) -> None:
        """Put a module before all installed ones."""
        file = self._path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)

    def run(self, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a script as a user who has never been asked about usage statistics."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in ("BUILD_BUILDID", "CI", "JENKINS_URL", "TF_BUILD")
        }
        return subprocess.run(  # noqa: S603 - this interpreter
            [sys.executable, "-W", "always", "-c", dedent(script), *map(str, arguments)],
            env={
                **kept,
                "HOME": str(self._folder),
                "PYTHONPATH": os.pathsep.join(
                    filter(None, (str(self._path), kept.get("PYTHONPATH")))
                ),
                "WATCH_LOG": str(self._log),
            },
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def processes(self) -> list[str]:
        """The command lines of the Python processes that ran."""
        return [line for line in self._log.read_text().splitlines() if line.startswith("python ")]

    @property
    def calls(self) -> list[str]:
        """The network connections and name look-ups that they tried."""
        return [line for line in self._log.read_text().splitlines() if line.startswith("socket.")]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_the_watch_sees_a_call_home(host: Host):
    """Imported by itself, openvino does call: what the other tests rule out is real."""
    host.run("import openvino")
    assert any("google-analytics" in call for call in host.calls)


def test_import_and_export_are_silent(host: Host, tiny_sd: Path, tmp_path: Path):
    """An export and the heavy imports print nothing, warn of nothing and connect nowhere."""
    done = host.run(
        """
        import sys
        from pathlib import Path
        from holdfast.engine.imports import heavy
        from holdfast.engine.models.source import resolve
        resolve(sys.argv[1], Path(sys.argv[2]), lambda *_, **__: None)
        assert not {"torch", "diffusers", "openvino"} & set(sys.modules)
        heavy()
        from optimum.intel import OVStableDiffusionPipeline
        """,
        tiny_sd,
        tmp_path / "cache",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert any("holdfast.engine.models.export" in process for process in host.processes)
    assert host.calls == []


def test_a_broken_torchvision_is_hidden(host: Host):
    """One that cannot be imported is hidden and logged once, and optimum-intel works without it."""
    host.add_module("torchvision/__init__.py", BROKEN_TORCHVISION)
    host.add_module("torchvision/extension.py", "")
    done = host.run(
        """
        import sys
        from holdfast.engine.imports import heavy
        log = []
        for _ in range(2):
            heavy(lambda event, **facts: log.append((event, facts["level"], facts["error"])))
        error = "RuntimeError: operator torchvision::nms does not exist"
        assert log == [("imports.torchvision_hidden", "warning", error)], log
        assert [name for name in sys.modules if name.startswith("torchvision")] == ["torchvision"]
        from optimum.intel import OVStableDiffusionPipeline
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_hidden_torchvision_is_in_an_engines_log(
    host: Host, tiny_ir: Path, tiny_cache: Path, tmp_path: Path
):
    """A maintainer learns it from the log, though the imports run beside the compile."""
    host.add_module("torchvision/__init__.py", BROKEN_TORCHVISION)
    host.add_module("torchvision/extension.py", "")
    log = tmp_path / "engine.jsonl"
    done = host.run(
        """
        import sys
        from holdfast.engine import Engine, Txt2Img
        with Engine(model=sys.argv[1], cache_dir=sys.argv[2], log_file=sys.argv[3]) as engine:
            engine.run(Txt2Img(prompt="circle", steps=1))
        """,
        tiny_ir,
        tiny_cache,
        log,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert log.read_text().count('"imports.torchvision_hidden"') == 1


def test_a_host_that_has_transformers_already_is_served(host: Host):
    """A broken torchvision is hidden also where transformers has looked for it before."""
    host.add_module("torchvision/__init__.py", BROKEN_TORCHVISION)
    host.add_module("torchvision/extension.py", "")
    done = host.run(
        """
        from transformers.utils import is_torchvision_available
        is_torchvision_available()
        from holdfast.engine.imports import heavy
        heavy()
        from optimum.intel import OVStableDiffusionPipeline
        assert not is_torchvision_available()
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_working_torchvision_is_left_alone(host: Host):
    """A torchvision that can be imported stays importable, and nothing is logged."""
    host.add_module("torchvision/__init__.py", WORKING_TORCHVISION)
    done = host.run(
        """
        import sys
        from holdfast.engine.imports import heavy
        heavy(lambda *event, **facts: sys.exit(f"logged {event}"))
        import torchvision
        assert torchvision.__file__ is not None
        """
    )
    assert done.returncode == 0, done.stderr


def test_the_process_keeps_its_settings(host: Host):
    """After the imports a host's warnings, loggers and telemetry package are as they were."""
    done = host.run(
        """
        import logging, sys, warnings
        rules, kind, hook = list(warnings.filters), logging.getLoggerClass(), sys.excepthook
        from holdfast.engine.imports import heavy
        heavy()
        touching = [
            rule for rule in warnings.filters
            if rule not in rules and rule[1] is rule[3] is None
            and rule[2].__module__ == "builtins"
        ]
        assert touching == [], touching
        assert logging.getLoggerClass() is kind
        assert logging.root.handlers == []
        assert sys.excepthook is hook
        import openvino_telemetry
        warnings.warn("the host's own", FutureWarning)
        """
    )
    assert done.returncode == 0, done.stderr
    assert "FutureWarning: the host's own" in done.stderr


def test_threads_import_once(host: Host):
    """Threads that ask at the same time all get whole libraries."""
    done = host.run(
        """
        import threading
        from holdfast.engine.imports import heavy
        served = []
        def use():
            heavy()
            from optimum.intel import OVStableDiffusionPipeline
            served.append(OVStableDiffusionPipeline)
        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert len(served) == 4
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


BARE_STREAMS = """
import sys
class Window:
    def __init__(self): self.said = ""
    def write(self, text): self.said += text
real, window = sys.stderr, Window()
sys.stdout = sys.stderr = window
from holdfast.engine.imports import heavy
heavy()
assert sys.stdout is sys.stderr is window
from transformers.utils import logging
logging.get_logger("transformers.some").error("an error")
sys.stdout = sys.stderr = None
heavy()
sys.stderr = real
assert "an error" in window.said, window.said
"""


def test_streams_that_can_only_be_written_to_are_enough(host: Host):
    """A host's console without flush or isatty serves, is put back, and gets errors later."""
    done = host.run(BARE_STREAMS)
    assert done.returncode == 0, done.stderr


HOST_OF_TORCH = """
import sys, threading
import numpy as np
import torch
from holdfast.engine import Engine, Hires
def draw(scheduler):
    request = Hires(prompt="circle", width=64, height=64, steps=3, hires_steps=2, seed=3,
                    scheduler=scheduler, hires_scheduler="euler-a")
    return np.asarray(engine.run(request).images[0])
with Engine(model=sys.argv[1], cache_dir=sys.argv[2], precision="f32") as engine:
    names = ("unipc", "dpm++2m", "lms")
    wanted = {name: draw(name) for name in names}
with Engine(model=sys.argv[1], cache_dir=sys.argv[2], precision="f32") as engine:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for name in names:
        assert np.array_equal(draw(name), wanted[name]), name
assert torch.get_default_dtype() is torch.float64
assert torch.ones(1).dtype is torch.float64
assert torch.ones(1).device.type == "meta"
"""


def test_what_a_host_does_to_torch_reaches_no_picture(host: Host, tiny_ir: Path, tiny_cache: Path):
    """Default dtype and device, threads and determinism change no pixel, and stay the host's."""
    done = host.run(HOST_OF_TORCH, tiny_ir, tiny_cache)
    assert done.returncode == 0, done.stderr


def chatter(module: str) -> None:
    warnings.warn_explicit("deprecated", FutureWarning, f"{module}.py", 1, module=module)


def test_quiet_mutes_the_libraries_alone():
    """Inside the block the libraries' warnings are held back, and the host's are not."""
    with warnings.catch_warnings(record=True) as seen, quiet():
        warnings.simplefilter("always", append=True)
        chatter("diffusers.utils")
        chatter("torch")
        chatter("torchhost")
        chatter("host")
    assert [warning.filename for warning in seen] == ["torchhost.py", "host.py"]


def test_quiet_gives_the_filters_back():
    """After the block the filters are those from before, also where the block raised."""
    before = list(warnings.filters)
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    assert list(warnings.filters) == before


def test_quiet_outlives_a_hosts_catch_warnings():
    """A host that enters catch_warnings inside and leaves it after the block finds its filters."""
    before = list(warnings.filters)
    host = warnings.catch_warnings()
    block = quiet()
    block.__enter__()
    host.__enter__()
    block.__exit__(None, None, None)
    host.__exit__(None, None, None)
    assert list(warnings.filters) == before


def test_quiet_blocks_of_two_threads_may_interleave():
    """Of two blocks that end in the order in which they began, each mutes until its own end."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        first, second = quiet(), quiet()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        chatter("torch")
        assert seen == []
        second.__exit__(None, None, None)
        chatter("torch")
        assert len(seen) == 1


def test_quiet_holds_back_this_threads_records_only(caplog: pytest.LogCaptureFixture):
    """A library's record passes where it is an error, from another thread, or after the block."""
    library = logging.getLogger("diffusers.pipelines.some")
    with quiet():
        library.warning("muted")
        library.error("error")
        other = threading.Thread(target=library.warning, args=("other thread",))
        other.start()
        other.join()
        logging.getLogger("host").warning("host")
    library.warning("after")
    assert caplog.messages == ["error", "other thread", "host", "after"]


PLANNED = """
import sys
from holdfast.engine import Engine, Txt2Img, imports
from holdfast.engine.jobs.job import Job

model, cache, log = sys.argv[1:]
advance = Job.advance
def noted(job, phase, **facts):
    before = job.progress.fraction
    advance(job, phase, **facts)
    print("phase", phase, before)
Job.advance = noted
request = Txt2Img(prompt="x", width=64, height=64, steps=1)
with Engine(model=model, precision="f32", cache_dir=cache, log_file=log) as engine:
    print("before", engine.plan(request))
    engine.run(request)
    print("after", engine.plan(request))
    imports._TAKEN.clear()  # as in a process that begins
    print("again", engine.plan(request))
"""


def test_imports_are_planned_shown_and_learned(tiny_ir: Path, tmp_path: Path) -> None:
    """What is still to be imported is a line of the plan and a phase, and is learned from."""
    host = Host(tmp_path)
    ran = host.run(PLANNED, tiny_ir, tmp_path / "cache", tmp_path / "log.jsonl")
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert re.match(r"before import +libraries +unknown +not in this process yet", lines[0])
    assert "after nothing to do: everything needed is in service" in lines
    (again,) = (line for line in lines if line.startswith("again"))
    assert re.match(r"again import +libraries +\d+\.\d s", again)
    phases = [line.split(" ", 1)[1].rsplit(" ", 1) for line in lines if line.startswith("phase")]
    order = list(dict.fromkeys(phase for phase, _ in phases))
    wanted = ["prepare 1", "import optimum", "pass 1"]
    assert [phase for phase in order if phase in wanted] == wanted
    fractions = [float(fraction) for _, fraction in phases]
    assert fractions == sorted(fractions)
    assert fractions[order.index("pass 1")] > 0
    events = events_of(tmp_path / "log.jsonl")
    waits = [event for event in events if event["event"] == "imports.completed"]
    assert {"openvino", "optimum"} <= {event["wanted"] for event in waits}
    (planned,) = (event for event in events if event["event"] == "plan.made")
    assert "import_seconds" in planned
