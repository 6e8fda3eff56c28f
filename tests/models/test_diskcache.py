from __future__ import annotations

import io
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from holdfast.engine.imports import runtime
from holdfast.engine.models.atomic_files import discard, write_atomically
from holdfast.engine.models.diskcache import DiskCache, build_once
from tests.support.processes import Log, finish, python, wait_for_line

if TYPE_CHECKING:
    from collections.abc import Callable

UNLIMITED = 1 << 40


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def cache(tmp_path: Path, log: Log) -> DiskCache:
    return DiskCache(tmp_path / "cache", UNLIMITED, log)


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
from holdfast.engine.models.diskcache import DiskCache
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
from holdfast.engine.models.diskcache import build_once
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
from holdfast.engine.models.atomic_files import write_atomically
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


def test_discarding_takes_files_and_folders(tmp_path: Path):
    """An entry is gone afterwards, whatever it was, and one that is not there is no error."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "file").touch()
    for name in ("folder", "file", "nothing"):
        discard(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def link_elsewhere(cache: DiskCache, name: str) -> Path:
    """Move an export to where its user has room, and leave a link in its place."""
    folder = add_export(cache, name, 100, 1e9)
    elsewhere = cache.root.with_name("elsewhere") / name
    elsewhere.parent.mkdir(exist_ok=True)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    return elsewhere


def test_links_of_the_user_are_left_alone(tmp_path: Path, log: Log):
    """A linked export serves and is never pruned; discarding it removes the link alone."""
    cache = DiskCache(tmp_path / "cache", 0, log)
    elsewhere = link_elsewhere(cache, "linked")
    (cache.exports / "dangling").symlink_to(tmp_path / "nowhere")
    (cache.exports / "file").touch()
    cache.blobs.mkdir()
    (cache.blobs / "dangling.blob").symlink_to(tmp_path / "nowhere")
    other = add_export(cache, "other", 100, 1e9)
    with cache.hold(cache.exports / "linked"):
        cache.prune()
    assert not other.exists()
    assert (cache.exports / "linked" / "weights").is_file()
    build_once(cache.exports / "linked", lambda _: pytest.fail("it is there"))
    discard(cache.exports / "linked")
    assert (elsewhere / "weights").is_file()
    assert [entry["entry"] for entry in log] == ["other"]


@pytest.mark.parametrize("obstacle", ["dangling", "file"])
def test_what_stands_in_the_way_of_a_build_is_replaced(
    cache: DiskCache, tmp_path: Path, obstacle: str
):
    """A dangling link or a file where an export is to be does not keep it from being made."""
    folder = cache.exports / "name"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tmp_path / "gone") if obstacle == "dangling" else folder.touch()
    build_once(folder, lambda scratch: (scratch / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not folder.is_symlink()


def test_a_cache_below_a_link_holds_what_it_gives(tmp_path: Path, log: Log):
    """A cache that is named by way of a link is the one that it leads to."""
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert DiskCache(tmp_path / "link", UNLIMITED, log).root == tmp_path / "real"


def remove_all(cache: DiskCache) -> None:
    shutil.rmtree(cache.root)


def remove_holds(cache: DiskCache) -> None:
    shutil.rmtree(cache.root / "held")


def test_a_hold_whose_lock_was_removed_is_taken_again(cache: DiskCache, log: Log):
    """After a cleaner has been there, an entry that is held once more is safe from pruning."""
    folder = add_export(cache, "entry", 100, 1e9)
    holds = cache.holds()
    holds.add(folder)
    remove_holds(cache)
    holds.add(folder)
    DiskCache(cache.root, 0, log).prune()
    assert folder.exists()
    holds.keep(())
    assert list((cache.root / "held").iterdir()) == []
    assert log == []


def put_files_for_folders(cache: DiskCache) -> None:
    remove_all(cache)
    cache.root.mkdir()
    for name in ("held", "exports", "blobs"):
        (cache.root / name).touch()


def put_folders_for_files(cache: DiskCache) -> None:
    remove_all(cache)
    for name in ("costs.json", "bookkeeping.lock", "blobs/key.blob"):
        (cache.root / name / "folder").mkdir(parents=True)


@pytest.mark.parametrize(
    "harm", [remove_all, remove_holds, put_files_for_folders, put_folders_for_files]
)
def test_a_cache_that_is_changed_underneath_goes_on(
    cache: DiskCache, log: Log, harm: Callable[[DiskCache], None]
):
    """Whatever a user or a cleaner did to the folder, nothing that can be spared raises."""
    holds = cache.holds()
    held = add_export(cache, "entry", 100, 1e9)
    holds.add(held)
    harm(cache)
    for again in range(2):
        holds.add(cache.exports / f"another-{again}")
        cache.write_blob("key", b"compiled")
        cache.read_blob("key")
        cache.prune()
        cache.costs.record("step", "CPU", "unet", "64", seconds=1.0, bytes=0)
    holds.keep(())
    told = [entry["entry"] for entry in log if entry["event"] == "cache.failed"]
    assert len(set(told)) == len(told)
    assert bool(told) == harm.__name__.startswith("put_")


def test_leftovers_of_killed_processes_are_swept(cache: DiskCache):
    """Halves, holds and locks that nobody has any more go with the next pruning."""
    kept = add_export(cache, "kept", 100, 1e9)
    old = time.time() - 7200
    leftovers = [
        cache.root / "costs.json.tmp-1",
        cache.root / "digests.json.tmp-2",
        cache.blobs / "key.blob.tmp-3",
        cache.exports / "name.tmp-4" / "half",
        cache.root / "held" / "kept~5.lock",
        cache.exports / "gone.lock",
    ]
    for file in leftovers:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (old, old))
    fresh = cache.blobs / "being-written.blob.tmp-6"
    fresh.touch()
    child = python(HOLD, cache.root)
    assert wait_for_line(child) == "held"
    cache.prune()
    assert not any(file.exists() for file in leftovers)
    assert fresh.exists()
    assert (kept / "weights").is_file()
    assert len(list((cache.root / "held").iterdir())) == 1
    finish(child)


PRUNE = """
import sys
from pathlib import Path
from holdfast.engine.models.diskcache import DiskCache, build_once
log = []
cache = DiskCache(Path(sys.argv[1]), 1000, lambda event, **facts: log.append((event, facts)))
def build(scratch):
    for number in range(30):
        (scratch / str(number)).write_bytes(bytes(100))
