from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from holdfast.engine.diskcache import Cost, Costs, DiskCache, build_once, discard, write_atomically
from holdfast.engine.imports import runtime

if TYPE_CHECKING:
    from pathlib import Path

UNLIMITED = 1 << 40


class Log(list[dict[str, Any]]):
    def __call__(self, event: str, /, **facts: Any) -> None:
        self.append({"event": event, **facts})


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def cache(tmp_path: Path, log: Log) -> DiskCache:
    return DiskCache(tmp_path / "cache", UNLIMITED, log)


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(  # noqa: S603 - this interpreter
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


def wait_for_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def finish(child: subprocess.Popen[str], sign: signal.Signals | None = None) -> int:
    if sign is not None:
        child.send_signal(sign)
    child.communicate()
    return child.returncode


def write(file: Path, size: int) -> None:
    file.write_bytes(bytes(size))


def add_export(cache: DiskCache, name: str, size: int, last_used: float) -> Path:
    folder = cache.exports / name
    build_once(folder, lambda scratch: write(scratch / "weights", size))
    os.utime(folder, (last_used, last_used))
    return folder


def test_a_compiled_model_comes_back_from_a_blob(cache: DiskCache, tiny_ir: Path):
    """A blob that was stored is imported by OpenVINO and computes the same."""
    runtime()
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(tiny_ir / "vae_decoder/openvino_model.xml"), "CPU"
    )
    cache.write_blob("key", compiled.export_model().getvalue())
    blob = cache.read_blob("key")
    assert blob is not None
    imported = core.import_model(io.BytesIO(blob), "CPU")
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    assert np.array_equal(imported(latents)[0], compiled(latents)[0])


def test_a_blob_that_was_never_stored_is_none(cache: DiskCache, log: Log):
    """Asking for an unknown key is no event."""
    assert cache.read_blob("key") is None
    assert log == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:10],
        lambda content: content[:0],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content + b"more",
        lambda content: b"<?xml version='1.0'?><net/>" + content,
    ],
    ids=["cut", "cut in the head", "empty", "one bit", "longer", "foreign"],
)
def test_a_damaged_blob_is_discarded_and_can_be_rebuilt(cache: DiskCache, log: Log, damage: Any):
    """Whatever happened to a blob's file, it is not served, removed, and logged."""
    cache.write_blob("key", b"compiled" * 100)
    file = cache.blobs / "key.blob"
    file.write_bytes(damage(file.read_bytes()))
    assert cache.read_blob("key") is None
    assert not file.exists()
    assert [(entry["event"], entry["entry"]) for entry in log] == [("cache.discarded", "key.blob")]
    cache.write_blob("key", b"again")
    assert cache.read_blob("key") == b"again"


def test_a_blob_under_another_key_is_foreign(cache: DiskCache, log: Log):
    """A whole blob that was renamed to another key is not served for that key."""
    cache.write_blob("one", b"compiled")
    (cache.blobs / "one.blob").rename(cache.blobs / "two.blob")
    assert cache.read_blob("two") is None
    assert log[0]["event"] == "cache.discarded"


def test_pruning_gives_up_the_least_recently_used(tmp_path: Path, log: Log):
    """Above the limit entries go in the order of their last use, and only as many as needed."""
    cache = DiskCache(tmp_path, 250, log)
    old, older, new = (
        add_export(cache, name, 100, used) for name, used in (("b", 2e9), ("a", 1e9), ("c", 3e9))
    )
    cache.prune()
    assert [old.exists(), older.exists(), new.exists()] == [True, False, True]
    assert [entry["entry"] for entry in log] == ["a"]


def test_reading_a_blob_counts_as_use(tmp_path: Path, log: Log):
    """Of two blobs the one that was read last survives."""
    cache = DiskCache(tmp_path, 400, log)
    for key in ("one", "two"):
        cache.write_blob(key, bytes(100))
        os.utime(cache.blobs / f"{key}.blob", (1e9, 1e9))
    assert cache.read_blob("one") is not None
    cache.write_blob("three", bytes(150))
    assert (cache.read_blob("one"), cache.read_blob("two")) == (bytes(100), None)


def test_what_is_held_is_never_pruned(tmp_path: Path, log: Log):
    """An entry in use stays although it is the oldest, and goes when it is let go."""
    cache = DiskCache(tmp_path, 0, log)
    folder = add_export(cache, "held", 100, 1e9)
    with cache.hold(folder), cache.hold(folder):
        cache.prune()
        assert folder.exists()
    cache.prune()
    assert not folder.exists()
    assert list((tmp_path / "held").iterdir()) == []


HOLD = """
import sys
from pathlib import Path
from holdfast.engine.diskcache import DiskCache
cache = DiskCache(Path(sys.argv[1]), 0, lambda *_, **__: None)
with cache.hold(cache.exports / "entry"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_holds_until_it_dies(tmp_path: Path, log: Log):
    """A hold keeps other processes from pruning, and ends with a kill of its process."""
    cache = DiskCache(tmp_path, 0, log)
    folder = add_export(cache, "entry", 100, 1e9)
    child = python(HOLD, tmp_path)
    assert wait_for_line(child) == "held"
    cache.prune()
    assert folder.exists()
    assert finish(child, signal.SIGKILL) == -signal.SIGKILL
    cache.prune()
    assert not folder.exists()


BUILD = """
import sys, time
from pathlib import Path
from holdfast.engine.diskcache import build_once
def build(scratch):
    (scratch / "half").write_text("half")
    print("building", flush=True)
    sys.stdin.read()
