from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import holdfast.engine
from holdfast.engine import (
    EngineConfig,
    GenerationError,
    Hires,
    InvalidRequest,
    Lora,
    Txt2Img,
)
from holdfast.engine.cli import app, main, options
from holdfast.engine.cli.bar import wait
from holdfast.engine.cli.words import in_options
from holdfast.engine.jobs.job import Job
from holdfast.engine.logbook.auditing import audit
from holdfast.engine.logbook.reading import log_lines, read
from holdfast.engine.results.saving import read_private
from holdfast.states import mermaid

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from holdfast.engine import Engine

HEAVY = {"torch", "diffusers", "transformers", "optimum", "openvino"}
LIGHT = f"""
import sys
from holdfast.engine.cli import main
code = main(sys.argv[1:])
heavy = {HEAVY} & set(sys.modules)
sys.exit(f"loaded {{heavy}}" if heavy else code)
"""
COMMAND = "import sys; from holdfast.engine.cli import main; sys.exit(main())"
PATIENCE = 300.0

Ran = tuple[int, str, str]


@pytest.fixture
def holdfast_command(
    tiny_ir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Ran]:
    """Run a command in a folder of its own, with the tiny model; give its code, output, errors."""
    monkeypatch.chdir(tmp_path)
    settings = ("--model", str(tiny_ir), "--cache-dir", str(tmp_path / "cache"))

    def run(*arguments: str, model: bool = True) -> Ran:
        code = main([*arguments, *settings] if model else arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def python(program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - this interpreter, programs of this file
        [sys.executable, "-c", program, *arguments],
        text=True,
        check=False,
        timeout=PATIENCE,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def test_importing_the_engine_loads_nothing_heavy():
    """`import holdfast.engine` loads none of torch, diffusers, transformers, optimum, openvino."""
    done = python(f"import sys, holdfast.engine; assert not {HEAVY} & set(sys.modules)")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["generate", "--help"], 0),
        (["chart"], 0),
        (["generate", "x", "--frobnicate"], 2),
        (["generate", "x", "--steps", "0"], 2),
        (["generate", "x", "-o", "no/such/folder.png"], 2),
    ],
)
def test_help_and_bad_input_load_nothing_heavy(arguments: Sequence[str], code: int):
    """Help, the chart, and what is refused before a model is needed come without a heavy import."""
    done = python(LIGHT, *arguments)
    assert done.returncode == code, done.stderr


def test_without_typer_it_says_how_to_install_it():
    """Where the extra is missing, the command names it in two lines and ends with 1."""
    hide = "import sys; sys.modules['typer'] = None\n"
    done = python(f"{hide}from holdfast.engine.cli import main; sys.exit(main(['chart']))")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "holdfast: the command line needs typer, which is not installed.",
        "Install it with: pip install 'holdfast[cli]'",
    ]


def test_every_field_is_an_option_with_a_help():
    """Each field of each request and setting is an option of generate and plan, and explained."""
    commands = typer.main.get_command(app.app).commands
    fields = {name for kind in options.REQUESTS for name in kind.model_fields} - options.NOT_OPTIONS
    fields |= set(EngineConfig.model_fields) - options.FOR_HOSTS
    for command in (commands["generate"], commands["plan"]):
        parameters = {each.name: each for each in command.params}
        assert fields <= parameters.keys()
        assert all(parameters[name].help for name in fields)


def given(**texts: Any) -> dict[str, Any]:
    return texts


