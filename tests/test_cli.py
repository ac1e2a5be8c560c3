"""The ``fastconfig`` command: its arguments, its errors, a whole short demo, Ctrl-C."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastconfig as fc
from fastconfig import cli
from fastconfig.methods.catalogue import CATALOGUE

DEMO = ["demo", "burgers"]


def needs_extra():
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")


def refused(capsys, arguments):
    """The last line on stderr of a command that must end with 2."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("--steps", "0", "at least 1"),
        ("--steps", "-3", "at least 1"),
        ("--steps", "2.5", "whole number"),
        ("--method", "sgd", "fastconfig methods"),
        ("--method", "pcgard", "'pcgrad'"),
        ("--seconds", "0", "above 0"),
        ("--seconds", "-1", "above 0"),
        ("--seconds", "nan", "finite"),
        ("--seconds", "inf", "--steps"),
        ("--seconds", "soon", "number of seconds"),
        ("--seed", "-1", "2^63 - 1"),
        ("--seed", str(2**63), "2^63 - 1"),
        ("--device", "gpu9", "available: cpu"),
        ("--device", "meta", "available: cpu"),
        ("--out", "picture.jpg", "ending in .png"),
        ("--out", "no/such/place.png", "make it first"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value_and_a_remedy(capsys, option, value, remedy):
    message = refused(capsys, [*DEMO, f"{option}={value}"])
    assert f"argument {option}:" in message
    assert value in message
    assert remedy in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(capsys):
    message = refused(capsys, [*DEMO, "--device", "cuda"])
    assert "'cuda'" in message
    assert "available: cpu" in message


def test_a_directory_that_cannot_be_written_is_refused_before_training(capsys, monkeypatch, tmp_path):
    def deny(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cli.tempfile, "TemporaryFile", deny)
    message = refused(capsys, [*DEMO, "--out", str(tmp_path)])
    assert "Permission denied" in message
    assert str(tmp_path) in message


def test_a_directory_in_the_pictures_place_is_refused(capsys, tmp_path):
    (tmp_path / "burgers.png").mkdir()
    assert "is a directory" in refused(capsys, [*DEMO, "--out", str(tmp_path)])


@pytest.mark.parametrize("arguments", [[], ["demo"], ["nonsense"], ["demo", "nonsense"]])
def test_a_missing_or_unknown_command_is_refused(capsys, arguments):
    assert "error" in refused(capsys, arguments)


@pytest.mark.parametrize("name", ["ConFIG", "pcgrad", "NASHMTL"])
def test_a_method_is_named_in_letters_of_either_case(name):
    arguments = cli._parsers()[0].parse_args(["demo", "burgers", "--method", name])
    assert arguments.method == name.lower()


def test_methods_lists_every_method_with_its_source(capsys):
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CATALOGUE)
    for line, entry in zip(lines, CATALOGUE.values(), strict=True):
        assert entry.rule in line
        assert line.endswith(entry.source)
    exported = {name.lower() for name in fc.__all__ if isinstance(getattr(fc, name), type)}
    assert set(CATALOGUE) <= exported


def test_doctor_shows_the_configuration(monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "show_config", lambda: calls.append(1))
    assert cli.main(["doctor"]) == 0
    assert calls == [1]


@pytest.fixture
def run(tmp_path):
    """What a monitor wrote in some steps."""
    model = torch.nn.Linear(3, 3)
    buf = fc.GradientBuffer(model, ["pde", "boundary", "initial"])
    with fc.ConflictMonitor(buf, csv=tmp_path / "run.csv") as monitor:
        for step in range(5):
            buf.backward(list(model(torch.full((3,), 1.0 + step)).square()))
            monitor.record(buf.combine())
    return tmp_path / "run.csv"


@pytest.mark.parametrize(
    ("options", "picture"),
    [([], "run.png"), (["-o", "other.svg"], "other.svg"), (["--out", "other.png"], "other.png")],
)
def test_plot_draws_a_file(capsys, monkeypatch, run, options, picture):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(run.parent)
    assert cli.main(["plot", "run.csv", *options]) == 0
    assert capsys.readouterr().out == f"Picture: {picture}\n"
    assert (run.parent / picture).stat().st_size > 1000