for number in range(15):
    build_once(cache.exports / "shared", build)
    cache.write_blob(f"{sys.argv[2]}-{number}", bytes(100))
    cache.read_blob(f"{sys.argv[2]}-{number}")
print([one for one in log if one[0] == "cache.failed"], flush=True)
"""


def test_processes_that_prune_at_once_are_not_in_each_others_way(cache: DiskCache):
    """Of three that fill and prune one small cache nothing fails, and the limit holds."""
    children = [python(PRUNE, cache.root, name) for name in "abc"]
    assert [wait_for_line(child) for child in children] == ["[]"] * 3
    assert [finish(child) for child in children] == [0] * 3
    DiskCache(cache.root, 1000, Log()).prune()
    assert 0 < sum(path.stat().st_size for path in cache.blobs.iterdir()) <= 1000
    assert not [path for path in cache.blobs.iterdir() if ".tmp-" in path.name]


ANOTHER_USER = """
import os, sys
from pathlib import Path
from holdfast.engine.models.diskcache import DiskCache, build_once
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
log = []
cache = DiskCache(Path(sys.argv[1]), 0, lambda event, **facts: log.append(facts["entry"]))
holds = cache.holds()
for _ in range(2):
    holds.add(cache.exports / "entry")
    build_once(cache.exports / "entry", lambda _: sys.exit("it is there"))
    assert cache.read_blob("key") == b"compiled"
    cache.write_blob("mine", b"compiled")
    cache.prune()
    cache.costs.record("step", "CPU", "unet", "64", seconds=1.0, bytes=0)
    holds.keep(())
print(sorted(log))
"""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="a POSIX matter")
def test_a_cache_of_another_user_is_read(log: Log):
    """Where nothing can be written, what is there serves; each thing that fails is told once."""
    with tempfile.TemporaryDirectory() as folder:
        cache = DiskCache(Path(folder, "cache"), UNLIMITED, log)
        add_export(cache, "entry", 100, 1e9)
        cache.write_blob("key", b"compiled")
        everything = (Path(folder), cache.root, *cache.root.rglob("*"))
        for path in everything:
            path.chmod(0o555 if path.is_dir() else 0o444)
        child = python(ANOTHER_USER, cache.root)
        told = wait_for_line(child)
        for path in everything:
            path.chmod(0o755 if path.is_dir() else 0o644)
        assert finish(child) == 0
    assert "writing blobs" in told
    assert "writing costs.json" in told
    assert log == []