@pytest.mark.parametrize(
    ("texts", "hires", "request_"),
    [
        (given(), False, Txt2Img(prompt="p")),
        (given(steps="3", guidance="1.5", width="64"), False,
         Txt2Img(prompt="p", steps=3, guidance=1.5, width=64)),
        (given(scheduler="Euler_A", seed="5", batch="2", negative_prompt="n"), False,
         Txt2Img(prompt="p", scheduler="euler-a", seed=5, batch=2, negative_prompt="n")),
        (given(scale="1.5", strength="0.4", upscaler="latent", hires_steps="7"), True,
         Hires(prompt="p", scale=1.5, strength=0.4, upscaler="latent", hires_steps=7)),
        (given(hires_lora=["a.safetensors:0.5", "b.safetensors"]), True,
         Hires(prompt="p", hires_lora=(Lora("a.safetensors", 0.5), Lora("b.safetensors")))),
        (given(lora=["style.safetensors:-0.5", "C:\\ink.safetensors"]), False,
         Txt2Img(prompt="p", lora=(Lora("style.safetensors", -0.5), Lora("C:\\ink.safetensors")))),
        (given(hires_lora=["none"]), True, Hires(prompt="p", hires_lora=())),
    ],
)  # fmt: skip
def test_options_make_the_request(texts: dict[str, Any], hires: bool, request_: Txt2Img | Hires):  # noqa: FBT001 - a column of the table
    """The options' texts give the very request that their values give in Python."""
    assert options.read_request("p", texts, hires=hires) == request_


def test_options_make_the_settings(tmp_path: Path):
    """Devices for components, properties and sizes are read as a host means."""
    config = options.read_config(
        given(
            device=["unet=GPU", "vae_decoder=CPU"],
            properties=["INFERENCE_NUM_THREADS=4"],
            memory_budget="8GiB",
            strict=False,
            log_file=str(tmp_path / "run.jsonl"),
        )
    )
    assert config.device == {"unet": "GPU", "vae_decoder": "CPU"}
    assert config.properties == {"INFERENCE_NUM_THREADS": "4"}
    assert (config.memory_budget, config.strict) == (8 * 2**30, False)
    assert options.read_config(given(device=["AUTO:CPU"])).device == "AUTO:CPU"


