"""Bad input: the message names the argument, its value and the remedy, and nothing is written."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

import fastconfig as fc

GOOD = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, -3.0, 2.0, -1.0], [1.0, 0.0, -1.0, 0.0]])
COMPLEX = torch.complex(GOOD, -GOOD)


def mentions(*fragments: str) -> str:
    """A pattern that holds every fragment, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(fragment)})" for fragment in fragments)


def quantised(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def sparse_rows(layout: torch.layout) -> torch.Tensor:
    return GOOD.to_sparse(layout=layout)


# name: (gradients, error, what the message must hold: argument, value, remedy)
BAD_GRADS = {
    "integer": (lambda: GOOD.long(), TypeError, ("grads", "torch.int64", "convert it with .to()")),
    "boolean": (lambda: GOOD > 0, TypeError, ("grads", "torch.bool", "convert it with .to()")),
    "integer row": (lambda: [GOOD[0], GOOD[1].int()], TypeError, ("grads[1]", "torch.int32", "convert it with .to()")),
    "8-bit float": (lambda: GOOD.to(torch.float8_e5m2), TypeError, ("grads", "torch.float8_e5m2", ".to()")),
    "sparse": (lambda: sparse_rows(torch.sparse_coo), TypeError, ("grads", "torch.sparse_coo", ".to_dense()")),
    "compressed": (lambda: sparse_rows(torch.sparse_csr), TypeError, ("grads", "torch.sparse_csr", ".to_dense()")),
    "sparse row": (lambda: [GOOD[0].to_sparse()], TypeError, ("grads[0]", "torch.sparse_coo", ".to_dense()")),
    "quantised": (lambda: quantised(GOOD), TypeError, ("grads", "torch.qint8", ".dequantize()")),
    "quantised row": (lambda: [GOOD[0], quantised(GOOD[1])], TypeError, ("grads[1]", "torch.qint8", ".dequantize()")),
    "no rows": (lambda: GOOD[:0], ValueError, ("grads", "(0, 4)", "one row a loss")),
    "empty list": (list, ValueError, ("grads", "empty sequence", "one vector a loss")),
    "empty tuple": (lambda: (), ValueError, ("grads", "empty sequence", "one vector a loss")),
    "one vector": (lambda: GOOD[0], ValueError, ("grads", "(4,)", "flatten")),
    "scalar": (lambda: GOOD[0, 0], ValueError, ("grads", "()", "flatten")),
    "three dimensions": (lambda: GOOD.view(3, 2, 2), ValueError, ("grads", "(3, 2, 2)", "flatten")),
    "complex vector": (lambda: COMPLEX[0], ValueError, ("grads", "flatten")),
    "matrix as row": (lambda: [GOOD[0], GOOD.view(3, 4)], ValueError, ("grads[1]", "(3, 4)", "flatten")),
    "scalar as row": (lambda: [GOOD[0, 0]], ValueError, ("grads[0]", "()", "flatten")),
    "other length": (lambda: [GOOD[0], GOOD[1, :3]], ValueError, ("grads[1]", "3 elements", "4", "same parameters")),
    "other dtype": (
        lambda: [GOOD[0], GOOD[1].double()],
        TypeError,
        ("grads[1]", "torch.float64", "torch.float32", "one dtype"),
    ),
    "real beside complex": (
        lambda: [torch.cat([GOOD[0], GOOD[1]]), COMPLEX[0]],
        TypeError,
        ("grads[1]", "torch.complex64", "torch.float32", "one dtype"),
    ),
    "complex beside real": (
        lambda: [COMPLEX[0], torch.cat([GOOD[0], GOOD[1]])],
        TypeError,
        ("grads[1]", "torch.float32", "torch.complex64", "one dtype"),
    ),
    "other device": (lambda: [GOOD[0], GOOD[1].to("meta")], ValueError, ("grads[1]", "meta", "cpu", "one device")),
    "array": (lambda: GOOD.numpy(), TypeError, ("grads", "ndarray", "stack")),
    "generator": (lambda: (row for row in GOOD), TypeError, ("grads", "generator", "list")),
    "list of lists": (lambda: GOOD.tolist(), TypeError, ("grads[0]", "list", "torch.as_tensor")),
    "nothing": (lambda: None, TypeError, ("grads", "NoneType", "stack")),
    "text": (lambda: "grads", TypeError, ("grads", "str", "stack")),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated, and still to be refused
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("name", BAD_GRADS)
def test_bad_gradients(backend, name):
    make, error, fragments = BAD_GRADS[name]
    grads, out = make(), torch.full((4,), 7.0)
    with pytest.raises(error, match=mentions(*fragments)):
        fc.gramian(grads, backend=backend)
    with pytest.raises(error, match=mentions(*fragments)):
        fc.combine(grads, out=out, backend=backend)
    assert torch.equal(out, torch.full((4,), 7.0))


def test_error_of_complex_gradients_gives_the_shape_that_was_passed():
    with pytest.raises(ValueError, match=mentions("(3, 2, 2)")):
        fc.combine(COMPLEX.view(3, 2, 2))
    with pytest.raises(ValueError, match=mentions("grads[1]", "3 elements", "4")):
        fc.combine([COMPLEX[0], COMPLEX[1, :3]])


# out

BAD_OUT = {
    "too long": (lambda: torch.zeros(5), ValueError, ("out", "(5,)", "(4,)", "allocate")),
    "too short": (lambda: torch.zeros(0), ValueError, ("out", "(0,)", "(4,)", "allocate")),
    "a row": (lambda: torch.zeros(1, 4), ValueError, ("out", "(1, 4)", "(4,)", "allocate")),
    "a column": (lambda: torch.zeros(4, 1), ValueError, ("out", "(4, 1)", "(4,)", "allocate")),
    "other dtype": (
        lambda: torch.zeros(4).double(),
        TypeError,
        ("out", "torch.float64", "torch.float32", "allocate"),
    ),
    "complex": (lambda: torch.zeros(4) + 0j, TypeError, ("out", "torch.complex64", "torch.float32", "allocate")),
    "integer": (lambda: torch.zeros(4).long(), TypeError, ("out", "torch.int64", "torch.float32", "allocate")),
    "other device": (lambda: torch.zeros(4, device="meta"), ValueError, ("out", "meta", "cpu", "allocate")),
    "strided": (lambda: torch.zeros(8)[::2], ValueError, ("out", "strides (2,)", "contiguous")),
    "expanded": (lambda: torch.zeros(1).expand(4), ValueError, ("out", "strides (0,)", "contiguous")),
    "negated lazily": (lambda: torch._neg_view(torch.zeros(4)), ValueError, ("out", "negated view")),
    "sparse": (lambda: torch.zeros(4).to_sparse(), TypeError, ("out", "torch.sparse_coo")),
    "list": (lambda: [0.0] * 4, TypeError, ("out", "list", "tensor")),
}


@pytest.mark.parametrize("name", BAD_OUT)
def test_bad_out(backend, name):
    make, error, fragments = BAD_OUT[name]
    out, grads = make(), GOOD.clone()
    with pytest.raises(error, match=mentions(*fragments)):
        fc.combine(grads, out=out, backend=backend)
    assert torch.equal(grads, GOOD)
    if isinstance(out, torch.Tensor) and out.device.type != "meta":
        assert not out.to_dense().any()


@pytest.mark.parametrize(
    ("out", "error", "fragments"),
    [
        (torch.zeros(8), TypeError, ("out", "torch.float32", "torch.complex64")),
        (torch.zeros(8) + 0j, ValueError, ("out", "(8,)", "(4,)")),
        ((torch.zeros(4) + 0j).conj(), ValueError, ("out", "conjugated")),
    ],
    ids=["real", "twice as long", "conjugated lazily"],
)
def test_bad_out_of_complex_gradients(backend, out, error, fragments):
    with pytest.raises(error, match=mentions(*fragments)):
        fc.combine(COMPLEX, out=out, backend=backend)
    assert not out.any()


# name: (what the gradients are, what out is), both views of one vector of 24 numbers
OVERLAPS = {
    "first row": (lambda v: v[:12].view(3, 4), lambda v: v[:4]),
    "last row": (lambda v: v[:12].view(3, 4), lambda v: v[8:12]),
    "across two rows": (lambda v: v[:12].view(3, 4), lambda v: v[2:6]),
    "one element": (lambda v: v[:12].view(3, 4), lambda v: v[11:15]),
    "one element before": (lambda v: v[3:15].view(3, 4), lambda v: v[:4]),
    "padded rows": (lambda v: v.view(3, 8)[:, :4], lambda v: v[9:13]),
    "every second row": (lambda v: v.view(6, 4)[::2], lambda v: v[16:20]),
    "every second column": (lambda v: v.view(3, 8)[:, ::2], lambda v: v[:4]),
    "transposed": (lambda v: v[:12].view(4, 3).T, lambda v: v[:4]),
    "vector in a list": (lambda v: [v[20:24], v[:4], v[8:12]], lambda v: v[:4]),
    "part of a vector in a list": (lambda v: [v[20:24], v[:4], v[8:12]], lambda v: v[5:9]),
    "strided vector in a list": (lambda v: [v[16:20], v[:8:2]], lambda v: v[6:10]),
    "repeated row": (lambda v: v[:4].expand(3, 4), lambda v: v[3:7]),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_out_that_overlaps_the_gradients(backend, name):
    memory = torch.arange(1.0, 25.0)
    grads, out = (view(memory) for view in OVERLAPS[name])
    with pytest.raises(ValueError, match=mentions("out overlaps grads", "pass another tensor")):
        fc.combine(grads, out=out, backend=backend)
    assert torch.equal(memory, torch.arange(1.0, 25.0))


@pytest.mark.parametrize(
    "view",
    [lambda z: z[:12].view(3, 4), lambda z: z[:12].view(4, 3).T, lambda z: z[:12].view(3, 4).conj()],
    ids=["contiguous", "transposed", "conjugated"],
)
def test_out_that_overlaps_complex_gradients(backend, view):
    memory = torch.complex(torch.arange(1.0, 25.0), -torch.arange(1.0, 25.0))
    kept = memory.clone()
    with pytest.raises(ValueError, match=mentions("out overlaps grads", "pass another tensor")):
        fc.combine(view(memory), out=memory[9:13], backend=backend)
    assert torch.equal(memory, kept)


# Memory beside the rows that no row reaches is nobody's: refusing it would call an overlap what is none.
NEIGHBOURS = {
    "next row of the block": (lambda v: v[:20].view(5, 4)[:4], lambda v: v[16:20]),
    "between two rows": (lambda v: v.view(6, 4)[::2], lambda v: v[4:8]),
    "padding of a row": (lambda v: v.view(3, 8)[:, :4], lambda v: v[12:16]),
    "between two vectors": (lambda v: [v[:4], v[8:12]], lambda v: v[4:8]),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_out_beside_the_gradients_in_one_block(backend, name):
    memory = torch.arange(1.0, 25.0).sin()
    grads, out = (view(memory) for view in NEIGHBOURS[name])
    kept = memory.clone()
    expected = fc.combine([row.clone() for row in grads], backend=backend)
    assert fc.combine(grads, out=out, backend=backend) is out
    torch.testing.assert_close(out, expected)
    out.copy_(NEIGHBOURS[name][1](kept))
    assert torch.equal(memory, kept)


# ConFIG

BAD_PARAMETERS = {
    "no weights": ({"weights": []}, ValueError, ("weights", "[]", "one a loss")),
    "matrix of weights": ({"weights": [[1.0, 2.0]]}, ValueError, ("weights", "[[1.0, 2.0]]", "one a loss")),
    "ragged weights": ({"weights": [[1.0], [1.0, 2.0]]}, ValueError, ("weights", "one a loss")),
    "one number": ({"weights": 2.0}, ValueError, ("weights", "2.0", "one a loss")),
    "text": ({"weights": "equal"}, (TypeError, ValueError), ("weights", "'equal'", "one a loss")),
    "mapping": ({"weights": {0: 1.0}}, (TypeError, ValueError), ("weights", "{0: 1.0}", "one a loss")),
    "boolean weights": ({"weights": [True, False]}, ValueError, ("weights", "[True, False]", "real numbers")),
    "complex weights": ({"weights": [1j, 1.0]}, ValueError, ("weights", "1j", "real numbers")),
    "NaN weight": ({"weights": [1.0, math.nan]}, ValueError, ("weights", "[1.0, nan]", "finite")),
    "infinite weight": ({"weights": [math.inf, 1.0]}, ValueError, ("weights", "[inf, 1.0]", "finite")),
    "zero weights": ({"weights": [0.0, 0.0]}, ValueError, ("weights", "[0.0, 0.0]", "not all be zero")),
    "negative rtol": ({"rtol": -1e-9}, ValueError, ("rtol", "-1e-09", "1e-12")),
    "NaN rtol": ({"rtol": math.nan}, ValueError, ("rtol", "nan", "1e-12")),
    "infinite rtol": ({"rtol": math.inf}, ValueError, ("rtol", "inf", "1e-12")),
    "rtol of one": ({"rtol": 1.0}, ValueError, ("rtol", "1.0", "1e-12")),
    "rtol as text": ({"rtol": "1e-3"}, TypeError, ("rtol", "'1e-3'", "number")),
    "boolean rtol": ({"rtol": True}, TypeError, ("rtol", "True", "number")),
    "unknown length": ({"length": "mean"}, ValueError, ("length", "'mean'", "arithmetic", "callable")),
    "float length": ({"length": 1.0}, TypeError, ("length", "1.0", "callable")),
    "boolean length": ({"length": True}, TypeError, ("length", "True", "callable")),
    "no length": ({"length": None}, TypeError, ("length", "None", "callable")),
    "unknown nonfinite": ({"nonfinite": "ignore"}, ValueError, ("nonfinite", "'ignore'", "drop")),
    "no nonfinite": ({"nonfinite": None}, ValueError, ("nonfinite", "None", "drop")),
}


@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_bad_parameters_of_config(name):
    parameters, error, fragments = BAD_PARAMETERS[name]
    with pytest.raises(error, match=mentions(*fragments)):
        fc.ConFIG(**parameters)


class Returning:
    def __init__(self, weights):
        self.returned = weights

    def weights(self, gramian):
        del gramian
        return self.returned


def raise_from_length(norms, cosines):
    raise ArithmeticError("from the callable")


# name: (a method that does not fit three losses, error, what the message must hold)
BAD_METHODS = {
    "two weights": (fc.ConFIG([1.0, 2.0]), ValueError, ("weights", "2 entries", "3 losses", "one weight a loss")),
    "four weights": (fc.ConFIG([1.0] * 4), ValueError, ("weights", "4 entries", "3 losses", "one weight a loss")),
    "no such loss": (fc.ConFIG(length=3), ValueError, ("length=3", "0 to 2")),
    "no such loss from the end": (fc.ConFIG(length=-4), ValueError, ("length=-4", "0 to 2")),
    "length of two": (fc.ConFIG(length=lambda norms, cosines: norms[:2]), ValueError, ("length", "(2,)", "one number")),
    "length a loss": (fc.ConFIG(length=lambda norms, cosines: norms), ValueError, ("length", "(3,)", "one number")),
    "length of no kind": (fc.ConFIG(length=lambda norms, cosines: "long"), TypeError, ("length", "'long'")),
    "length raises": (fc.ConFIG(length=raise_from_length), ArithmeticError, ("from the callable",)),
    "no such name": ("confg", ValueError, ("method", "'confg'", "is it 'config'")),
    "number": (0, TypeError, ("method", "got 0", "fc.ConFIG()")),
    "class": (fc.ConFIG, TypeError, ("method", "ConFIG", "fc.ConFIG()")),
    "too few": (Returning(torch.ones(2)), ValueError, ("Returning.weights", "(2,)", "(3,)", "one weight a loss")),
    "a column": (Returning(torch.ones(3, 1)), ValueError, ("Returning.weights", "(3, 1)", "one weight a loss")),
    "a list": (Returning([1.0] * 3), TypeError, ("Returning.weights", "[1.0, 1.0, 1.0]", "tensor")),
    "array": (Returning(np.ones(3)), TypeError, ("Returning.weights", "array", "tensor")),
    "complex": (Returning(torch.ones(3) + 0j), TypeError, ("Returning.weights", "real tensor")),
}


@pytest.mark.parametrize("name", BAD_METHODS)
def test_method_that_does_not_fit(backend, name):
    method, error, fragments = BAD_METHODS[name]
    grads, out = GOOD.clone(), torch.full((4,), 7.0)
    with pytest.raises(error, match=mentions(*fragments)):
        fc.combine(grads, method, out=out, backend=backend)
    assert torch.equal(out, torch.full((4,), 7.0))
    assert torch.equal(grads, GOOD)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0), (1, 3, 3)])
def test_config_weights_wants_a_square_gramian(shape):
    with pytest.raises(ValueError, match=mentions("gramian", str(shape), "(m, m)")):
        fc.ConFIG().weights(torch.ones(shape))


def test_not_finite_and_raise_name_the_loss(backend):
    grads, out = GOOD.clone(), torch.full((4,), 7.0)
    grads[1, 2] = math.nan
    with pytest.raises(FloatingPointError, match=mentions("loss 1", "inf or NaN", "nonfinite='drop'")):
        fc.combine(grads, fc.ConFIG(nonfinite="raise"), out=out, backend=backend)
    assert torch.equal(out, torch.full((4,), 7.0))


# GradientBuffer


class Linear(torch.nn.Linear):
    """A layer, a buffer over it with gradients of an earlier step, and losses for the next."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        super().__init__(3, 2, dtype=dtype)
        self.buf = fc.GradientBuffer(self.parameters(), num_losses=2)
        self.buf.backward(self.losses())
        self.buf.combine()
        self.before = self.written()

    def losses(self) -> list[torch.Tensor]:
        y = self(torch.ones(3, dtype=self.weight.dtype))
        return [y[0].square(), y[1].square() + y[0]]

    def written(self) -> list[torch.Tensor]:
        return [self.buf.rows.clone(), self.buf.grad.clone()]

    def assert_unwritten(self) -> None:
        assert all(torch.equal(a, b) for a, b in zip(self.written(), self.before, strict=True))
        self.assert_grads_in_place()

    def assert_grads_in_place(self) -> None:
        assert self.weight.grad.data_ptr() == self.buf.grad.data_ptr()


WEIGHT = torch.nn.Parameter(torch.ones(2))
BAD_BUFFERS = {
    "no parameters": ([], 2, ValueError, ("no parameters", "requires a gradient")),
    "all frozen": ([torch.ones(2)], 2, ValueError, ("no parameters", "requires a gradient")),
    "one tensor": (WEIGHT, 2, TypeError, ("parameters", "one Parameter", "model.parameters()")),
    "no parameters at all": (None, 2, TypeError, ("parameters", "NoneType", "model.parameters()")),
    "a module without": (torch.nn.Tanh(), 2, ValueError, ("no parameters", "requires a gradient")),
    "modules": ([torch.nn.Linear(1, 1)], 2, TypeError, ("parameters[0]", "Linear")),
    "some named": (
        [("weight", WEIGHT), WEIGHT],
        2,
        TypeError,
        ("parameters[1]", "Parameter", "give every parameter a name"),
    ),
    "two of one name": (
        [("weight", WEIGHT), ("weight", torch.nn.Parameter(torch.ones(2)))],
        2,
        ValueError,
        ("'weight' for two", "prefix='head'"),
    ),
    "not a leaf": ([WEIGHT * 2], 2, ValueError, ("parameters[0]", "not a leaf", "pass the parameter")),
    "sparse": ([torch.eye(2).to_sparse().requires_grad_()], 2, TypeError, ("parameters[0]", "sparse", "dense")),
    "no losses": ([WEIGHT], 0, ValueError, ("num_losses", "at least 1", "got 0")),
    "negative losses": ([WEIGHT], -1, ValueError, ("num_losses", "at least 1", "got -1")),
    "losses as float": ([WEIGHT], 2.0, TypeError, ("num_losses", "int", "2.0")),
    "losses as bool": ([WEIGHT], True, TypeError, ("num_losses", "int", "True")),
}


@pytest.mark.parametrize("name", BAD_BUFFERS)
def test_bad_buffers(name):
    parameters, num_losses, error, fragments = BAD_BUFFERS[name]
    with pytest.raises(error, match=mentions(*fragments)):
        fc.GradientBuffer(parameters, num_losses)


BAD_LOSSES = {
    "one": (lambda good: good[:1], ValueError, ("losses", "2 losses", "got 1")),
    "three": (lambda good: [*good, good[0]], ValueError, ("losses", "2 losses", "got 3")),
    "stacked": (torch.stack, TypeError, ("losses", "sequence or a dict of 2", "Tensor")),
    "generator": (iter, TypeError, ("losses", "sequence or a dict of 2", "iterator")),
    "detached": (
        lambda good: [good[0], good[1].detach()],
        ValueError,
        ("losses[1]", "does not require grad", "detach"),
    ),
    "several elements": (lambda good: [good[0], good[1].repeat(3)], ValueError, ("losses[1]", "(3,)", ".mean()")),
    "no element": (lambda good: [good[0], good[1].repeat(3)[:0]], ValueError, ("losses[1]", "(0,)", ".mean()")),
    "number": (lambda good: [good[0], 1.0], TypeError, ("losses[1]", "must be a tensor, a callable", "1.0")),
}


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_bad_losses(name):
    spoil, error, fragments = BAD_LOSSES[name]
    model = Linear()
    with pytest.raises(error, match=mentions(*fragments)):
        model.buf.backward(spoil(model.losses()))
    model.assert_unwritten()


@pytest.mark.parametrize(
    ("loss", "error", "fragments"),
    [
        (lambda: 1.0, TypeError, ("losses[1]", "tensor", "float")),
        (lambda: torch.ones(()), ValueError, ("losses[1]", "does not require grad")),
        (lambda: WEIGHT * 1.0, ValueError, ("losses[1]", "(2,)", ".mean()")),
        (lambda: {}["missing"], KeyError, ("missing",)),
    ],
    ids=["number", "detached", "several elements", "raises"],
)
def test_bad_callable_loss_zeroes_every_row(loss, error, fragments):
    model = Linear()
    with pytest.raises(error, match=mentions(*fragments)):
        model.buf.backward([lambda: 2.0 * model.losses()[0], loss])
    assert not model.buf.rows.any()  # else rows of two steps could be combined
    assert torch.equal(model.buf.grad, model.before[1])
    model.assert_grads_in_place()
    model.buf.backward(model.losses())
    model.assert_unwritten()


def test_exception_inside_record_zeroes_the_row_and_restores_the_grads():
    model = Linear()

    def backward_then_raise():
        model.losses()[1].backward()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), model.buf.record(0):
        backward_then_raise()
    assert not model.buf.rows[0].any()
    assert torch.equal(model.buf.rows[1], model.before[0][1])
    model.assert_grads_in_place()


@pytest.mark.parametrize("name", ["record", "combine", "zero", "backward"])
def test_inside_record_the_buffer_refuses_another_use(name):
    model = Linear()
    uses = {
        "record": lambda: model.buf.record(1).__enter__(),
        "combine": model.buf.combine,
        "zero": model.buf.zero,
        "backward": lambda: model.buf.backward(model.losses()),
    }
    with model.buf.record(0):
        model.losses()[0].backward()
        with pytest.raises(RuntimeError, match=mentions("inside record(0)", "leave that `with` block first")):
            uses[name]()
        model.losses()[0].backward()
    torch.testing.assert_close(model.buf.rows[0], 2.0 * model.before[0][0])
    assert torch.equal(model.buf.rows[1], model.before[0][1])
    model.assert_grads_in_place()


@pytest.mark.parametrize(
    ("loss", "error"), [(2, IndexError), (-1, IndexError), (True, TypeError), (0.0, TypeError), ("a", TypeError)]
)
def test_record_of_no_such_loss(loss, error):
    model = Linear()
    with pytest.raises(error, match=mentions("loss", repr(loss))), model.buf.record(loss):
        pytest.fail("the block was entered")
    model.assert_unwritten()


REPLACEMENTS = {
    "assigned data": lambda model: setattr(model.weight, "data", model.weight.data.clone()),
    "other dtype": lambda model: model.double(),
    "half precision": lambda model: model.half(),
    "same storage, other shape": lambda model: setattr(model.weight, "data", model.weight.data.view(3, 2)),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_replaced_storage(name):
    model = Linear()
    model.before = model.written()
    REPLACEMENTS[name](model)
    words = mentions("parameter 0", "shape (2, 3)", "storage replaced", "make a new GradientBuffer")
    with pytest.raises(RuntimeError, match=words), model.buf.record(0):
        pytest.fail("the block was entered")
    with pytest.raises(RuntimeError, match=words):
        model.buf.combine()
    assert all(torch.equal(a, b) for a, b in zip(model.written(), model.before, strict=True))


@pytest.mark.parametrize(
    ("method", "error"),
    [
        (fc.ConFIG([1.0]), ValueError),
        (fc.ConFIG(length=5), ValueError),
        (fc.ConFIG(length=raise_from_length), ArithmeticError),
        (Returning(torch.ones(5)), ValueError),
        (fc.ConFIG, TypeError),
        (fc.ConFIG(nonfinite="raise"), FloatingPointError),
    ],
    ids=["weights", "length", "callable", "method", "class", "not finite"],
)
@pytest.mark.parametrize("segments", [1, 2])
def test_failed_combination_of_a_buffer_writes_nothing(method, error, segments):
    parameters = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.float64)[:segments]]
    buf = fc.GradientBuffer(parameters, num_losses=3)
    buf.backward([sum(p.double().pow(k).sum() for p in parameters) for k in (1, 2, 3)])
    buf.combine()
    for segment in buf.segments:
        segment.rows[0, 0] = math.inf
    kept = [(segment.grad.clone(), parameter.grad) for segment, parameter in zip(buf.segments, parameters, strict=True)]
    with pytest.raises(error):
        buf.combine(method)
    for segment, parameter, (grad, attribute) in zip(buf.segments, parameters, kept, strict=True):
        assert torch.equal(segment.grad, grad)
        assert parameter.grad is attribute


@pytest.mark.parametrize("what", ["matrix", "vectors", "out", "gramian", "graddrop"])
def test_a_storage_that_was_emptied(what):
    """As fully sharded models free what they gathered; PyTorch's own operations end the process there."""
    block, vector, out = torch.randn(2, 300), torch.randn(300), torch.zeros(300)
    emptied = {"vectors": vector, "out": out}.get(what, block)
    emptied.untyped_storage().resize_(0)
    calls = {
        "matrix": lambda: fc.combine(block, out=out, backend="cpu"),
        "vectors": lambda: fc.combine([torch.randn(300), vector], out=out, backend="cpu"),
        "out": lambda: fc.combine(block, out=out, backend="cpu"),
        "gramian": lambda: fc.gramian(block, backend="cpu"),
        "graddrop": lambda: fc.combine(block, fc.GradDrop(), out=out, backend="cpu"),
    }
    name = {"vectors": "grads[1]", "out": "out"}.get(what, "grads")
    with pytest.raises(ValueError, match=re.escape(f"{name} has no memory: its storage was emptied")):
        calls[what]()
    assert what == "out" or not out.any()
