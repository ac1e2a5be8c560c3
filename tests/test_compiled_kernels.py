"""The Triton kernels, compiled ahead of time for GPUs that this machine need not have, by the oldest and newest Triton.

bench/compile_kernels.py does the work in a process of its own, as its kernels must not be those of the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import pytest
from filelock import FileLock

from fastconfig.backends.triton import OLDEST

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[1] / "bench" / "compile_kernels.py"
BY_MATRIX_UNITS = {"config_of_many", "moments_of_many"}
UNITS_MISSING = {*BY_MATRIX_UNITS, "table_of_gradients"}
"""What is not launched where there are none."""
INSTEAD = {"config_of_blocks"}
"""What is launched there alone."""
MOMENTUM = {"moments_of_few", "moments_of_many", "momentum_update", "table_of_gradients", "table_of_group"}
KERNELS = (
    {
        "config_of_few",
        "config_of_many",
        "config_of_gramian",
        "rule_of_gramian",
        "combination",
        "graddrop",
        "table_of_addresses",
    }
    | MOMENTUM
    | INSTEAD
)
OF_FEW_UNITS = {"config_of_few", "config_of_blocks", "combination", "table_of_addresses"}
"""What is compiled in CI for a device with few float64 units."""
ALONE = {"config_of_gramian", "combination", "graddrop", "table_of_addresses", "table_of_gradients", "table_of_group"}
"""Those that take no tickets, however they are launched."""
ARCHITECTURES = {"newest": ("sm_89", "sm_90", "gfx942"), "oldest": ("sm_80", "gfx942")}
"""What is compiled in CI by which Triton; `make kernels` compiles for all by both."""
UNITS = "matrix units (taken for granted, found)"
FOLDERS = {"newest": "FASTCONFIG_NEWEST_TRITON", "oldest": "FASTCONFIG_OLDEST_TRITON"}
"""Environment variables that name a folder with a Triton; the installed one, PyTorch's, lies between the two."""


def compile_all(folder: Path, architectures: tuple[str, ...], triton_folder: str) -> dict:
    """What the tool reports of all architectures, each compiled by a process of its own, as many at once as cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outs = [folder / f"kernels-{architecture}.json" for architecture in architectures]
        reports = list(pool.map(compile_subset, outs, architectures, repeat(triton_folder)))
    return {
        "triton": reports[0]["triton"],
        "architectures": list(architectures),
        UNITS: {name: found for report in reports for name, found in report[UNITS].items()},
        "specialisations": [each for report in reports for each in report["specialisations"]],
        "exit_code": max(report["exit_code"] for report in reports),
    }


def compile_subset(out: Path, architecture: str, triton_folder: str) -> dict:
    """What the tool reports; its exit code is left to the tests, which say what is wrong."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = triton_folder if path is None else os.pathsep.join((triton_folder, path))
    command = [sys.executable, str(TOOL), "--subset", "--out", str(out), "--arch", architecture]
    out.unlink(missing_ok=True)
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert out.exists(), done.stderr
    result = json.loads(out.read_text())
    reports = [dict(zip(result["columns"], row, strict=True)) for row in result["rows"]]
    return {**result, "specialisations": reports, "exit_code": done.returncode}