def test_a_hires_image_in_two_passes(holdfast_command: Callable[..., Ran], tmp_path: Path):
    """Generate --hires leaves both passes and a log that passes the audit, and tells the seed."""
    code, out, err = holdfast_command(
        "generate", "a red circle", "--hires", "--steps", "3", "--scale", "2", "--seed", "7",
        "--hires-steps", "2", "--first-pass", "first.png", "--log", "run.jsonl",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out == "first.png: first pass, 64x64\nout.png: 128x128, seed 7\n"
    image = Image.open(tmp_path / "out.png")
    assert (image.size, size_of(tmp_path / "first.png")) == ((128, 128), (64, 64))
    private = read_private(image)
    assert private is not None
    assert private["request"]["scale"] == 2
    verdict = audit(read(log_lines("run.jsonl")))
    assert verdict.clean
    assert verdict.complete


def test_the_command_makes_what_the_engine_makes(
    holdfast_command: Callable[..., Ran], tiny_ir: Path, tmp_path: Path
):
    """An image of the command equals, to the bit, that of the same request in Python."""
    assert holdfast_command("generate", "a dog", "--steps", "2", "--seed", "3")[0] == 0
    with holdfast.engine.Engine(tiny_ir, cache_dir=tmp_path / "cache") as engine:
        image = engine.run(Txt2Img(prompt="a dog", steps=2, seed=3)).images[0]
    assert Image.open("out.png").tobytes() == image.tobytes()


def test_an_image_from_an_image(holdfast_command: Callable[..., Ran], tmp_path: Path):
    """With --image it is img2img, and a batch is written to numbered files."""
    Image.new("RGB", (80, 64), "red").save(tmp_path / "in.png")
    code, out, _ = holdfast_command(
        "generate", "", "--image", "in.png", "--steps", "2", "--batch", "2", "--seed", "1"
    )
    assert (code, out) == (0, "out.png: 80x64, seed 1\nout-2.png: 80x64, seed 2\n")
    assert read_private(Image.open("out-2.png"))["request"]["kind"] == "img2img"


def test_a_word_without_its_meaning_is_told(holdfast_command: Callable[..., Ran]):
    """Under --no-strict the embedding of which there is no file is named on standard error."""
    words = "a circle, embedding:nowhere"
    assert holdfast_command("generate", words, "--steps", "1")[0] == 2
    code, out, err = holdfast_command("generate", words, "--steps", "1", "--no-strict")
    assert (code, out.partition(":")[0]) == (0, "out.png")
    assert err.startswith("holdfast: embedding_unknown: embedding:nowhere was asked for, read as")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate"], "Give a prompt in quotes ('' for none), or --prompts FILE"),
        (["generate", "a", "red", "circle"], 'several words needs quotes: "a red circle"'),
        (["plan", "a", "red", "circle"], 'needs quotes: "a red circle"'),
        (["generate", "x", "--frobnicate"], "No such option"),
        (["generate", "x", "--steps", "many"], "--steps: Input should be a valid integer"),
        (["generate", "x", "--guidance", "nan"], "--guidance: Input should be a finite number"),
        (["generate", "x", "--scheduler", "fast"], "unknown scheduler; choose one of euler"),
        (["generate", "x", "--scale", "2"], "--scale belongs to --hires: add that"),
        (["generate", "x", "--strength", "1"], "--strength belongs to --hires or --image"),
        (["generate", "x", "--first-pass", "a.png"], "--first-pass belongs to --hires"),
        (["generate", "x", "--hires", "--mask", "a.png"], "leave out either it or what is about"),
        (["generate", "x", "--image", "nowhere.png"], "there is no such image file"),
        (["generate", "x", "--hires", "--scale", "2", "--hires-width", "64"], "not both"),
        (["generate", "x", "-o", "nowhere/out.png"], "there is no folder nowhere: make it"),
        (["generate", "x", "-o", "out.gif"], "none of .png, .jpg"),
        (["generate", "x", "-o", "{number}.png"], "it may hold {n} and {seed}"),
        (["generate", "x", "-o", "-", "--batch", "2"], "2 images cannot go to standard output"),
        (["generate", "x", "-o", "-", "--json"], "cannot both go to standard output"),
        (["generate", "x", "-o", "."], "none of .png, .jpg"),
        (["generate", "x", "--metadata", "some"], "one of full, public, none, not 'some'"),
        (["generate", "x", "--prompts", "p.txt"], "A prompt and --prompts were given"),
        (["generate", "--prompts", "nowhere.txt"], "The prompts were to come from nowhere.txt"),
        (["generate", "<lora:nowhere:1>"], "nowhere"),
        (["generate", "x", "--property", "threads"], "NAME=VALUE is needed, not 'threads'"),
        (["generate", "x", "--memory-budget", "much"], "a size such as '8GiB'"),
        (["generate", "x", "--memory-budget", "4"], "is too little: did you mean '4GiB'?"),
        (["generate", "x", "--model", "nowhere"], "there is no such folder or file"),
        (["plan", "x", "--lora", "nowhere.safetensors"], "nowhere.safetensors"),
        (["plan", "x", "--device", "NPU"], "OpenVINO sees no NPU here"),
        (["plan", "x", "--width", "65"], "the nearest sizes are 64x64 or 80x64"),
        (["export", "nowhere"], "there is no such folder or file"),
        (["fly"], "No such command 'fly'"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_2_and_a_line_of_words(
    holdfast_command: Callable[..., Ran], arguments: Sequence[str], words: str
):
    """What cannot be had is said in one or two lines on standard error, and the code is 2."""
    model = arguments[0] in ("generate", "plan") and "--model" not in arguments
    code, out, err = holdfast_command(*arguments, model=model)
    assert (code, out) == (2, "")
    assert words in err
    assert 1 <= len(err.splitlines()) <= 2
    assert all(line.startswith("holdfast: ") for line in err.splitlines())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Hires cannot be made as asked: steps: x; hires_seed: x", "--steps: x; --hires-seed: x"),
        ("Hires cannot be made as asked: Hires: give hires_width/hires_height",
         "give --hires-width/--hires-height"),
        ("line 3: Hires cannot be made as asked: steps: no", "line 3: --steps: no"),
        ("shorten it, or set strict=False.", "shorten it, or set --no-strict."),
        ("use `precision='f32'` or precision=f32", "use --precision f32 or --precision f32"),
        ("set log_prompts=True or vae=None", "set --log-prompts or no --vae"),
        ("give the engine another cache_dir", "give the engine another --cache-dir"),
        ("in /me/cache_dir/x, at hires_width.png", "in /me/cache_dir/x, at hires_width.png"),
        ("text_encoder, width and 3=4", "text_encoder, width and 3=4"),
    ],
)  # fmt: skip
def test_errors_speak_of_options(text: str, said: str):
    """Fields and their values become options; files, components and plain words stay."""
    assert in_options(text) == said


