"""What a user installs: the name of the distribution, its metadata, and what no message may advise."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import fastconfig as fc

ROOT = Path(__file__).parents[1]


def test_the_distribution_has_a_name_of_its_own():
    """PyPI's fastconfig is another project."""
    try:
        metadata = importlib.metadata.metadata("fastconfig-torch")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, only lies on the path")
    assert metadata["Version"] == fc.__version__
    assert metadata["Author"] == "the fastconfig developers"
    assert metadata["License-Expression"] == "MIT"
    assert "Homepage, https://arxiv.org/abs/2408.11104" in metadata.get_all("Project-URL")


def test_nothing_advises_to_install_the_other_project():
    advice = re.compile(r"pip install [^\n]*\bfastconfig(?!-torch)\b")
    files = [*(ROOT / "fastconfig").rglob("*.py"), *(ROOT / "kernels").glob("*.py"), *ROOT.glob("*.md")]
    files += (ROOT / "docs").glob("*.md")
    assert len(files) > 50
    assert [str(file) for file in files if advice.search(file.read_text())] == []


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    """The script that makes the virtual environment, with a folder of its own, and pip not really called."""
    path = ROOT / ".ci" / "set-up"
    loader = importlib.machinery.SourceFileLoader("set_up", str(path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = types.ModuleType("set_up")
    module.__file__ = str(path)
    loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    site = tmp_path / ".venv" / "lib" / "python3" / "site-packages"
    site.mkdir(parents=True)
    (tmp_path / ".venv" / "bin").mkdir()
    (tmp_path / ".venv" / "bin" / "python").touch()
    module.calls = []
    done = types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(module.subprocess, "run", lambda command, **_: module.calls.append(command) or done)
    monkeypatch.delenv("TORCH", raising=False)
    return module, site


def test_the_demos_environment_is_pinned_and_offers_the_torch_that_is_there(set_up, capsys):
    module, site = set_up
    assert module.main("demo") == 0
    (command,) = module.calls
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    assert command[1:] == ["-m", "pip", "install", *constraints, "--editable", ".[demo]"]
    told = capsys.readouterr().out
    assert "3 GB" in told
    assert f"has PyTorch {importlib.metadata.version('torch')}" in told
    assert "make demo TORCH=installed" in told
    assert not list(site.iterdir())


def test_an_installed_torch_is_used_on_request(set_up, capsys, monkeypatch):
    module, site = set_up
    monkeypatch.setenv("TORCH", "installed")
    assert module.main("demo") == 0
    (command,) = module.calls
    assert "--constraint" not in command
    (linked,) = site.glob("*.pth")
    assert str(Path(torch.__file__).parents[1]) in linked.read_text().splitlines()
    monkeypatch.delenv("TORCH")
    assert module.main("test") == 0  # later, in the same environment
    assert "--constraint" not in module.calls[1]


def test_an_installed_torch_is_found_wherever_this_python_sees_it(set_up, tmp_path, monkeypatch):
    """As Debian's, which lies in another folder than what pip installs, and comes after it."""
    module, site = set_up
    debian = tmp_path / "dist-packages"
    information = debian / "torch-2.6.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Name: torch\nVersion: 2.6.0\n")
    own = tmp_path / "site-packages"
    own.mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(own), str(debian)])
    monkeypatch.setattr(module.site, "getsitepackages", lambda: [str(own), str(tmp_path / "absent")])
    monkeypatch.setenv("TORCH", "installed")
    assert module.main("demo") == 0
    (linked,) = site.glob("*.pth")
    assert linked.read_text().splitlines() == [str(own), str(debian)]


def test_a_torch_that_will_not_do_is_not_offered(set_up, capsys, monkeypatch):
    module, _ = set_up
    monkeypatch.setattr(module, "version", lambda name: "2.3.1")
    assert module.main("demo") == 0
    assert "TORCH=installed" not in capsys.readouterr().out
    monkeypatch.setenv("TORCH", "installed")
    assert module.main("demo") == 1
    assert "has no PyTorch from 2.4 on" in capsys.readouterr().err
    monkeypatch.setenv("TORCH", "mine")
    assert module.main("demo") == 1
    assert "TORCH must be 'installed' or not set, got 'mine'" in capsys.readouterr().err
