"""What a user installs: the name of the distribution, its metadata, and what no message may advise."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

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
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2408.11104"]


def test_nothing_advises_to_install_the_other_project():
    advice = re.compile(r"pip install [^\n]*\bfastconfig(?!-torch)\b")
    files = [*(ROOT / "fastconfig").rglob("*.py"), *(ROOT / "kernels").glob("*.py"), *ROOT.glob("*.md")]
    files += (ROOT / "docs").glob("*.md")
    assert len(files) > 50
    assert [str(file) for file in files if advice.search(file.read_text())] == []
