from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import holdfast.states

if TYPE_CHECKING:
    from types import ModuleType

HOME = Path(holdfast.states.__path__[0])
LOADED = "import json, sys; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - the programs stand below
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )


def test_importing_it_loads_only_transitions_and_structlog() -> None:
    """Beside the standard library, transitions, structlog and what these load, nothing comes in."""
    ours = set(json.loads(python(f"import holdfast.states; {LOADED}").stdout))
    theirs = json.loads(python(f"import structlog, transitions.extensions; {LOADED}").stdout)
    assert ours - set(theirs) - sys.stdlib_module_names == {"holdfast"}
    assert not ours & {"openvino", "torch", "diffusers", "transformers", "optimum"}


def test_importing_it_loads_no_engine() -> None:
    """The lifecycle stands alone: the engine depends on it and not the other way round."""
    names = (
        "import sys, holdfast.states; print([m for m in sys.modules if m.startswith('holdfast')])"
    )
    loaded = python(names).stdout
    assert "holdfast.states.chart" in loaded
    assert "holdfast.engine" not in loaded


def test_a_host_that_configured_nothing_sees_nothing() -> None:
    """Moves and refusals print nothing on either stream of a host without a logging set-up."""
    ran = python(
        "from holdfast.states import *\n"
        "lifecycle = Lifecycle()\n"
        "lifecycle.fire('load-txt2img')\n"
        "try: lifecycle.fire('fly')\n"
        "except IllegalTransition: pass\n"
        "else: raise SystemExit(1)\n"
    )
    assert (ran.stdout, ran.stderr) == ("", "")


def test_a_host_at_info_sees_holdfast_alone() -> None:
    """With the root logger at INFO, a move gives the one line of Holdfast and none of others."""
    ran = python(
        "import logging; logging.basicConfig(level='INFO', format='%(name)s')\n"
        "from holdfast.states import Lifecycle\n"
        "Lifecycle().fire('load-txt2img')\n"
    )
    assert ran.stderr == "holdfast\n"


CONFIGURE = """
import logging.config
handler = {"class": "logging.StreamHandler"}
root = {"level": "INFO", "handlers": ["h"]}
logging.config.dictConfig({"version": 1, "handlers": {"h": handler}, "root": root})
"""


def test_a_host_may_configure_logging_after_the_import() -> None:
    """The logger is made by the first lifecycle: dictConfig switches off those made before."""
    ran = python(
        "import logging, holdfast.engine\n"
        "from holdfast.engine import Engine\n"
        "from holdfast.states import Lifecycle\n"
        "assert 'holdfast' not in logging.root.manager.loggerDict\n"
        f"{CONFIGURE}"
        "Lifecycle().fire('load-txt2img')\n"
    )
    assert "state.changed" in ran.stderr


@pytest.mark.parametrize("late", [False, True])
def test_a_hosts_structlog_decides_whenever_it_comes(late: bool) -> None:  # noqa: FBT001 - a case
    """Processors of a host are used from when it sets them, also after the first event."""
    configure = "structlog.configure(processors=[structlog.processors.JSONRenderer()])\n"
    ran = python(
        f"{CONFIGURE}import structlog\nfrom holdfast.states import Lifecycle\n"
        "lifecycle = Lifecycle()\n"
        + ("lifecycle.fire('load-txt2img')\n" if late else "")
        + configure
        + "lifecycle.fire('switch-img2img' if lifecycle.mode else 'load-txt2img')\n"
    )
    assert json.loads(ran.stderr.splitlines()[-1])["event"] == "state.changed"


def test_a_file_of_the_hosts_gets_no_colours(tmp_path: Path) -> None:
    """In a terminal, where structlog's own default is coloured, what goes to a file is plain."""
    file = tmp_path / "host.log"
    program = (
        f"import logging; logging.basicConfig(filename={str(file)!r}, level='INFO')\n"
        "from holdfast.states import Lifecycle\n"
        "Lifecycle().fire('load-txt2img')\n"
    )
    subprocess.run(  # noqa: S603 - the program stands above
        [sys.executable, "-c", program], check=True, env={**os.environ, "FORCE_COLOR": "1"}
    )
    assert "state.changed" in file.read_text()
    assert "\x1b" not in file.read_text()


def test_only_the_lifecycle_imports_transitions() -> None:
    """One file imports the library that does the moving."""
    importing = re.compile(r"^\s*(?:import|from) transitions\b", re.MULTILINE)
    files = [path.name for path in HOME.glob("*.py") if importing.search(path.read_text())]
    assert files == ["lifecycle.py"]


@pytest.fixture
def grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return the package as it is with one mode more, added in chart.py and nowhere else."""
    shutil.copytree(HOME, tmp_path / "grown", ignore=shutil.ignore_patterns("__pycache__"))
    chart = tmp_path / "grown" / "chart.py"
    source = chart.read_text()
    for member in re.findall(r'^    \w*INPAINT = ".+"\n', source, re.MULTILINE):
        twin = member.replace("INPAINT", "RELIGHT").replace("inpaint", "relight")
        source = source.replace(member, member + twin)
    chart.write_text(source)
    init = tmp_path / "grown" / "__init__.py"
    spec = importlib.util.spec_from_file_location("grown", init)
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "grown", package)
    spec.loader.exec_module(package)
    yield package
    for name in [name for name in sys.modules if name.startswith("grown.")]:
        del sys.modules[name]


def test_a_mode_is_added_in_the_chart_alone(grown: ModuleType) -> None:
    """Five members make a mode: it loads, switches, recompiles into itself, is drawn."""
    assert [*grown.Mode] == ["txt2img", "img2img", "inpaint", "relight"]
    lifecycle = grown.Lifecycle()
    assert set(lifecycle.edges()) == set(grown.CHART.rows) > set(holdfast.states.CHART.rows)
    walk = ["load-txt2img", "switch-relight", "recompile", "recompile-rolled-back", "recompile"]
    assert [lifecycle.fire(trigger) for trigger in walk] == [
        "compiled-txt2img",
        "compiled-relight",
        "recompiling.relight",
        "compiled-relight",
        "recompiling.relight",
    ]
    assert lifecycle.mode == "relight"
    with pytest.raises(grown.IllegalTransition):
        lifecycle.fire("switch-txt2img")
    assert lifecycle.fire("recompiled") == "compiled-relight"
    assert lifecycle.legal() == (
        "switch-txt2img", "switch-img2img", "switch-inpaint", "recompile", "unload",
    )  # fmt: skip
    assert "recompiling_relight --> compiled_relight: recompiled" in grown.mermaid()