build_once(Path(sys.argv[1]), build)
"""


def test_a_killed_build_leaves_nothing(cache: DiskCache):
    """After a kill amid a build the folder is not there; the next prune removes what is left."""
    child = python(BUILD, cache.exports / "name")
    assert wait_for_line(child) == "building"
    cache.prune()
    assert len(list(cache.exports.glob("name.tmp-*"))) == 1
    finish(child, signal.SIGKILL)
    assert not (cache.exports / "name").exists()
    cache.prune()
    assert [path.name for path in cache.exports.iterdir()] == ["name.lock"]


def test_a_build_after_a_killed_one_is_whole(cache: DiskCache):
    """The next build removes the killed one's leftover and starts from an empty folder."""
    child = python(BUILD, cache.exports / "name")
    assert wait_for_line(child) == "building"
    finish(child, signal.SIGKILL)
    build_once(cache.exports / "name", lambda scratch: (scratch / "whole").touch())
    assert [path.name for path in (cache.exports / "name").iterdir()] == ["whole"]
    assert sorted(path.name for path in cache.exports.iterdir()) == ["name", "name.lock"]


def test_a_failed_build_leaves_nothing(cache: DiskCache):
    """A build that raises passes its error on and leaves no folder, not even a half one."""

    def build(scratch: Path) -> None:
        (scratch / "half").touch()
        raise OSError(28, "no space left")

    with pytest.raises(OSError, match="no space left"):
        build_once(cache.exports / "name", build)
    assert [path.name for path in cache.exports.iterdir()] == ["name.lock"]


def test_what_is_built_already_is_not_built_again(cache: DiskCache):
    """A second build of the same name does not run."""
    build_once(cache.exports / "name", lambda scratch: (scratch / "first").touch())
    build_once(cache.exports / "name", lambda scratch: (scratch / "second").touch())
    assert [path.name for path in (cache.exports / "name").iterdir()] == ["first"]


WRITE = """
import sys
from pathlib import Path
from holdfast.engine.diskcache import write_atomically
print("writing", flush=True)
while True:
    for letter in b"ab":
        write_atomically(Path(sys.argv[1]), bytes([letter]) * 100_000)
"""


@pytest.mark.parametrize("milliseconds", range(0, 50, 10))
def test_a_killed_write_leaves_the_old_or_the_new(tmp_path: Path, milliseconds: int):
    """However a writer is killed, its file holds one whole content."""
    file = tmp_path / "file"
    write_atomically(file, b"a" * 100_000)
    child = python(WRITE, file)
    assert wait_for_line(child) == "writing"
    time.sleep(milliseconds / 1000)
    finish(child, signal.SIGKILL)
    assert file.read_bytes() in (b"a" * 100_000, b"b" * 100_000)


def test_costs_lean_to_the_latest(cache: DiskCache):
    """The first sample is believed; later ones move the mean, the more the fewer there were."""
    work = ("compile", "CPU", "UNet2DConditionModel", "512x512")
    assert cache.costs.expected(*work) is None
    cache.costs.record(*work, seconds=4.0, bytes=100)
    assert cache.costs.expected(*work) == Cost(4.0, 100, 1)
    cache.costs.record(*work, seconds=2.0, bytes=200)
    assert cache.costs.expected(*work) == Cost(3.0, 150, 2)
    for _ in range(40):
        cache.costs.record(*work, seconds=1.0, bytes=200)
    learned = cache.costs.expected(*work)
    assert learned is not None
    assert learned.seconds == pytest.approx(1.0, abs=0.01)


def test_costs_are_kept_apart(cache: DiskCache):
    """Kind, device, component and bucket each make another cost."""
    cache.costs.record("compile", "CPU", "unet", "512", seconds=1.0, bytes=1)
    for other in (
        ("read", "CPU", "unet", "512"),
        ("compile", "GPU", "unet", "512"),
        ("compile", "CPU", "vae", "512"),
        ("compile", "CPU", "unet", "768"),
    ):
        assert cache.costs.expected(*other) is None


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
from holdfast.engine.diskcache import Costs
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
    costs._ledger.update(entries)
    costs.record("compile", "CPU", "unet", "new", seconds=1.0, bytes=1)
    assert costs.expected("compile", "CPU", "unet", "new") is not None
    assert costs.expected("compile", "CPU", "unet", "0") is None
    assert costs.expected("compile", "CPU", "unet", "1") is not None


def test_discarding_takes_files_and_folders(tmp_path: Path):
    """An entry is gone afterwards, whatever it was, and one that is not there is no error."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "file").touch()
    for name in ("folder", "file", "nothing"):
        discard(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
