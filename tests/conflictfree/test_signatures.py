"""Names, signatures and star-exports are those of the installed conflictfree."""

import importlib
import inspect

import pytest
from conflictfree.grad_operator import ConFIGOperator
from conflictfree.length_model import ProjectionLength
from conflictfree.weight_model import EqualWeight

MODULES = ["grad_operator", "length_model", "loss_recorder", "momentum_operator", "utils", "weight_model"]

# The one allowed difference: where upstream's default is an instance, made once and shared by every call that does not
# pass one, ours is None, which stands for a new instance.
SHARED_DEFAULTS = (ConFIGOperator, EqualWeight, ProjectionLength)


def upstream_and_ours(module):
    return importlib.import_module(f"conflictfree.{module}"), importlib.import_module(
        f"fastconfig.conflictfree.{module}"
    )


def defined_in(module):
    return [
        name
        for name, value in vars(module).items()
        if inspect.isroutine(value) or inspect.isclass(value)
        if value.__module__ == module.__name__
    ]


CALLABLES = [(module, name) for module in MODULES for name in defined_in(upstream_and_ours(module)[0])]


def parameters(function):
    """Name, kind and default of every parameter, a shared instance as None."""
    return [
        (entry.name, entry.kind, None if isinstance(entry.default, SHARED_DEFAULTS) else entry.default)
        for entry in inspect.signature(function).parameters.values()
    ]


def test_the_comparison_covers_the_package():
    assert len(CALLABLES) > 30
    assert ("utils", "get_gradient_vector") in CALLABLES
    assert ("momentum_operator", "PseudoMomentumOperator") in CALLABLES


@pytest.mark.parametrize(("module", "name"), CALLABLES)
def test_same_signatures(module, name):
    upstream, ours = (getattr(package, name) for package in upstream_and_ours(module))
    assert parameters(ours) == parameters(upstream)
    if not inspect.isclass(upstream):
        return
    for method, function in inspect.getmembers(upstream, inspect.isfunction):
        assert parameters(getattr(ours, method)) == parameters(function), method


@pytest.mark.parametrize(("module", "name"), CALLABLES)
def test_same_bases(module, name):
    upstream, ours = (getattr(package, name) for package in upstream_and_ours(module))
    if inspect.isclass(upstream):
        assert {base.__name__ for base in upstream.__mro__} <= {base.__name__ for base in ours.__mro__}


@pytest.mark.parametrize("module", MODULES)
def test_same_star_exports(module):
    upstream, ours = ({}, {})
    exec(f"from conflictfree.{module} import *", upstream)
    exec(f"from fastconfig.conflictfree.{module} import *", ours)
    assert set(ours) == set(upstream)


@pytest.mark.parametrize("module", MODULES)
def test_re_exported_names_are_the_same_objects(module):
    upstream, ours = upstream_and_ours(module)
    foreign = [
        name for name in ours.__all__ if not getattr(getattr(upstream, name), "__module__", "").startswith("conf")
    ]
    assert foreign
    for name in foreign:
        assert getattr(ours, name) is getattr(upstream, name), name
