"""What is learned is kept, shared and bounded, and never in the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine.models.ledger import Cost, Costs, Spared
from tests.support.processes import Log, finish, python

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORK = ("compile", "CPU", "unet", "512")


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def costs(tmp_path: Path, log: Log) -> Costs:
    return Costs(tmp_path / "costs.json", log)


def test_costs_lean_to_the_latest(costs: Costs):
    """The first sample is believed; later ones move the mean, the more the fewer there were."""
    work = ("compile", "CPU", "UNet2DConditionModel", "512x512")
    assert costs.expected(*work) is None
    costs.record(*work, seconds=4.0, bytes=100)
    assert costs.expected(*work) == Cost(4.0, 100, 1)
    costs.record(*work, seconds=2.0, bytes=200)
    assert costs.expected(*work) == Cost(3.0, 150, 2)
    for _ in range(40):
        costs.record(*work, seconds=1.0, bytes=200)
    learned = costs.expected(*work)
    assert learned is not None
    assert learned.seconds == pytest.approx(1.0, abs=0.01)


def test_costs_are_kept_apart(costs: Costs):
    """Kind, device, component and bucket each make another cost."""
    costs.record("compile", "CPU", "unet", "512", seconds=1.0, bytes=1)
    for other in (
        ("read", "CPU", "unet", "512"),
        ("compile", "GPU", "unet", "512"),
        ("compile", "CPU", "vae", "512"),
        ("compile", "CPU", "unet", "768"),
    ):
        assert costs.expected(*other) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"a": {"seconds": "soon"}}', b"\xff\xfe"], ids=repr
)
def test_costs_that_cannot_be_read_are_discarded(tmp_path: Path, log: Log, content: bytes):
    """A damaged or foreign costs file is removed and logged, and learning starts anew."""
    file = tmp_path / "costs.json"
    file.write_bytes(content)
    costs = Costs(file, log)
    assert costs.expected("compile", "CPU", "unet", "512") is None
    assert [entry["event"] for entry in log] == ["cache.discarded"]
    costs.record("compile", "CPU", "unet", "512", seconds=1.0, bytes=1)
    assert costs.expected("compile", "CPU", "unet", "512") == Cost(1.0, 1, 1)


RECORD = """
import sys
from pathlib import Path
from holdfast.engine.models.ledger import Costs
costs = Costs(Path(sys.argv[1]), lambda *_, **__: None)
for _ in range(20):
    costs.record("compile", "CPU", "shared", "512", seconds=1.0, bytes=1)
"""


def test_two_processes_lose_no_cost(tmp_path: Path):
    """Two processes that learn at once forget nothing of each other's."""
    file = tmp_path / "costs.json"
    children = [python(RECORD, file) for _ in range(2)]
    assert [finish(child) for child in children] == [0, 0]
    learned = Costs(file, Log()).expected("compile", "CPU", "shared", "512")
    assert learned == Cost(1.0, 1, 40)


def test_costs_are_bounded(tmp_path: Path):
    """Above a thousand entries those learned longest ago are forgotten."""
    costs = Costs(tmp_path / "costs.json", Log())
    entries = {f"compile|CPU|unet|{index}": Cost(1.0, 1, 1) for index in range(1000)}
    costs._ledger.change(lambda _: entries)
    costs.record("compile", "CPU", "unet", "new", seconds=1.0, bytes=1)
    assert costs.expected("compile", "CPU", "unet", "new") is not None
    assert costs.expected("compile", "CPU", "unet", "0") is None
    assert costs.expected("compile", "CPU", "unet", "1") is not None


def a_file_in_place_of_its_folder(root: Path) -> Callable[[], object]:
    root.rmdir()
    root.touch()
    return root.unlink


def a_folder_of_its_name(root: Path) -> Callable[[], object]:
    (root / "costs.json").mkdir()
    return (root / "costs.json").rmdir


def a_folder_in_place_of_its_lock(root: Path) -> Callable[[], object]:
    (root / "costs.json.lock").mkdir()
    return (root / "costs.json.lock").rmdir


@pytest.mark.parametrize(
    "harm",
    [a_file_in_place_of_its_folder, a_folder_of_its_name, a_folder_in_place_of_its_lock],
)
def test_costs_that_cannot_be_kept_are_done_without(
    tmp_path: Path, log: Log, harm: Callable[[Path], Callable[[], object]]
):
    """Learning never raises: each way to fail is told once, and so is that it works again."""
    root = tmp_path / "cache"
    root.mkdir()
    mend = harm(root)
    costs = Costs(root / "costs.json", log)
    for _ in range(3):
        costs.record(*WORK, seconds=1.0, bytes=1)
        assert costs.expected(*WORK) is None
    assert set(log.names) == {"cache.failed"}
    entries = [entry["entry"] for entry in log]
    assert "writing costs.json" in entries
    assert len(set(entries)) == len(entries)
    log.clear()
    mend()
    costs.record(*WORK, seconds=1.0, bytes=1)
    assert costs.expected(*WORK) == Cost(1.0, 1, 1)
    assert set(log.names) == {"cache.recovered"}
    assert [entry["entry"] for entry in log] == sorted(entries, reverse=True)


def test_costs_on_a_full_disk_keep_what_was_known(
    costs: Costs, log: Log, full_disk: Callable[[], Any]
):
    """Where a write has no room, the costs from before are read on, and learning is resumed."""
    costs.record(*WORK, seconds=1.0, bytes=1)
    with full_disk():
        costs.record(*WORK, seconds=9.0, bytes=1)
        assert costs.expected(*WORK) == Cost(1.0, 1, 1)
    costs.record(*WORK, seconds=1.0, bytes=1)
    assert costs.expected(*WORK) == Cost(1.0, 1, 2)
    assert log.names == ["cache.failed", "cache.recovered"]


@pytest.mark.parametrize("error", [OSError(24, "no descriptor"), MemoryError(), ValueError("x")])
def test_whatever_can_be_spared_is_left_out(log: Log, error: Exception):
    """Any exception ends the block alone; one that is meant for the process goes on."""
    spared = Spared(log)
    with spared.of("notes"):
        raise error
    assert log == [
        {
            "event": "cache.failed",
            "level": "warning",
            "entry": "notes",
            "error": f"{type(error).__name__}: {error}",
        }
    ]
    with pytest.raises(KeyboardInterrupt), spared.of("notes"):
        raise KeyboardInterrupt
