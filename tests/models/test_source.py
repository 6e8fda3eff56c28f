from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.models import hub
from holdfast.engine.models.source import ModelFolder, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

COMPONENTS = {"text_encoder", "unet", "vae_decoder", "vae_encoder"}


class Log(list[dict[str, Any]]):
    def __call__(self, event: str, /, **facts: Any) -> None:
        self.append({"event": event, **facts})


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def ir(tiny_ir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny OpenVINO model, to be damaged."""
    return shutil.copytree(tiny_ir, tmp_path / "ir")


@pytest.fixture
def sd(tiny_sd: Path, tmp_path: Path) -> Path:
    """A copy of the tiny diffusers model, to be damaged."""
    return shutil.copytree(tiny_sd, tmp_path / "sd")


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file: Path, size: int) -> None:
    os.truncate(file, size)


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def test_an_openvino_folder_is_taken_as_it_is(ir: Path, tmp_path: Path, log: Log):
    """A folder of IR is not exported; its parts, configs and fingerprint are at hand."""
    model = resolve(ir, tmp_path / "cache", log)
    assert model.path == ir
    assert model.class_name == "StableDiffusionPipeline"
    assert set(model.component_fingerprints) == COMPONENTS
    assert model.component_path("unet") == ir / "unet" / "openvino_model.xml"
    assert model.component_config("vae_decoder")["latent_channels"] == 4
    (told,) = log
    assert told.pop("seconds") > 0
    assert told == {
        "event": "model.resolved",
        "model": ir.name,
        "fingerprint": model.fingerprint,
        "pipeline": "StableDiffusionPipeline",
    }


def test_a_diffusers_folder_is_exported_once(tiny_sd: Path, tiny_cache: Path, log: Log):
    """A second time the export of the first is used, and no exporter runs."""
    model = resolve(tiny_sd, tiny_cache, log)
    assert model.path.parent == tiny_cache / "exports"
    assert [entry["event"] for entry in log] == ["model.resolved"]


def test_a_moved_diffusers_folder_has_the_same_export(sd: Path, tiny_cache: Path, log: Log):
    """Where a model lies does not matter, only what it holds."""
    edit_json(sd / "unet" / "config.json", _name_or_path="elsewhere")
    resolve(sd, tiny_cache, log)
    assert [entry["event"] for entry in log] == ["model.resolved"]


def test_a_fingerprint_survives_copying(ir: Path, tiny_ir: Path, tmp_path: Path, log: Log):
    """A copy has the fingerprints of the original, in another cache too."""
    original, copy = (resolve(path, tmp_path / path.name, log) for path in (tiny_ir, ir))
    assert copy.fingerprint == original.fingerprint
    assert copy.component_fingerprints == original.component_fingerprints


def change_weights(ir: Path) -> None:
    weights = ir / "vae_decoder" / "openvino_model.bin"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)


def change_config(ir: Path) -> None:
    edit_json(ir / "vae_decoder" / "config.json", scaling_factor=0.5)


@pytest.mark.parametrize("change", [change_weights, change_config])
def test_a_changed_vae_changes_only_the_vae(
    ir: Path, tmp_path: Path, log: Log, change: Callable[[Path], None]
):
    """Another VAE decoder gives the model and that part another fingerprint, and no other part."""
    before = resolve(ir, tmp_path / "cache", log)
    change(ir)
    after = resolve(ir, tmp_path / "cache", log)
    assert after.fingerprint != before.fingerprint
    assert {
        name
        for name in COMPONENTS
        if after.component_fingerprint(name) != before.component_fingerprint(name)
    } == {"vae_decoder"}


@pytest.mark.parametrize("part", ["tokenizer/tokenizer.json", "scheduler/scheduler_config.json"])
def test_texts_belong_to_the_whole_alone(ir: Path, tmp_path: Path, log: Log, part: str):
    """A changed tokenizer or scheduler is another model of the same components."""
    before = resolve(ir, tmp_path / "cache", log)
    edit_json(ir / part, changed=True)
    after = resolve(ir, tmp_path / "cache", log)
    assert after.fingerprint != before.fingerprint
    assert after.component_fingerprints == before.component_fingerprints


def test_digests_that_cannot_be_read_are_made_again(ir: Path, tmp_path: Path, log: Log):
    """A damaged file of digests is discarded, logged and rebuilt."""
    before = resolve(ir, tmp_path / "cache", log)
    cut(tmp_path / "cache" / "digests.json", 100)
    assert resolve(ir, tmp_path / "cache", log) == before
    assert [entry["event"] for entry in log] == [
        "model.resolved",
        "cache.discarded",
        "model.resolved",
    ]


IR_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "graph missing": (lambda ir: (ir / "unet/openvino_model.xml").unlink(), "xml is missing"),
    "weights missing": (lambda ir: (ir / "unet/openvino_model.bin").unlink(), "bin is missing"),
    "part missing": (lambda ir: shutil.rmtree(ir / "text_encoder"), "text_encoder.*is missing"),
    "half of a part": (lambda ir: (ir / "vae_encoder/openvino_model.xml").unlink(), "is missing"),
    "other channels": (lambda ir: edit_json(ir / "unet/config.json", in_channels=8), "8 channels"),
    "another VAE": (
        lambda ir: edit_json(ir / "vae_decoder/config.json", _class_name="AutoencoderTiny"),
        "AutoencoderTiny",
    ),
    "a field of nobody": (
        lambda ir: edit_json(ir / "vae_decoder/config.json", latents_tilt=[1.0]),
        "latents_tilt",
    ),
    "a word for a number": (
        lambda ir: edit_json(ir / "unet/config.json", block_out_channels="wide"),
        "block_out_channels",
    ),
    "an index of triples": (
        lambda ir: edit_json(ir / "model_index.json", unet=["diffusers", "UNet", "x"]),
        "a library and a class",
    ),
    "config missing": (lambda ir: (ir / "unet/config.json").unlink(), "config.json"),
    "graph cut": (lambda ir: cut(ir / "unet/openvino_model.xml", 5000), "was cut"),
    "graph empty": (lambda ir: cut(ir / "unet/openvino_model.xml", 0), "was cut"),
    "weights cut": (lambda ir: cut(ir / "unet/openvino_model.bin", 5000), "has 5000 bytes"),
    "weights cut by a byte": (
        lambda ir: cut(
            ir / "unet/openvino_model.bin", (ir / "unet/openvino_model.bin").stat().st_size - 1
        ),
        "it was cut",
    ),
    "weights swapped": (
        lambda ir: swap(
            ir / "vae_decoder/openvino_model.bin", ir / "vae_encoder/openvino_model.bin"
        ),
        "belongs to another graph",
    ),
    "index missing": (lambda ir: (ir / "model_index.json").unlink(), "model_index.json"),
    "index not JSON": (lambda ir: cut(ir / "model_index.json", 20), "cannot be read as JSON"),
    "index a list": (lambda ir: (ir / "model_index.json").write_text("[]"), "JSON object"),
    "no class": (lambda ir: (ir / "model_index.json").write_text("{}"), "StableDiffusionPipeline"),
    "unsupported": (
        lambda ir: edit_json(ir / "model_index.json", _class_name="KolorsPipeline"),
        "KolorsPipeline.*StableDiffusionPipeline",
    ),
}


@pytest.mark.parametrize(("damage", "says"), IR_DAMAGES.values(), ids=IR_DAMAGES)
def test_a_damaged_openvino_folder_is_refused(
    ir: Path, tmp_path: Path, log: Log, damage: Callable[[Path], Any], says: str
):
    """Whatever is missing or cut, the error names the file and what to do."""
    damage(ir)
    with pytest.raises(ModelSourceError, match=says) as caught:
        resolve(ir, tmp_path / "cache", log)
    assert str(ir) in str(caught.value) or "it runs StableDiffusion" in str(caught.value)
    assert log == []


def cut_pickle(sd: Path) -> None:
    weights = sd / "unet" / "diffusion_pytorch_model.bin"
    weights.with_suffix(".safetensors").unlink()
    with zipfile.ZipFile(weights, "w") as archive:
        archive.writestr("data.pkl", b"weights" * 1000)
    cut(weights, weights.stat().st_size - 1)


SD_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights missing": (
        lambda sd: (sd / "unet/diffusion_pytorch_model.safetensors").unlink(),
        "holds no weights",
    ),
    "weights cut": (
        lambda sd: cut(sd / "unet/diffusion_pytorch_model.safetensors", 100_000),
        "has 100000 bytes",
    ),
    "header cut": (
        lambda sd: cut(sd / "vae/diffusion_pytorch_model.safetensors", 50),
        "is not a safetensors file",
    ),
    "weights empty": (
        lambda sd: cut(sd / "text_encoder/model.safetensors", 0),
        "is not a safetensors file",
    ),
    "not safetensors": (
        lambda sd: (sd / "text_encoder/model.safetensors").write_bytes(b"PK\3\4" * 1000),
        "is not a safetensors file",
    ),
    "another variant": (
        lambda sd: (sd / "unet/diffusion_pytorch_model.safetensors").rename(
            sd / "unet/diffusion_pytorch_model.bf16.safetensors"
        ),
        r"but \.bf16\.safetensors",
    ),
    "pickle cut": (cut_pickle, "bin does not end as PyTorch ends such a file: it was cut"),
    "a refiner": (
        lambda sd: edit_json(
            sd / "model_index.json",
            _class_name="StableDiffusionXLImg2ImgPipeline",
            text_encoder=[None, None],
        ),
        "a refiner",
    ),
    "another VAE": (
        lambda sd: edit_json(sd / "vae/config.json", _class_name="AutoencoderTiny"),
        "AutoencoderTiny",
    ),
    "config missing": (lambda sd: (sd / "vae/config.json").unlink(), "vae/config.json is missing"),
    "part missing": (lambda sd: shutil.rmtree(sd / "unet"), "unet/config.json is missing"),
}


@pytest.mark.parametrize(("damage", "says"), SD_DAMAGES.values(), ids=SD_DAMAGES)
def test_a_damaged_diffusers_folder_is_refused_before_an_export(
    sd: Path, tmp_path: Path, log: Log, damage: Callable[[Path], Any], says: str
):
    """Missing, cut or foreign weights are found without starting the exporter."""
    damage(sd)
    with pytest.raises(ModelSourceError, match=says):
        resolve(sd, tmp_path / "cache", log)
    assert log == []


@pytest.mark.parametrize("model", ["no/such/folder", "./missing", "missing", "/missing/folder"])
def test_a_model_that_is_not_there(model: str, tmp_path: Path, log: Log):
    """A path to nothing is an error that lists what can be given."""
    with pytest.raises(ModelSourceError, match=r"no such folder or file.*hub id.*'demo'"):
        resolve(model, tmp_path, log)


def test_a_single_file_of_another_kind_is_refused(tmp_path: Path, log: Log):
    """A pickled checkpoint is not opened."""
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"\x80\x04")
    with pytest.raises(ModelSourceError, match=r"must be \.safetensors"):
        resolve(file, tmp_path, log)


def test_a_single_file_that_is_no_checkpoint_is_refused(tiny_sd: Path, tmp_path: Path, log: Log):
    """A file with the weights of one part only is told from a whole model."""
    file = shutil.copy(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors", tmp_path)
    with pytest.raises(ModelSourceError, match="no weights of a text encoder or a VAE"):
        resolve(file, tmp_path, log)


def test_a_cache_that_cannot_be_written_is_an_error_where_it_is_needed(
    ir: Path, tiny_sd: Path, tmp_path: Path, log: Log
):
    """A cache whose place is taken by a file is named where an export needs it, else told of."""
    (tmp_path / "cache").touch()
    with pytest.raises(ModelSourceError, match=r"with the cache in .*cache"):
        resolve(tiny_sd, tmp_path / "cache", log)
    assert resolve(ir, tmp_path / "cache", log).path == ir
    assert "cache.failed" in [entry["event"] for entry in log]


class Hub(ThreadingHTTPServer):
    """The part of the Hugging Face hub that a download needs, with one model on it."""

    daemon_threads = True

    def __init__(self, model: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubPage)
        self.model = model
        self.folder = folder
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubPage(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        model, commit = self.server.model, "c" * 40
        names = sorted(
            file.relative_to(self.server.folder).as_posix()
            for file in self.server.folder.rglob("*")
            if file.is_file()
        )
        if path.startswith(f"/api/models/{model}/tree/"):
            files = [{"type": "file", "path": name, "oid": name, "size": 1} for name in names]
            self.send(200, json.dumps(files).encode(), body=body)
        elif path.startswith(f"/api/models/{model}"):
            info = {"id": model, "sha": commit, "siblings": [{"rfilename": n} for n in names]}
            self.send(200, json.dumps(info).encode(), body=body)
        elif path.startswith(f"/{model}/resolve/"):
            name = path.split("/", 5)[5]
            content = (self.server.folder / name).read_bytes()
            self.server.fetched += [name] if body else []
            self.send(200, content, body=body, ETag=f'"{name}"', **{"X-Repo-Commit": commit})
        else:
            self.send(404, b"{}", body=body, **{"X-Error-Code": "RepoNotFound"})

    def send(self, status: int, content: bytes, *, body: bool, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep the test's output free of requests."""


@pytest.fixture
def tiny_hub(ir: Path) -> Iterator[Hub]:
    """A hub with the tiny model, and beside it what must not be downloaded."""
    (ir / "safety_checker").mkdir()
    (ir / "safety_checker" / "model.safetensors").write_bytes(b"unused")
    (ir / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (ir / "v1-5-pruned.ckpt").write_bytes(b"a pickle")
    server = Hub("someone/tiny", ir)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


RESOLVE = """
import json, sys
from pathlib import Path
from holdfast.engine.errors import ModelSourceError
from holdfast.engine.models.source import resolve
log = []
try:
    model = resolve(sys.argv[1], Path(sys.argv[2]), lambda event, **facts: log.append(event))
    print(json.dumps([model.fingerprint, log]))
except ModelSourceError as error:
    print(json.dumps([str(error), log]))
"""


def resolve_from(url: str, model: str, tmp_path: Path) -> tuple[str, list[str]]:
    """Resolve a hub id in a process of its own, which reads where the hub is when it starts."""
    done = subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, "-c", RESOLVE, model, str(tmp_path / "cache")],
        env={**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    text, events = json.loads(done.stdout)
    return text, events


def test_a_hub_model_is_downloaded_once(tiny_hub: Hub, tiny_ir: Path, tmp_path: Path, log: Log):
    """A hub id gives the model that is there; the second time the hub is not asked."""
    expected = resolve(tiny_ir, tmp_path / "cache", log).fingerprint
    fingerprint, events = resolve_from(tiny_hub.url, "someone/tiny", tmp_path)
    assert fingerprint == expected
    assert events == ["download.started", "download.completed", "model.resolved"]
    tiny_hub.fetched.clear()
    again = resolve_from(tiny_hub.url, "someone/tiny", tmp_path)
    assert again == (expected, ["model.resolved"])
    assert tiny_hub.fetched == []


def test_only_what_is_needed_is_downloaded(tiny_hub: Hub, tiny_ir: Path, tmp_path: Path):
    """Pickles and unused parts stay on the hub."""
    resolve_from(tiny_hub.url, "someone/tiny", tmp_path)
    assert {tiny_ir / name for name in tiny_hub.fetched} == {
        file for file in tiny_ir.rglob("*") if file.is_file()
    }


def test_an_interrupted_download_is_completed(tiny_hub: Hub, tmp_path: Path):
    """What lacks of a downloaded model is fetched."""
    fingerprint, _ = resolve_from(tiny_hub.url, "someone/tiny", tmp_path)
    for link in (tmp_path / "hf").rglob("unet/openvino_model.bin"):
        link.resolve().unlink()
        link.unlink()
    again, events = resolve_from(tiny_hub.url, "someone/tiny", tmp_path)
    assert again == fingerprint
    assert "download.completed" in events


def test_an_unknown_hub_id_is_an_error(tiny_hub: Hub, tmp_path: Path):
    """A model that the hub does not have is named, with what to do."""
    text, events = resolve_from(tiny_hub.url, "someone/else", tmp_path)
    assert "someone/else" in text
    assert "there is no such model, or it is private. Check the name" in text
    assert events == ["download.started", "download.failed"]


def test_offline_is_an_error_that_says_so(tmp_path: Path):
    """Without a network and without an earlier download the error says what to do."""
    text, events = resolve_from("http://127.0.0.1:9", "someone/tiny", tmp_path)
    assert "could not be reached" in text
    assert "download the model elsewhere (`hf download`) and give its folder" in text
    assert events == ["download.started", "download.failed"]


@pytest.mark.parametrize(
    ("weights", "chosen"),
    [
        (["unet/diffusion_pytorch_model.safetensors"], 1),
        (["unet/diffusion_pytorch_model.fp16.safetensors"], 1),
        (["v1.safetensors", "v1.ckpt"], 0),
        (
            [
                "unet/diffusion_pytorch_model.safetensors",
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "unet/diffusion_pytorch_model.non_ema.safetensors",
                "safety_checker/model.safetensors",
            ],
            1,
        ),
        ([f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)], 2),
        ([f"unet/model{v}-0000{i}-of-00002.safetensors" for v in ("", ".fp16") for i in (1, 2)], 2),
    ],
)
def test_which_weights_are_needed(weights: list[str], chosen: int):
    """Safetensors without a suffix come first, float16 stands in, pickles are never taken."""
    texts = ["model_index.json", "unet/config.json", "tokenizer/merges.txt"]
    assert hub.needed([*texts, "README.md", *weights]) == [*texts, *weights[:chosen]]


def test_each_part_is_chosen_by_itself():
    """One part that is there in float16 alone is taken so, and the others as they are."""
    files = [
        "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.safetensors",
    ]  # fmt: skip
    unneeded = "vae/diffusion_pytorch_model.fp16.safetensors"
    assert sorted(hub.needed(files)) == sorted(set(files) - {unneeded})


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (["diffusion_pytorch_model.bin"], r"unet on the hub.*but \.bin"),
        (["diffusion_pytorch_model.bf16.safetensors"], r"but \.bf16\.safetensors"),
        (["diffusion_pytorch_model-00001-of-00003.safetensors"], "1 of the 3 shards"),
    ],
)
def test_weights_that_are_not_taken_are_told(weights: list[str], says: str):
    """Pickles, other variants and single shards are named, and nothing is downloaded for them."""
    texts = ["model_index.json", "unet/config.json"]
    with pytest.raises(ModelSourceError, match=says):
        hub.needed([*texts, *(f"unet/{name}" for name in weights)])


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_a_link_is_used_under_its_own_name(tiny_ir: Path, tmp_path: Path, log: Log, name: str):
    """What the hub's cache links to has no ending; the link is what was given."""
    link = tmp_path / name
    if name == "folder":
        link.symlink_to(tiny_ir)
        assert resolve(link, tmp_path / "cache", log).path == link
        return
    (tmp_path / "blob").write_bytes(b"?" * 100)
    link.symlink_to(tmp_path / "blob")
    with pytest.raises(ModelSourceError, match=r"model\.safetensors is not a safetensors file"):
        resolve(link, tmp_path / "cache", log)


def test_a_model_folder_is_a_value(tiny_ir: Path, tmp_path: Path, log: Log):
    """Two resolutions of one model are equal, and a field cannot be assigned."""
    one, other = (resolve(tiny_ir, tmp_path, log) for _ in range(2))
    assert isinstance(one, ModelFolder)
    assert one == other
    with pytest.raises(AttributeError):
        one.fingerprint = "other"  # type: ignore[misc] # what the test is about
