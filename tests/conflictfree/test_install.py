"""The other two ways in, ``install()`` and ``python -m fastconfig.conflictfree``, each in an interpreter of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastconfig
from fastconfig.conflictfree import install, uninstall

PACKAGE_ROOT = str(Path(fastconfig.__file__).parents[1])

SCRIPT = """\
import json, sys
import conflictfree
import conflictfree.momentum_operator
from conflictfree.grad_operator import ConFIG_update
from conflictfree.utils import *

class Local:
    pass

print(json.dumps({
    "name": __name__,
    "file": __file__,
    "argv": sys.argv,
    "path": sys.path[0],
    "main": sys.modules["__main__"].Local is Local,
    "module": ConFIG_update.__module__,
    "momentum": conflictfree.momentum_operator.__name__,
    "update": ConFIG_update(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])).tolist(),
}))
if "fail" in sys.argv:
    raise SystemExit(int(sys.argv[-1]))
"""


def python(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": PACKAGE_ROOT}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def reported(*arguments, cwd, status=0):
    done = python(*arguments, cwd=cwd)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT)
    return tmp_path


def test_an_unmodified_script_runs_as_python_runs_it(folder):
    arguments = ["scripts/train.py", "-m", "--", "--help", "x y", "fail", "7"]
    report = reported("-m", "fastconfig.conflictfree", *arguments, cwd=folder, status=7)
    assert report["module"] == "fastconfig.conflictfree.grad_operator"
    assert report["momentum"] == "fastconfig.conflictfree.momentum_operator"
    assert report["update"] == pytest.approx([0.1588, 2.0706, 2.0706], abs=1e-4)
    assert report["name"] == "__main__"
    assert report["main"] is True
    assert report["argv"] == arguments
    assert Path(folder, report["file"]) == folder / "scripts" / "train.py"
    assert report["path"] == str(folder / "scripts")


def test_a_module_runs_as_python_runs_it(folder):
    report = reported("-m", "fastconfig.conflictfree", "-m", "scripts.train", "-x", cwd=folder)
    assert report["module"] == "fastconfig.conflictfree.grad_operator"
    assert report["name"] == "__main__"
    assert report["main"] is True
    assert report["argv"] == [str(folder / "scripts" / "train.py"), "-x"]
    assert report["path"] == str(folder)


def test_errors_pass_through(folder):
    (folder / "raises.py").write_text("import conflictfree\n1 / 0\n")
    done = python("-m", "fastconfig.conflictfree", "raises.py", cwd=folder)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "usage: python -m fastconfig.conflictfree script.py"),
        (["--help"], 0, "usage: python -m fastconfig.conflictfree script.py"),
        (["missing.py"], 2, "cannot find the script 'missing.py'"),
        (["-m"], 2, "-m needs the name of a module"),
        (["--fast", "train.py"], 2, "unknown option --fast"),
    ],
)
def test_usage(arguments, status, message, capfd):
    from fastconfig.conflictfree.__main__ import main

    assert main(arguments) == status
    output = capfd.readouterr()
    assert message in (output.err if status else output.out)
    assert "-m module" in output.err + output.out


IN_PROCESS = """\
import importlib, sys
import fastconfig.conflictfree
fastconfig.conflictfree.install()
fastconfig.conflictfree.install()
import conflictfree
assert conflictfree is fastconfig.conflictfree
for name in ("grad_operator", "length_model", "loss_recorder", "momentum_operator", "utils", "weight_model"):
    ours = importlib.import_module("fastconfig.conflictfree." + name)
    assert importlib.import_module("conflictfree." + name) is ours
    assert getattr(conflictfree, name) is ours
from conflictfree.weight_model import EqualWeight
import pickle
assert type(pickle.loads(pickle.dumps(EqualWeight()))) is EqualWeight
"""


UNINSTALL = """\
fastconfig.conflictfree.uninstall()
fastconfig.conflictfree.uninstall()
import warnings; warnings.simplefilter("ignore")
import conflictfree.utils
assert conflictfree is not fastconfig.conflictfree
assert conflictfree.utils.unit_vector.__module__ == "conflictfree.utils"
fastconfig.conflictfree.uninstall()
assert sys.modules["conflictfree.utils"] is conflictfree.utils
"""


def test_install_and_uninstall_beside_the_real_package(tmp_path):
    done = python("-c", IN_PROCESS + UNINSTALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_install_needs_no_real_package(tmp_path):
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'conflictfree':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n" + IN_PROCESS
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_install_refuses_where_the_real_package_has_been_imported():
    import conflictfree.utils

    real = {name: module for name, module in sys.modules.items() if name.startswith("conflictfree")}
    with pytest.raises(RuntimeError, match=r"conflictfree has already been imported.*before the first import"):
        install()
    uninstall()
    assert {name: module for name, module in sys.modules.items() if name.startswith("conflictfree")} == real
    assert sys.modules["conflictfree"] is conflictfree