def test_plot_says_what_is_wrong_with_a_file(capsys, run):
    pytest.importorskip("matplotlib")
    header = run.read_text().splitlines(keepends=True)[0]
    cases = [
        ("missing.csv", None, [], "No such file"),
        ("other.csv", "a,b\n1,2\n", [], "no CSV file of a ConflictMonitor"),
        ("empty.csv", header, [], "no record yet"),
        ("run.csv", None, ["-o", "run.jpg"], "end in .png, .svg, .pdf, got 'run.jpg'"),
        ("run.csv", None, ["-o", str(run.parent / "no" / "run.png")], "No such file"),
    ]
    for name, content, options, message in cases:
        if content is not None:
            (run.parent / name).write_text(content)
        assert cli.main(["plot", str(run.parent / name), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fastconfig plot: error: ")
        assert message in line
    assert not list(run.parent.glob("*.png"))


def test_plot_without_matplotlib_names_the_extra(capsys, monkeypatch, run):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["plot", str(run)]) == 2
    assert "matplotlib not installed; run: pip install matplotlib" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_traceback():
    command = f"{sys.executable} -m fastconfig doctor | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(cli.__file__).parents[1])
    assert ended.returncode == 141
    assert ended.stderr == ""


@pytest.mark.parametrize("package", ["matplotlib", "rich"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(capsys, monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main([*DEMO, "--steps", "1", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert package in line
    assert "pip install matplotlib rich" in line
    assert not list(tmp_path.iterdir())


def test_a_short_demo_prints_the_table_and_writes_the_picture(capsys, tmp_path):
    needs_extra()
    before = signal.getsignal(signal.SIGINT)
    assert cli.main([*DEMO, "--steps", "5", "--seed", "3", "--out", str(tmp_path)]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    output = capsys.readouterr().out
    for words in ("Adam", "ConFIG", "M-ConFIG", "test MSE", "steps", "seconds", "steps/s", "outside backward"):
        assert words in output
    assert f"Picture: {tmp_path / 'burgers.png'}" in output
    assert output.count("\n") < 20, "a few plain lines where there is no terminal"
    assert "\x1b" not in output
    assert (tmp_path / "burgers.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_before_the_first_step_it_still_reports(capsys, monkeypatch, tmp_path):
    needs_extra()
    from fastconfig.demos import burgers_problem

    make = burgers_problem.ExactGrid
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(
        burgers_problem, "ExactGrid", lambda device: (signal.raise_signal(signal.SIGINT), make(device))[1]
    )
    try:
        assert cli.main([*DEMO, "--seconds", "60", "--out", str(tmp_path / "early.png")]) == 130
    finally:
        signal.signal(signal.SIGINT, previous)
    assert capsys.readouterr().out.count("not run") == 3
    assert (tmp_path / "early.png").exists()


def test_a_second_interrupt_leaves_at_once(monkeypatch, tmp_path):
    needs_extra()
    from fastconfig.demos import burgers_figure

    def interrupted_again(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one must raise")

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(burgers_figure, "save_figure", interrupted_again)
    try:
        assert cli.main([*DEMO, "--steps", "1", "--out", str(tmp_path)]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_in_the_end_is_an_error(capsys, monkeypatch, tmp_path):
    needs_extra()
    from fastconfig.demos import burgers_figure

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(burgers_figure, "save_figure", disk_full)
    assert cli.main([*DEMO, "--steps", "1", "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "No space left" in captured.err
    assert "test MSE" in captured.out


def test_ctrl_c_while_it_trains_writes_the_table_and_the_picture(tmp_path):
    needs_extra()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastconfig", *DEMO, "--seconds", "10000", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(cli.__file__).parents[1],
        # A shell starts background jobs with SIGINT ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    started = process.stdout.readline()  # the heading: training begins
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=900)  # a bound for what never ends, not a measure
    assert started.startswith("Losses")
    assert process.returncode == 130, errors
    assert errors == ""
    assert "Interrupted" in output
    assert "test MSE" in output
    assert (tmp_path / "burgers.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["burgers.png"]


def test_on_a_terminal_there_is_one_bar_a_method_with_its_losses():
    needs_extra()
    from rich.console import Console

    from fastconfig.demos import burgers, report

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    trainers = burgers.trainers(0, torch.device("cpu"), burgers.Budget(None, 4))
    with report.TrainingProgress(console, trainers) as progress:
        trainers[0].train_until(0.5, lambda: False)
        progress.update()
    assert "50%" in screen.getvalue()
    assert f"{trainers[0].losses[0]:.1e}" in screen.getvalue()
    assert all(trainer.name in screen.getvalue() for trainer in trainers)