def test_many_prompts_are_drawn_by_one_engine(holdfast_command: Callable[..., Ran], tmp_path: Path):
    """A CSV of prompts with options: one engine, named files, and one that fails stops no other."""
    rows = ["Prompt,seed,negative-prompt,width", '"a, b",5,,', "c,6,blurred,65", "d,7,,"]
    (tmp_path / "many.csv").write_text("\n".join(rows), encoding="utf-8")
    code, out, err = holdfast_command(
        "generate", "--prompts", "many.csv", "-o", "{n:03}-{seed}.png", "--steps", "1", "--json",
        "--log", "run.jsonl",
    )  # fmt: skip
    assert code == 1
    assert err.startswith("holdfast: line 3 of many.csv: ")
    told = [json.loads(line) for line in out.splitlines()]
    assert [each["file"] for each in told] == ["001-5.png", "002-7.png"]
    assert told[0] == {"file": "001-5.png", "width": 64, "height": 64, "seed": 5}
    assert read_private(Image.open("001-5.png"))["request"]["prompt"] == "a, b"
    assert (tmp_path / "run.jsonl").read_text().count("engine.opened") == 1


def test_prompts_come_from_standard_input(
    holdfast_command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
):
    """Each line of standard input is a prompt, with the options of the command line."""
    monkeypatch.setattr("sys.stdin", io.StringIO("a dog, sitting\n\na cat\n"))
    code, out, _ = holdfast_command("generate", "--prompts", "-", "--steps", "1", "--seed", "4")
    assert (code, out) == (0, "out.png: 64x64, seed 4\nout-2.png: 64x64, seed 4\n")
    assert Image.open("out-2.png").text["parameters"].startswith("a cat\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n \n", "holds no prompt"),
        ("prompt,sed\nx,5", "has a column 'sed', which is no option"),
        ("prompt,seed\nx,5\ny,-1", "line 3 of many.csv: --seed: Input should be greater than"),
        ("prompt,seed\na, b,5", "more cells than columns: put a text with a comma in quotes"),
    ],
)
def test_a_bad_file_of_prompts_runs_nothing(
    holdfast_command: Callable[..., Ran], tmp_path: Path, text: str, words: str
):
    """Every line is checked before the first is drawn; the error names the line."""
    (tmp_path / "many.csv").write_text(text)
    code, out, err = holdfast_command("generate", "--prompts", "many.csv", "--log", "run.jsonl")
    assert (code, out) == (2, "")
    assert words in err
    assert not (tmp_path / "run.jsonl").exists()


def test_nothing_is_overwritten_unasked(holdfast_command: Callable[..., Ran], tmp_path: Path):
    """A named file that is there is refused before the run; out.png becomes out-2.png."""
    for name in ("out.png", "mine.png"):
        (tmp_path / name).write_text("precious")
    code, _, err = holdfast_command("generate", "x", "-o", "mine.png", "--log", "run.jsonl")
    assert (code, err) == (
        2, "holdfast: mine.png is there already: add --force to replace it, or name another file.\n"
    )  # fmt: skip
    assert not (tmp_path / "run.jsonl").exists()
    assert holdfast_command("generate", "x", "--steps", "1", "--seed", "1")[1].startswith("out-2.")
    assert {(tmp_path / name).read_text() for name in ("out.png", "mine.png")} == {"precious"}
    assert holdfast_command("generate", "x", "--steps", "1", "-o", "mine.png", "--force")[0] == 0
    assert size_of(tmp_path / "mine.png") == (64, 64)


