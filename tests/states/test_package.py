from __future__ import annotations

import importlib.util
import json
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


def test_only_the_lifecycle_imports_transitions() -> None:
    """One file imports the library that does the moving."""
    importing = re.compile(r"^\s*(?:import|from) transitions\b", re.MULTILINE)
    files = [path.name for path in HOME.glob("*.py") if importing.search(path.read_text())]
    assert files == ["lifecycle.py"]


@pytest.fixture
def grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return the package as it is with a third mode, added in chart.py and nowhere else."""
    shutil.copytree(HOME, tmp_path / "grown", ignore=shutil.ignore_patterns("__pycache__"))
    chart = tmp_path / "grown" / "chart.py"
    source = chart.read_text()
    for member in re.findall(r'^    \w*IMG2IMG = ".+"\n', source, re.MULTILINE):
        twin = member.replace("IMG2IMG", "INPAINT").replace("img2img", "inpaint")
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
    """Five members make a third mode: it loads, switches, recompiles into itself, is drawn."""
    assert [*grown.Mode] == ["txt2img", "img2img", "inpaint"]
    lifecycle = grown.Lifecycle()
    assert set(lifecycle.edges()) == set(grown.CHART.rows) > set(holdfast.states.CHART.rows)
    walk = ["load-txt2img", "switch-inpaint", "recompile", "recompile-rolled-back", "recompile"]
    assert [lifecycle.fire(trigger) for trigger in walk] == [
        "compiled-txt2img",
        "compiled-inpaint",
        "recompiling.inpaint",
        "compiled-inpaint",
        "recompiling.inpaint",
    ]
    assert lifecycle.mode == "inpaint"
    with pytest.raises(grown.IllegalTransition):
        lifecycle.fire("switch-txt2img")
    assert lifecycle.fire("recompiled") == "compiled-inpaint"
    assert lifecycle.legal() == ("switch-txt2img", "switch-img2img", "recompile", "unload")
    assert "recompiling_inpaint --> compiled_inpaint: recompiled" in grown.mermaid()
