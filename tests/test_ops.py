"""torch.ops.fastconfig and what is traced: schemas, fakes, torch.compile without a graph break, export, make_fx.

Most tests compile with "eager" (dynamo alone) or "aot_eager" (with functionalisation), which need no compiler.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from versions import TORCH, since

import fastconfig as fc
from fastconfig import backends, ops
from fastconfig.backends import reference
from fastconfig.methods.catalogue import CATALOGUE
from fastconfig.validation import check_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RULE = (None, "projection", 0, 1e-12, "propagate")
TRACERS = ("eager", "aot_eager")


# inductor scripts a class of its own where it is imported, of which torch.jit warns; and it says once that it leaves
# complex operators as they are, which is all that is asked of it here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning"),
    pytest.mark.filterwarnings("ignore:At pre-dispatch tracing, we will assume that any custom op:UserWarning"),
]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def complex_normal(*shape: int) -> torch.Tensor:
    return torch.complex(normal(*shape), normal(*shape, seed=1))


def whole(function, tracer: str = "aot_eager", **options):
    """``function`` compiled as one graph."""
    return torch.compile(function, backend=tracer, fullgraph=True, **options)


class SumOfAll:
    def weights(self, gramian):
        return torch.ones_like(gramian[0])


class Column:
    """Weights that are not contiguous."""

    def weights(self, gramian):
        return gramian[:, 0]


class Normalised:
    """Traceable code that branches on no value, in a smaller dtype than the Gramian's."""

    def weights(self, gramian):
        norms = gramian.diagonal().sqrt()
        return torch.where(norms > 0, 1.0 / norms, 0.0).to(torch.float32)


# Schemas and fakes