def test_an_image_that_cannot_be_saved_is_kept(
    holdfast_command: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where the folder goes away during the run the image is put elsewhere; the error says so."""
    folder = tmp_path / "gone"
    folder.mkdir()
    drawn = app.wait

    def draw_and_lose(*arguments: Any) -> Any:
        result = drawn(*arguments)
        folder.rmdir()
        return result

    monkeypatch.setattr(app, "wait", draw_and_lose)
    code, _, err = holdfast_command("generate", "x", "--steps", "1", "-o", "gone/a.png")
    assert code == 2
    kept = Path(err.strip().rpartition("It is at ")[2].removesuffix("."))
    assert size_of(kept) == (64, 64)


def test_an_image_is_made_again_from_its_file(
    holdfast_command: Callable[..., Ran], ink: Path
) -> None:
    """
    Pixel for pixel, LoRAs found by name; or another, with options changed. What came from another
    model or another program is told.
    """
    drawn = ("--width", "64", "--height", "64", "--steps", "2", "--seed", "5")
    lora = ("--lora", f"{ink}:0.8")
    assert holdfast_command("generate", "a (red:1.2) dot", *drawn, *lora, "-o", "a.png")[0] == 0
    folder = ("--lora-dir", str(ink.parent))
    assert holdfast_command("again", "a.png", *folder, "-o", "b.png") == (
        0, "b.png: 64x64, seed 5\n", ""
    )  # fmt: skip
    assert holdfast_command("again", "a.png", *folder, "--seed", "6", "-o", "c.png")[0] == 0
    first, same, other = (Image.open(f"{name}.png") for name in "abc")
    assert first.tobytes() == same.tobytes() != other.tobytes()
    assert read_private(first) == read_private(same)

    told = PngInfo()
    told.add_text("parameters", A1111)
    Image.new("RGB", (64, 64)).save("d.png", pnginfo=told)
    code, said, errors = holdfast_command("again", "d.png", "-o", "e.png")
    assert (code, said) == (0, "e.png: 64x64, seed 7\n")
    assert errors.splitlines() == [
        "holdfast: A1111's Model: v1-5 (it is the engine's to have)",
        "holdfast: A1111's RNG: GPU (the same seed gives other noise here)",
    ]
    assert Image.open("e.png").text["parameters"].startswith(A1111.partition(", Model")[0])

    elsewhere = Image.open("a.png").text["holdfast"].replace('fingerprint": "', 'fingerprint": "0')
    told = PngInfo()
    told.add_text("holdfast", elsewhere)
    first.save("f.png", pnginfo=told)
    code, _, errors = holdfast_command("again", "f.png", *folder, "-o", "g.png")
    assert (code, errors) == (
        0, "holdfast: the image was made with another model; name it with --model\n"
    )  # fmt: skip


A1111 = (
    "a dot\nNegative prompt: blurry\nSteps: 2, Sampler: Euler a, CFG scale: 6.5, Seed: 7, "
    "Size: 64x64, Model: v1-5"
)


def test_an_image_to_standard_output(
    holdfast_command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
):
    """With `-o -` standard output is the PNG and nothing else; what is told goes to the other."""
    screen = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr("sys.stdout", screen)
    code, _, err = holdfast_command("generate", "x", "--steps", "1", "--seed", "2", "-o", "-")
    assert (code, err) == (0, "standard output: 64x64, seed 2\n")
    assert Image.open(io.BytesIO(screen.buffer.getvalue())).text["parameters"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "command", ["", "generate", "plan", "serve", "export", "chart", "doctor", "demo", "bundle"]
)
def test_help_fits_eighty_columns(
    holdfast_command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, command: str
):
    """The help of each command is whole at 80 columns: no line is longer, none cut short."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = holdfast_command(*command.split(), "--help", model=False)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "..." not in out.replace("[ARGS]...", "")
    assert "…" not in out
    assert " / --no-strict" not in out


def test_it_runs_without_docstrings():
    """Under PYTHONOPTIMIZE=2, where Python drops docstrings, the commands are there."""
    done = python(COMMAND, "generate", "--help", env={**os.environ, "PYTHONOPTIMIZE": "2"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "--hires-steps" in done.stdout


def test_nothing_reaches_the_terminal_raw(holdfast_command: Callable[..., Ran]):
    """An escape sequence in an argument is spelled out in the error that quotes it."""
    _, _, err = holdfast_command("plan", "x", "--model", "\x1b[2Jno", model=False)
    assert "\x1b" not in err
    assert "\\u001b[2Jno was given as the model" in err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Let every job end with an error."""

    def fail_with(error: Exception) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(app, "wait", fail)

    return fail_with


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (GenerationError("the pass failed"), 1, "holdfast: the pass failed\n"),
        (InvalidRequest("no"), 2, "holdfast: no\n"),
        (OSError("disk full"), 1, "holdfast: disk full\n"),
        (KeyError("x"), 1, "holdfast: KeyError('x'); --debug shows where this comes from\n"),
    ],
)
def test_a_failure_ends_with_1_and_a_line_of_words(
    holdfast_command: Callable[..., Ran],
    failing: Callable[[Exception], None],
    error: Exception,
    code: int,
    words: str,
):
    """What failed is said in a line, without a traceback; with --debug there is one."""
    failing(error)
    assert holdfast_command("generate", "x") == (code, "", words)
    shown = holdfast_command("generate", "x", "--debug")
    assert shown[0] == code
    assert shown[2].startswith("Traceback (most recent call last):")
    assert shown[2].endswith(words)


HEEDFUL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
"""Shells have commands that they run in the background ignore an interrupt."""


def test_an_interrupt_keeps_the_first_pass(tiny_ir: Path, tmp_path: Path):
    """Ctrl-C amid pass two: the run is cancelled, --first-pass is written, the code is 130."""
    log = tmp_path / "run.jsonl"
    process = subprocess.Popen(  # noqa: S603 - this interpreter
        [
            sys.executable, "-c", HEEDFUL + COMMAND, "generate", "x", "--hires", "--steps", "2",
            "--hires-steps", "500", "--first-pass", "first.png", "--log", str(log),
            "--model", str(tiny_ir), "--cache-dir", str(tmp_path / "cache"),
        ],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(log, '"event":"pass.started"', times=2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert (err, process.returncode) == ("holdfast: interrupted\n", 130)
    assert out == "first.png: first pass, 64x64\n"
    assert size_of(tmp_path / "first.png") == (64, 64)
    assert not (tmp_path / "out.png").exists()
    assert "request.cancelled" in log.read_text()


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def wait_for(log: Path, words: str, *, times: int) -> None:
    until = time.monotonic() + PATIENCE
    while not log.exists() or log.read_text().count(words) < times:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_bar_shows_the_passes_and_their_steps(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
):
    """On a terminal standard error shows, in order, the search, both passes and their steps."""
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    words = {phase: f"{phase}, step" for phase in ("pass 1", "pass 2")}
    words = {"find model": "finding the model", **words}
    advance = Job.advance

    def advance_and_wait(job: Job[Any], phase: str, **facts: Any) -> None:
        """Hold the job until the screen shows what it does."""
        advance(job, phase, **facts)
        until = time.monotonic() + PATIENCE
        while phase == "find model" or facts.get("step"):
            if words[phase] in screen.getvalue() or time.monotonic() > until:
                break
            time.sleep(0.02)

    monkeypatch.setattr(Job, "advance", advance_and_wait)
    engine = open_engine()
    wait(engine, engine.submit(Hires(prompt="x", steps=2, hires_steps=2)))
    places = [screen.getvalue().find(each) for each in words.values()]
    assert -1 not in places
    assert places == sorted(places)


def test_no_bar_is_shown_but_on_a_terminal(holdfast_command: Callable[..., Ran]):
    """Where standard error is a file or a pipe nothing is written to it."""
    assert holdfast_command("generate", "x", "--hires", "--steps", "2")[2] == ""


def test_a_plan_makes_nothing(holdfast_command: Callable[..., Ran], tmp_path: Path):
    """Plan prints each step with its reason, and makes neither an image nor a compiled model."""
    code, out, err = holdfast_command("plan", "x", "--hires", "--log", "run.jsonl")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    steps = [(line[0], line[1]) for line in lines]
    assert steps[-2] == ("switch", "img2img")
    assert ("compile", "vae_encoder") in steps
    assert out.splitlines()[-1].endswith(": fits")
    assert lines[-1][:2] == ["in", "all"]
    told = json.loads(holdfast_command("plan", "x", "--hires", "--json")[1])
    assert [(step["action"], step["subject"]) for step in told["steps"]] == steps[:-1]
    assert told["fits"] is True
    assert "component.compile" not in (tmp_path / "run.jsonl").read_text()
    assert not (tmp_path / "out.png").exists()


def test_an_export_lands_in_a_new_folder(
    holdfast_command: Callable[..., Ran], tiny_sd: Path, tiny_cache: Path, tmp_path: Path
):
    """Export prints where the model lies; a folder that is there already is left alone."""
    asked = ("export", str(tiny_sd), "--cache-dir", str(tiny_cache))
    code, out, _ = holdfast_command(*asked, model=False)
    assert code == 0
    assert out.strip().startswith(str(tiny_cache))
    assert holdfast_command(*asked, "ir", model=False) == (0, "ir\n", "")
    assert (tmp_path / "ir" / "unet" / "openvino_model.xml").is_file()
    code, _, err = holdfast_command(*asked, "ir", model=False)
    assert (code, err.startswith("holdfast: The model was to go to ir")) == (2, True)


def test_chart_prints_the_chart(holdfast_command: Callable[..., Ran]):
    """Chart prints the Mermaid text of the machine that runs."""
    assert holdfast_command("chart", model=False) == (0, mermaid(), "")


def test_log_and_bundle_are_commands(holdfast_command: Callable[..., Ran], tmp_path: Path):
    """The logbook's commands and the bundle are reached through the one command."""
    assert holdfast_command("generate", "x", "--steps", "1", "--log", "run.jsonl")[0] == 0
    assert holdfast_command("log", "audit", "run.jsonl", model=False)[0] == 0
    assert holdfast_command("log", "audit", "nowhere.jsonl", model=False)[0] == 2
    assert holdfast_command("bundle", "run.jsonl", "-o", "report.zip", model=False)[0] == 0
    assert (tmp_path / "report.zip").is_file()


def test_without_arguments_it_helps(holdfast_command: Callable[..., Ran]):
    """The bare command and a bare group print their help and end with 0."""
    for arguments in ((), ("log",)):
        code, out, err = holdfast_command(*arguments, model=False)
        assert (code, err) == (0, "")
        assert "Usage: holdfast" in out


def test_a_reader_that_leaves_is_no_error():
    """Piped into a program that closes early, the command ends without a word."""
    ends = os.pipe()
    os.close(ends[0])
    with os.fdopen(ends[1], "w") as closed:
        done = python(COMMAND, "chart", stdout=closed, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "")


def test_doctor_prints_for_people_and_machines(
    holdfast_command: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Doctor names the device and its precision, a cure to copy line by line; or all as JSON."""
    folder = ("--cache-dir", str(tmp_path))
    code, out, err = holdfast_command("doctor", *folder, model=False)
    assert (code, err) == (0, "")
    assert "device CPU" in out
    assert "Holdfast can work here." in out
    monkeypatch.setattr("torch.version.cuda", "13.0")
    _, out, _ = holdfast_command("doctor", *folder, model=False)
    cure = "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu"
    assert cure in out.splitlines()
    code, out, _ = holdfast_command("doctor", "--json", *folder, model=False)
    assert code == 0
    assert "CPU" in [each["name"] for each in json.loads(out)["devices"]]