@pytest.fixture(scope="module", params=["newest", "oldest"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The reports of the newest Triton that PyPI has, and of the oldest that is supported.

    Compiled once, whatever the number of processes that run the tests: the others wait for the one that does it.
    """
    variable = FOLDERS[request.param]
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} does not name a folder with the {request.param} Triton, as `make test` does")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    done = shared / f"compiled-by-the-{request.param}.json"
    with FileLock(f"{done}.lock"):
        if not done.exists():
            report = compile_all(shared, ARCHITECTURES[request.param], folder)
            done.write_text(json.dumps(report))
    report = json.loads(done.read_text())
    found = tuple(int(number) for number in report["triton"].split(".")[:2])
    assert found == OLDEST if request.param == "oldest" else found > OLDEST, f"{variable} has Triton {report['triton']}"
    return report


def described(report: dict) -> str:
    """Which specialisation a report is of, and what the tool says of it."""
    return f"{report['architecture']} {report['kernel']} {report['rows']} {report['constants']}: {report['findings']}"


def those(result: dict, holds: Callable[[dict], object]) -> list[str]:
    """The specialisations that compiled and of which something holds, in words."""
    return [described(report) for report in compiled(result) if holds(report)]


def compiled(result: dict, **labels: object) -> list[dict]:
    """The reports of specialisations with these labels, or all, of those that compiled."""
    return [
        report
        for report in result["specialisations"]
        if report.get("registers") is not None and all(report[name] == value for name, value in labels.items())
    ]


def is_aligned(report: dict) -> bool | None:
    """Whether all rows begin at 16 bytes; None for kernels that read no rows."""
    return report["constants"].get("ALIGNED")


def test_everything_compiles(result):
    assert [described(report) for report in result["specialisations"] if report.get("registers") is None] == []


def test_every_kernel_is_compiled_for_every_architecture(result):
    assert result["architectures"]
    for architecture in result["architectures"]:
        # On AMD, older Tritons have no float64 matrix products.
        missing = UNITS_MISSING if architecture == "gfx942" and is_oldest(result) else INSTEAD
        wanted = OF_FEW_UNITS if architecture == "sm_89" else KERNELS - missing
        assert {report["kernel"] for report in compiled(result, architecture=architecture)} == wanted


def is_oldest(result: dict) -> bool:
    return result["triton"].startswith(f"{OLDEST[0]}.{OLDEST[1]}.")


@pytest.mark.parametrize(
    ("m", "kernel", "then"),
    [
        (3, "config_of_few", "combination"),
        (40, "config_of_many", "combination"),
        (40, "config_of_blocks", "combination"),
        (3, "moments_of_few", "momentum_update"),
        (40, "moments_of_many", "momentum_update"),
    ],
)
def test_3_and_40_losses_in_float32_are_among_them(result, m, kernel, then):
    for architecture in result["architectures"]:
        here = compiled(result, architecture=architecture, rows="*fp32")
        kernels = {report["kernel"] for report in here if report["constants"].get("M") == m}
        if compiled(result, architecture=architecture, kernel=kernel):  # that of many or that of blocks
            assert {kernel, then} <= kernels


def test_spills_are_accepted_with_a_reason(result):
    assert those(result, lambda report: (report["stack_bytes"] or report["spills"]) and not report["accepted"]) == []


def test_spills_are_accepted_of_the_oldest_triton_and_of_one_kernel_alone(result):
    """Three blocks of averages beside their gradients fill all registers there are."""
    accepted = those(result, lambda report: report["accepted"] and report["kernel"] != "moments_of_many")
    assert is_oldest(result) or accepted == []


def test_registers_stay_within_what_the_launch_asked_for(result):
    assert those(result, lambda report: report["registers"] > (report["register_limit"] or 512)) == []


def test_shared_memory_fits_every_device(result):
    limits = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
    assert those(result, lambda report: report["shared_bytes"] > 1024 * limits[report["architecture"]]) == []


def test_aligned_rows_are_read_by_16_bytes(result):
    assert those(result, lambda report: is_aligned(report) and not report["wide_loads"]) == []
    assert those(result, lambda report: is_aligned(report) and report["narrow_loads"]) == []


def test_misaligned_rows_are_read_by_less(result):
    """Else the loads would not be told apart, and the test above would say nothing."""
    misaligned = [report for report in compiled(result) if is_aligned(report) is False]
    assert misaligned
    assert all(report["narrow_loads"] and not report["wide_loads"] for report in misaligned)


def test_a_barrier_stands_before_every_ticket(result):
    assert those(result, lambda report: report["tickets_without_barrier"]) == []


def test_every_ticket_stands_between_its_fence_and_its_invalidation(result):
    """In the machine code, which alone says what an atomic with release and acquire is made of."""
    of_nvidia = [report for report in compiled(result) if report["architecture"].startswith("sm_")]
    assert any(report["tickets"] for report in of_nvidia)
    assert [described(report) for report in of_nvidia if report["tickets_unfenced"]] == []


def test_devices_have_matrix_units_where_products_are_made_of_them(result):
    """By what this Triton compiles: a device that is taken to have them and has none would spill, and crawl."""
    units = result[UNITS]
    assert {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100"} <= set(units)
    taken = {name: given for name, (given, _) in units.items()}
    found = {name: made for name, (_, made) in units.items()}
    if is_oldest(result):
        found["gfx90a"] = False  # it compiles this one product there, not all of them
    assert taken == found
    assert taken["sm_90"]
    assert not taken["sm_89"]


def test_wavefronts_wait_for_their_partial_sums_before_the_barrier(result):
    """In those of many losses, as several store them; few losses' are stored by the wavefront that takes the ticket."""
    several = [report for report in compiled(result) if report["kernel"] in BY_MATRIX_UNITS]
    assert [described(report) for report in several if report["tickets_without_wait"]] == []


def test_kernels_of_several_programs_take_tickets(result):
    for report in compiled(result):
        # A constant of None for the tickets says that one program is launched.
        several = report["kernel"] not in ALONE and "tickets" not in report["constants"]
        levels = 1 if report["kernel"] == "rule_of_gramian" else 2
        assert report["tickets"] >= levels if several else report["tickets"] == 0, described(report)


def test_float32_is_summed_in_two_floats_where_float64_units_are_few(result):
    """What float64 is left there is of the m×m problem, and of what does not fit."""
    for report in compiled(result, kernel="config_of_few") + compiled(result, kernel="config_of_blocks"):
        few_units = report["architecture"] == "sm_89" and report["rows"] != "*fp64"
        in_two_floats = report["constants"].get("TWO_FLOAT", bool(report["constants"]["RUN"]))
        assert bool(in_two_floats) is few_units, described(report)


def test_many_losses_use_the_matrix_units(result):
    assert {report["kernel"] for report in compiled(result)} >= BY_MATRIX_UNITS
    assert those(result, lambda r: r["kernel"] in BY_MATRIX_UNITS and not r["matrix_products"]) == []


def test_the_tool_finds_nothing_wrong(result):
    assert [described(report) for report in result["specialisations"] if report["findings"]] == []
    assert result["exit_code"] == 0


def test_specialisations_are_told_apart(result):
    labels = ("architecture", "kernel", "rows", "warps", "register_limit", "constants")
    names = [json.dumps([report[label] for label in labels]) for report in result["specialisations"]]
    assert len(set(names)) == len(names)


def test_a_result_tells_nothing_of_the_machine(result):
    text = json.dumps(result)
    assert str(TOOL.parents[1]) not in text
    assert str(Path.home()) not in text
