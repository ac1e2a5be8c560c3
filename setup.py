"""Builds the compiled core; everything else about the package stands in pyproject.toml."""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

# One translation unit an ISA tier: each switches its own instruction set on, so no file needs flags of its own and
# the same build runs on every machine of the architecture.
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.hpp"))

core = Pybind11Extension(
    "fastconfig._core",
    SOURCES,
    depends=HEADERS,
    cxx_std=17,
    # -fno-math-errno lets sqrt be one instruction. No -ffast-math: NaN and inf must travel as IEEE 754 says.
    # -Wno-psabi: vectors wider than the baseline never cross a translation unit.
    extra_compile_args=[
        "-O3",
        "-fno-math-errno",
        "-fopenmp",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        *os.environ.get("FASTCONFIG_CXXFLAGS", "").split(),
    ],
    extra_link_args=["-fopenmp"],
)

with ParallelCompile("FASTCONFIG_BUILD_JOBS", default=0):
    setup(
        ext_modules=[core],
        # kernels/ stands beside the package, for readers; it is installed inside it.
        packages=[*find_packages(include=["fastconfig*"]), "fastconfig.kernels"],
        package_dir={"fastconfig.kernels": "kernels"},
    )