def forms(dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    return {
        "matrix": [normal(3, 20, dtype=dtype)],
        "rows apart": [normal(3, 30, dtype=dtype)[:, :20]],
        "vectors": list(normal(3, 20, dtype=dtype)),
    }


@pytest.mark.parametrize("form", ["matrix", "rows apart", "vectors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_are_what_their_schemas_say(dtype, form):
    rows, out, kept = forms(dtype)[form], torch.empty(20, dtype=dtype), torch.empty(4, 3, dtype=torch.float64)
    operators = torch.ops.fastconfig
    torch.library.opcheck(operators.gramian.default, (rows,))
    torch.library.opcheck(operators.apply.default, (rows, torch.ones(3, dtype=torch.float64), out))
    torch.library.opcheck(operators.config_combine.default, (rows, *RULE, out, None, None))
    # As the buffer keeps them: two outputs in one block of memory.
    torch.library.opcheck(operators.config_combine.default, (rows, *RULE, out, kept[:3], kept[3]))


@pytest.mark.parametrize(
    "rule",
    [RULE, ((0.25, 0.5, 1.0), "harmonic", 0, 1e-6, "drop"), (None, "tracked", -1, 0.0, "raise")],
    ids=["default", "weighted", "tracked"],
)
def test_weights_operator_is_what_its_schema_says(rule):
    gramian = fc.gramian(normal(3, 20))
    torch.library.opcheck(torch.ops.fastconfig.config_weights.default, (gramian, *rule))
    torch.library.opcheck(torch.ops.fastconfig.config_weights.default, (gramian.T, *rule, "reference"))


OPERANDS = {"gradvac": (2, 3, 3), "pcgrad": (3, 3), "sdmgrad": (3,), "randomweights": (3,)}


def of_rule(method: fc.methods.GramianMethod, operand: torch.Tensor | None) -> tuple:
    """What the operator takes after the Gramian."""
    rule = method.rule
    return rule.kind, rule.parameters, rule.preferences, rule.nonfinite, operand


@pytest.mark.parametrize("name", [name for name in CATALOGUE if hasattr(CATALOGUE[name].make(3), "operand")])
def test_rule_weights_operator_is_what_its_schema_says(name):
    gramian, method = fc.gramian(normal(3, 20)), CATALOGUE[name].make(3)
    operand = torch.rand(OPERANDS[name], dtype=torch.float64) / 3 if name in OPERANDS else None
    torch.library.opcheck(torch.ops.fastconfig.rule_weights.default, (gramian, *of_rule(method, operand)))
    torch.library.opcheck(
        torch.ops.fastconfig.rule_weights.default, (gramian.T, *of_rule(method, operand), "reference")
    )


def test_rule_weights_operator_refuses_an_operand_that_the_core_would_misread():
    gramian = fc.gramian(normal(3, 20))
    for method, operand in (
        (fc.GradVac(), None),
        (fc.GradVac(), torch.zeros(3, dtype=torch.float64)),
        (fc.SDMGrad(), None),
        (fc.SDMGrad(), torch.zeros(3)),
        (fc.PCGrad(), torch.zeros(2, 2, dtype=torch.float64)),
        (fc.PCGrad(), torch.zeros(3, 6, dtype=torch.float64)[:, ::2]),
    ):
        with pytest.raises(ValueError, match="operand must be"):
            torch.ops.fastconfig.rule_weights(gramian, *of_rule(method, operand))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fakes_have_shape_strides_dtype_and_device(dtype):
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            matrix = torch.empty(3, 20, dtype=dtype, device=device)
            vectors = [torch.empty(20, dtype=dtype, device=device) for _ in range(3)]
            # Without CUDA built in, torch fakes its tensors but not every function of them.
            strided = [torch.empty_strided((3, 20), (1, 3), dtype=dtype)] if device == "cpu" else []
            for rows in (matrix, vectors, *strided):
                combined, gramian = fc.combine(rows), fc.gramian(rows)
                weights = fc.ConFIG([1, 2, 3], "maximum").weights(gramian)
                assert (combined.shape, combined.stride(), combined.dtype) == ((20,), (1,), dtype)
                assert (gramian.shape, gramian.stride(), gramian.dtype) == ((3, 3), (3, 1), torch.float64)
                assert (weights.shape, weights.stride(), weights.dtype) == ((3,), (1,), torch.float64)
                assert {combined.device.type, gramian.device.type, weights.device.type} == {device}


def test_a_fake_tensor_outside_its_mode_is_not_read():
    with FakeTensorMode():
        rows, out = torch.empty(3, 20), torch.empty(20)
    assert fc.gramian(rows).shape == (3, 3)
    assert fc.combine(rows, out=out) is out
    for grads, result in ((normal(3, 20), out), (rows, torch.empty(20)), ([normal(20), rows[0]], torch.empty(20))):
        with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
            fc.combine(grads, out=result)


def test_every_device_has_a_kernel_and_those_without_a_backend_get_the_reference():
    # Only the choice: no such device is here to run it. On a CPU the reference is run through its operator below.
    for name in ("gramian", "apply", "config_weights", "config_combine", "rule_weights"):
        for key in ("CPU", "CUDA", "MPS", "XLA", "PrivateUse1"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastconfig::{name}", key)
    assert backends.select(torch.device("xla"), "auto") is reference


# Operators run what they are asked to


@pytest.mark.parametrize("form", ["matrix", "rows apart", "vectors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_run_the_named_backend(backend, dtype, form):
    rows = forms(dtype)[form]
    described = check_rows(rows[0] if len(rows) == 1 else rows)
    direct, through = backends.BACKENDS[backend], ops.Operators(backend)
    gramian = through.gramian(described)
    assert torch.equal(gramian, direct.gramian(described))
    for rule in (fc.ConFIG().rule, fc.ConFIG([1, 2, 3], -1, nonfinite="drop").rule):
        weights = through.config_weights(gramian, rule)
        assert torch.equal(weights, direct.config_weights(gramian, rule))
        one, other = torch.empty(20, dtype=dtype), torch.empty(20, dtype=dtype)
        through.apply(described, weights, one)
        direct.apply(described, weights, other)
        assert torch.equal(one, other)
        kept = torch.empty(4, 3, dtype=torch.float64)
        through.config_combine(described, rule, one, kept[:3], kept[3])
        direct.config_combine(described, rule, other)
        assert torch.equal(one, other)
        assert torch.equal(kept, torch.vstack((gramian, weights)))


def test_operators_mend_rows_that_a_compiler_laid_out_otherwise():
    rows = normal(3, 20)
    strided = normal(3, 40)[:, ::2].copy_(rows)
    for form in ([rows.T.contiguous().T], list(strided)):
        assert torch.equal(torch.ops.fastconfig.gramian(form), fc.gramian(rows))


def test_operators_refuse_memory_that_a_kernel_would_misread():
    rows, out, kept = [normal(3, 20)], torch.zeros(20), torch.zeros(3, 3)
    for call in (
        lambda: torch.ops.fastconfig.apply(rows, torch.ones(3).double(), out[:19]),
        lambda: torch.ops.fastconfig.apply(rows, torch.ones(3).double(), out.double()),
        lambda: torch.ops.fastconfig.apply(rows, torch.ones(2).double(), out),
        lambda: torch.ops.fastconfig.apply(rows, torch.ones(3), out),
        lambda: torch.ops.fastconfig.apply([rows[0][0], rows[0][1, :5]], torch.ones(2).double(), out),
        lambda: torch.ops.fastconfig.config_combine(rows, *RULE, out, kept, None),
        lambda: torch.ops.fastconfig.config_combine(rows, *RULE, out, None, kept[0]),
        lambda: torch.ops.fastconfig.config_combine(rows, [1.0], *RULE[1:], out, None, None),
        lambda: torch.ops.fastconfig.config_weights(kept, *RULE),
        lambda: torch.ops.fastconfig.config_weights(kept.double()[:2], *RULE),
    ):
        with pytest.raises((TypeError, ValueError), match=r"must|has 1 entries|has 5 elements"):
            call()
    assert not out.any()


def test_operators_count_what_they_overwrite():
    rows, out, weights = [normal(3, 20)], torch.empty(20), torch.empty(3, dtype=torch.float64)
    gramian = torch.empty(3, 3, dtype=torch.float64)
    before = [tensor._version for tensor in (out, gramian, weights)]
    torch.ops.fastconfig.config_combine(rows, *RULE, out, gramian, weights)
    assert [tensor._version for tensor in (out, gramian, weights)] == [version + 1 for version in before]
    torch.ops.fastconfig.apply(rows, weights, out)
    assert out._version == before[0] + 2


def test_eager_calls_pass_no_dispatcher(monkeypatch):
    def refuse(*_):
        raise AssertionError("an operator was called")

    monkeypatch.setattr(ops, "Operators", refuse)
    rows = normal(3, 20)
    for grads in (rows, list(rows), [torch.nn.Parameter(row) for row in rows], complex_normal(3, 20)):
        fc.combine(grads)
        fc.combine(grads, SumOfAll())
        fc.ConFIG().weights(fc.gramian(grads))


# torch.compile


METHODS = {
    "default": None,
    "weights": fc.ConFIG([1.0, 2.0, 0.5]),
    "harmonic": fc.ConFIG(length="harmonic", rtol=1e-6, nonfinite="drop"),
    "tracked": fc.ConFIG(length=-1, nonfinite="raise"),
    "callable": fc.ConFIG(length=lambda norms, cosines: norms.max() * cosines.sum()),
    "sum": SumOfAll(),
    "normalised": Normalised(),
    "column": Column(),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_compiles_to_the_eager_bits(name, tracer):
    def step(grads):
        return 2 * fc.combine(grads, METHODS[name])

    for grads in (normal(3, 20), list(normal(3, 20))):
        # A callable length model is the reference's code, traced; everything else is the same kernel.
        wanted = 2 * fc.combine(grads, METHODS[name])
        tolerance = 1e-6 if name == "callable" else 0.0
        torch.testing.assert_close(whole(step, tracer)(grads), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_method_of_the_catalogue_compiles_to_the_eager_bits(name):
    """Draws, where there are any, come in the same order; a state goes on from graph to graph."""
    torch.manual_seed(0)
    compiled = CATALOGUE[name].make(3)
    torch.manual_seed(0)
    eager = CATALOGUE[name].make(3)
    step = whole(lambda grads: 2 * fc.combine(grads, compiled))
    for i in range(3):
        grads = normal(3, 20, seed=i)
        torch.manual_seed(i)
        ours = step(grads)
        torch.manual_seed(i)
        assert torch.equal(ours, 2 * fc.combine(grads, eager))


def test_every_other_step_of_nash_mtl_compiles():
    compiled, eager = fc.NashMTL(update_every=2), fc.NashMTL(update_every=2)
    step = whole(lambda grads: fc.combine(grads, compiled))
    for i in range(5):
        grads = normal(3, 20, seed=i)
        torch.testing.assert_close(step(grads), fc.combine(grads, eager))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_backend_compiles_to_the_eager_bits(backend, dtype):
    def step(grads):
        return fc.combine(grads, backend=backend), fc.gramian(grads, backend=backend)

    compiled = whole(step)
    for grads in forms(dtype).values():
        for form in grads if len(grads) == 1 else (grads, tuple(grads)):
            for ours, wanted in zip(compiled(form), step(form), strict=True):
                assert torch.equal(ours, wanted)
                assert ours.dtype == wanted.dtype
                assert ours.stride() == wanted.stride()


@pytest.mark.parametrize(
    "view",
    [
        lambda rows: rows,
        lambda rows: list(rows),
        lambda rows: rows.conj(),
        lambda rows: rows.conj().imag,
        lambda rows: rows[:, ::2],
        lambda rows: rows.T.contiguous().T,
    ],
    ids=["complex", "vectors", "conjugated", "negated", "strided", "transposed"],
)
@pytest.mark.parametrize("tracer", TRACERS)
def test_complex_and_odd_views_compile_to_the_eager_bits(tracer, view):
    def step(rows):
        return fc.combine(view(rows)), fc.gramian(view(rows))

    rows = complex_normal(3, 20)
    for ours, wanted in zip(whole(step, tracer)(rows), step(rows), strict=True):
        assert torch.equal(ours, wanted)
        assert ours.dtype == wanted.dtype


@pytest.mark.parametrize("tracer", TRACERS)
def test_weights_of_a_gramian_compile(tracer):
    gramian = fc.gramian(normal(3, 20)).requires_grad_()
    for method in (fc.ConFIG(), fc.ConFIG([3, 2, 1], 0)):
        weights = whole(lambda gramian, method=method: method.weights(gramian), tracer)(gramian)
        assert torch.equal(weights, method.weights(gramian))
        assert not weights.requires_grad


def test_methods_may_be_made_inside_the_graph():
    def step(grads):
        return fc.combine(grads, fc.ConFIG(weights=[1, 1, 2.5], length="minimum", rtol=1e-9, nonfinite="drop"))

    grads = normal(3, 20)
    assert torch.equal(whole(step)(grads), step(grads))


@since(2, 6, "torch.compile cannot form a Jacobian in a graph that writes")
def test_gradients_made_inside_the_graph():
    def losses(theta):
        return torch.stack((theta.square().sum(), theta.cos().sum(), (theta - 1.0).pow(4).mean()))

    def step(theta):
        return theta - 0.1 * fc.combine(torch.func.jacrev(losses)(theta))

    theta = normal(7)
    torch.testing.assert_close(whole(step)(theta), step(theta))


def test_nothing_is_differentiated():
    grads = normal(3, 20)
    for form in (grads.requires_grad_(), [row.clone().requires_grad_() for row in grads.detach()]):
        assert not whole(fc.combine)(form).requires_grad
        assert not whole(fc.gramian)(form).requires_grad


def test_inductor_compiles_what_stands_around_the_operators():
    def step(grads, out):
        combined = fc.combine(grads.T.sin().T, fc.ConFIG([1, 2, 3]), out=out)
        return 2.0 * combined + 1.0, fc.gramian(list(grads * 2.0)).exp()

    grads, out, kept = normal(3, 200), torch.zeros(200), torch.zeros(200)
    for ours, wanted in zip(whole(step, "inductor")(grads, out), step(grads, kept), strict=True):
        torch.testing.assert_close(ours, wanted)  # inductor's sine is not torch's to the bit
    torch.testing.assert_close(out, kept)


# Sizes


FORMS = {
    "matrix": lambda n: (normal(3, n),),
    "vectors": lambda n: (list(normal(3, n)),),
    "complex": lambda n: (complex_normal(3, n),),
    "out": lambda n: (normal(3, n), torch.zeros(n)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_for_any_number_of_parameters(form, dynamic):
    def step(grads, out=None):
        return fc.combine(grads, out=out)

    compiled = whole(step, dynamic=dynamic)
    compiled(*FORMS[form](10))
    compiled(*FORMS[form](11))  # without dynamic=True, the second size makes it so
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (2, 50, 4097):
            arguments = FORMS[form](n)
            assert torch.equal(compiled(*arguments), step(*arguments))


def test_one_graph_for_a_size_marked_dynamic_and_any_number_of_rows():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = whole(fc.combine, counter)
    for m, n in ((2, 9), (3, 50), (5, 2)):
        grads = normal(m, n)
        torch._dynamo.mark_dynamic(grads, 0)
        torch._dynamo.mark_dynamic(grads, 1)
        assert torch.equal(compiled(grads), fc.combine(grads))
    assert counter.frame_count == 1


@pytest.mark.parametrize("shape", [(3, 0), (1, 20), (3, 1)])
def test_smallest_shapes_compile(shape):
    grads = normal(*shape)
    assert torch.equal(whole(fc.combine)(grads), fc.combine(grads))
    assert torch.equal(whole(fc.combine)(list(grads)), fc.combine(grads))


# out


@pytest.mark.parametrize("tracer", [*TRACERS, "inductor"])
def test_out_is_written_and_autograd_sees_it(tracer):
    grads, out = normal(3, 20), torch.ones(20)
    w = torch.ones(20, requires_grad=True)
    saved, version = (w * out).sum(), out._version
    result = whole(lambda grads, out: fc.combine(grads, out=out), tracer)(grads, out)
    assert result is out
    assert torch.equal(out, fc.combine(grads))
    assert out._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


@pytest.mark.parametrize("method", [None, SumOfAll()], ids=["ConFIG", "sum"])
@pytest.mark.parametrize(
    "tracer",
    [*TRACERS, pytest.param("inductor", marks=since(2, 8, "inductor fails on complex memory that an operator writes"))],
)
def test_out_of_complex_gradients_and_of_other_methods(tracer, method):
    # Inside a larger block: functionalisation of torch 2.13 loses the place of a real view of complex memory.
    grads, out = complex_normal(3, 20), torch.zeros(30, dtype=torch.complex64)
    whole(lambda grads, out: fc.combine(grads, method, out=out), tracer)(grads, out[5:25])
    assert torch.equal(out[5:25], fc.combine(grads, method))
    assert (out[:5] == 0).all()
    assert (out[25:] == 0).all()


@pytest.mark.parametrize("method", [None, SumOfAll()], ids=["ConFIG", "sum"])
def test_out_that_overlaps_raises_when_the_graph_runs(method):
    grads = normal(3, 20)
    kept = grads.clone()
    compiled = whole(lambda grads, out: fc.combine(grads, method, out=out), "eager")
    assert torch.equal(compiled(grads, torch.zeros(20)), fc.combine(grads, method))
    with pytest.raises(ValueError, match="out overlaps grads in memory"):
        compiled(grads, grads[1])
    assert torch.equal(grads, kept)


@pytest.mark.parametrize("tracer", ["aot_eager", "inductor"])
def test_out_that_overlaps_never_gives_a_wrong_answer(tracer):
    # Functionalisation may give the operator memory of its own, a copy that inductor saves from PyTorch 2.11 on.
    grads = normal(3, 20)
    kept, wanted = grads.clone(), fc.combine(grads)
    compiled = whole(lambda grads, out: fc.combine(grads, out=out), tracer)
    try:
        answer = compiled(grads, grads[1])
    except ValueError as error:
        assert "out overlaps grads in memory" in str(error)  # noqa: PT017
        assert torch.equal(grads, kept)
        assert tracer == "inductor"
    else:
        assert tracer == "aot_eager" or TORCH < (2, 11)
        assert torch.equal(answer, wanted)
        assert torch.equal(grads, torch.stack((kept[0], wanted, kept[2])))


# Errors


@pytest.mark.parametrize("tracer", [*TRACERS, "inductor"])
def test_nonfinite_raise_raises_when_the_graph_runs(tracer):
    compiled = whole(lambda grads, out: fc.combine(grads, fc.ConFIG(nonfinite="raise"), out=out), tracer)
    grads, out = normal(3, 20), torch.zeros(20)
    compiled(grads, out)
    assert torch.equal(out, fc.combine(grads))
    grads[1, 3], kept = math.inf, out.clone()
    with pytest.raises(FloatingPointError, match="gradient of loss 1 is inf or NaN"):
        compiled(grads, out)
    assert torch.equal(out, kept)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rows: fc.combine(rows[0]), "grads must have shape"),
        (lambda rows: fc.combine(rows, out=torch.empty(7)), "out must have shape"),
        (lambda rows: fc.combine(rows, fc.ConFIG([1, 2])), "weights has 2 entries for 3 losses"),
        (lambda rows: fc.combine(rows, backend="gpu"), "got 'gpu'"),
        (lambda rows: fc.gramian(rows, backend="gpu"), "got 'gpu'"),
    ],
    ids=["rank", "out", "weights", "combine's backend", "gramian's backend"],
)
def test_bad_input_raises_while_tracing(call, message):
    with pytest.raises(Exception, match=message):
        whole(call)(normal(3, 20))


def test_named_backend_that_cannot_run_raises_while_tracing(monkeypatch):
    monkeypatch.setattr(backends.BACKENDS["cpu"], "available", lambda: "the core is not built")
    with pytest.raises(Exception, match="'cpu' cannot run: the core is not built"):
        whole(lambda rows: fc.combine(rows, backend="cpu"))(normal(3, 20))


def test_backend_from_the_environment_is_the_default_of_a_graph(monkeypatch):
    monkeypatch.setattr(backends, "FORCED", "gpu")
    with pytest.raises(Exception, match="got 'gpu'"):
        whole(fc.combine)(normal(3, 20))
    monkeypatch.setattr(backends, "FORCED", "reference")
    grads = normal(3, 20)
    assert torch.equal(whole(fc.combine)(grads), fc.combine(grads, backend="reference"))


# Other tracers


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_operators(mode):
    rows, other = normal(3, 20), normal(3, 20, seed=5)
    for grads, again in ((rows, other), (list(rows), list(other))):
        graph = make_fx(lambda grads: fc.combine(grads), tracing_mode=mode)(grads)
        targets = {node.target for node in graph.graph.nodes}
        assert torch.ops.fastconfig.config_combine.default in targets
        assert torch.equal(graph(again), fc.combine(again))


class Combine(torch.nn.Module):
    def forward(self, grads):
        return fc.combine(grads), fc.gramian(grads)


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_any_number_of_parameters(strict):
    shapes = {"grads": {1: torch.export.Dim("n", min=2)}}
    program = torch.export.export(Combine(), (normal(3, 20),), dynamic_shapes=shapes, strict=strict)
    grads = normal(3, 33, seed=5)
    for ours, wanted in zip(program.module()(grads), Combine()(grads), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=since(2, 6, "torch.export freezes what it remembers") if name == "sdmgrad" else ())
        for name in CATALOGUE
        if name != "graddrop"  # which refuses to be recorded
    ],
)
def test_no_tracer_leaves_its_tensors_in_a_method(name):
    """A fake state would stay in the method, and hold no memory at the next combination."""

    def used_in_fake_mode(method):
        with FakeTensorMode():
            assert fc.combine(torch.empty(3, 20), method).shape == (20,)

    def exported(method):
        class Module(torch.nn.Module):
            def forward(self, grads):
                return fc.combine(grads, method)

        torch.export.export(Module(), (normal(3, 20),), strict=False)

    def recorded(method):
        make_fx(lambda grads: fc.combine(grads, method), tracing_mode="fake")(normal(3, 20))

    for trace in (used_in_fake_mode, exported, recorded):
        traced, fresh = CATALOGUE[name].make(3), CATALOGUE[name].make(3)
        trace(traced)
        torch.manual_seed(0)
        ours = fc.combine(normal(3, 20), traced)
        torch.manual_seed(0)
        assert torch.equal(ours, fc.combine(normal(3, 20), fresh))


# GradientBuffer


def two_dtypes() -> torch.nn.Module:
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 5), torch.nn.Linear(5, 2, dtype=torch.float64)

        def forward(self, x):
            return self.second(self.first(x).double())

    return Mixed()


def channels_last() -> torch.nn.Module:
    model = torch.nn.Linear(4, 2)
    model.weight = torch.nn.Parameter(normal(4, 2).T)
    return model


MODELS = {
    "one segment": lambda: torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)),
    "two segments": two_dtypes,
    "strided": channels_last,
}


def trained(make, wrap, optimise: bool, method: fc.Method | None = None) -> list[torch.Tensor]:
    """Parameters, gradients, Gramians and weights of three steps, combined by ``wrap`` of a step."""
    torch.manual_seed(0)
    model = make()
    buf = fc.GradientBuffer(model.parameters(), num_losses=2)

    def step():
        info = buf.combine(method)
        if optimise:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
        return info

    wrapped, seen = wrap(step), []
    for i in range(3):
        prediction = model(normal(6, 4, seed=i))
        buf.backward([prediction[:, 0].square().mean(), (prediction[:, 1] - 1.0).square().mean()])
        if i == 1:
            model.zero_grad()  # p.grad before a combination is None or a view, and makes no difference
        versions = [segment.grad._version for segment in buf.segments]
        info = wrapped()
        assert all(segment.grad._version > old for segment, old in zip(buf.segments, versions, strict=True))
        for segment in buf.segments:
            for parameter in segment.parameters:
                assert parameter.grad.stride() == parameter.stride()
                assert parameter.grad.untyped_storage().data_ptr() == segment.grad.data_ptr()
                assert not parameter.grad.requires_grad
                seen += [parameter.detach().clone(), parameter.grad.clone()]
        seen += [info.gramian, info.weights, info.cosines, info.norms]
    return seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("tracer", "optimise"),
    [("eager", True), ("aot_eager", True), ("aot_eager", False)],
    ids=["traced", "functionalised", "functionalised, combine alone"],
)
def test_buffer_combines_inside_a_graph(tracer, name, optimise):
    compiled = trained(MODELS[name], lambda step: whole(step, tracer), optimise)
    for ours, wanted in zip(compiled, trained(MODELS[name], lambda step: step, optimise), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("model", ["one segment", "two segments"])
@pytest.mark.parametrize(
    "make",
    [lambda: fc.ConFIG([1, 2], "minimum"), SumOfAll, fc.UPGrad, fc.GradVac, lambda: fc.CRMOGM(fc.MGDA())],
    ids=["ConFIG", "sum", "UPGrad", "GradVac", "CRMOGM"],
)
def test_buffer_combines_inside_a_graph_by_any_method(make, model):
    compiled = trained(MODELS[model], whole, True, make())
    for ours, wanted in zip(compiled, trained(MODELS[model], lambda step: step, True, make()), strict=True):
        assert torch.equal(ours, wanted)


def test_buffer_compiles_once_for_the_same_parameters_reached():
    model = torch.nn.Linear(3, 2)
    buf = fc.GradientBuffer(model.parameters(), num_losses=2)
    counter = CompileCounterWithBackend("aot_eager")
    combine = whole(buf.combine, counter)
    for i in range(4):
        prediction = model(normal(5, 3, seed=i))
        buf.backward([prediction[:, 0].square().mean(), prediction[:, 1].square().mean()])
        combine()
    assert counter.frame_count == 1
    for loss in range(2):
        with buf.record(loss):
            (model.weight[loss] ** 2).sum().backward()
    combine()
    assert counter.frame_count == 2
    assert model.bias.grad is None
    assert model.weight.grad is not None


@since(2, 8, "torch.compile does not pass on what an error says")
def test_buffer_inside_a_graph_refuses_what_it_refuses_outside():
    model = torch.nn.Linear(3, 2)
    buf = fc.GradientBuffer(model.parameters(), num_losses=2)
    with pytest.raises(Exception, match="found nothing to combine"):
        whole(lambda: buf.combine())()
    buf.backward([model(torch.ones(3)).sum(), model(torch.ones(3)).square().sum()])
    model.double()
    with pytest.raises(Exception, match="had its storage replaced"):
        whole(lambda: buf.combine())()
