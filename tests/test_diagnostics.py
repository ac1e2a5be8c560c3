"""show_config says what runs here, and what is missing."""

import io
import os
import subprocess
import sys

import torch

import fastconfig as fc
from fastconfig import diagnostics
from fastconfig.backends import cpu, triton


def shown() -> dict[str, str]:
    stream = io.StringIO()
    fc.show_config(stream)
    return {name.strip(): value for name, _, value in (line.partition("  ") for line in stream.getvalue().splitlines())}


def test_versions_threads_backends_and_tier_are_shown():
    text = io.StringIO()
    fc.show_config(text)
    for fact in (fc.__version__, torch.__version__, f"{torch.get_num_threads()} (", cpu.active_tier(), *cpu.tiers()):
        assert fact in text.getvalue()
    assert shown().keys() == diagnostics.collect_config().keys()
    assert diagnostics.collect_config()["backend cpu"] == "ready, drives cpu tensors"


def test_another_projects_distribution_is_noticed(tmp_path, monkeypatch):
    """PyPI's fastconfig is not this library, and `pip install fastconfig` would write over it."""
    assert "warning" not in shown()
    information = tmp_path / "fastconfig-0.2.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: fastconfig\nVersion: 0.2.0\nSummary: Finds a project's root\n")
    monkeypatch.syspath_prepend(tmp_path)
    told = shown()["warning"].strip()
    assert told.startswith("the distribution fastconfig 0.2.0 (Finds a project's root) is installed, too")
    assert "pip uninstall fastconfig, and install fastconfig-torch once more" in told
    # This library as an old checkout called it, whether or not it is also installed by its new name.
    (information / "entry_points.txt").write_text("[console_scripts]\nfastconfig = fastconfig.cli:main\n")
    assert "warning" not in shown()


def test_a_missing_core_is_named_with_its_reason(monkeypatch):
    monkeypatch.setattr(cpu, "_IMPORT_ERROR", "No module named fastconfig._core")
    config = diagnostics.collect_config()
    assert config["backend cpu"].startswith("missing: ")
    assert "No module named fastconfig._core" in config["backend cpu"]
    assert config["ISA tier"].startswith("none")


def test_the_state_of_the_kernels_is_shown_device_by_device(monkeypatch):
    names = {0: "New GPU", 1: "Old GPU"}
    monkeypatch.setattr(triton, "OLDEST", (0, 0))  # beside an old PyTorch Triton may be too old
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[torch.device("cuda", device).index])
    monkeypatch.setattr(triton, "drives", lambda device: "it is too old" if device.index else None)
    shown_state = diagnostics.collect_config()["backend triton"]
    assert shown_state == "ready, drives cuda:0 New GPU, cuda:1 Old GPU not: it is too old"
    monkeypatch.setattr(triton, "IMPORT_ERROR", "No module named 'triton'")
    assert "missing: Triton could not be imported" in diagnostics.collect_config()["backend triton"]
    assert "pip install 'triton>=" in diagnostics.collect_config()["backend triton"]


def test_without_a_device_the_kernels_are_missing():
    code = "import fastconfig as fc; fc.show_config()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    reason = triton.available() if triton._version() < triton.OLDEST else "PyTorch sees no CUDA or ROCm device"
    assert f"missing: {reason}" in done.stdout


def test_it_prints_to_standard_output(capsys):
    fc.show_config()
    assert fc.__version__ in capsys.readouterr().out


def test_a_source_tree_without_the_core_falls_back_to_the_reference():
    code = (
        "import sys; sys.modules['fastconfig._core'] = None\n"
        "import torch, fastconfig as fc\n"
        "from fastconfig import backends\n"
        "assert backends.select(torch.device('cpu')).__name__.endswith('reference')\n"
        "print(fc.combine(torch.tensor([[-4.0, 1, 1], [6, 1, 1]])).tolist())\n"
        "try: backends.select(torch.device('cpu'), 'cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "0.1588" in done.stdout
    assert "cannot run" in done.stdout


def test_without_triton_everything_else_works():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastconfig as fc\n"
        "from fastconfig import backends\n"
        "fc.show_config()\n"
        "print(fc.combine(torch.tensor([[-4.0, 1, 1], [6, 1, 1]])).tolist())\n"
        "assert backends.select(torch.device('cuda', 0)).__name__.endswith('reference')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "missing: Triton could not be imported" in done.stdout
    assert "0.1588" in done.stdout
    assert "slow reference on cuda:0: Triton could not be imported" in done.stderr
    assert "pip install 'triton>=" in done.stderr


def test_the_environment_is_shown():
    code = "import fastconfig as fc; fc.show_config()"
    environment = {**os.environ, "FASTCONFIG_BACKEND": "reference", "FASTCONFIG_ISA": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "FASTCONFIG_BACKEND=reference" in done.stdout
