"""ConflictMonitor: what it records against what a Combination says and numpy finds, where it writes, what it draws."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastconfig as fc
from fastconfig.conflict import monitor as monitor_module
from fastconfig.conflict.history import columns_of

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

NAMES = ["pde", "boundary", "initial"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.tensor(1.2))

    def forward(self, x):
        return self.head(self.body(x).tanh()) * self.gain


def problem(num_losses=NAMES, dtype=torch.float32):
    torch.manual_seed(0)
    model = Net().to(dtype)
    return model, fc.GradientBuffer(model, num_losses), torch.randn(5, 4, dtype=dtype)


def losses_of(model, x):
    y = model(x)
    return [y[:, 0].square().mean(), (y[:, 0] + y[:, 1] - 1.0).abs().sum(), (y[:, 2] - y[:, 0]).pow(3).mean()]


def train(model, buf, x, steps, each, method=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        buf.backward(losses_of(model, x + 0.1 * step))
        each(buf.combine(method))
        optimizer.step()


def combination(gramian, weights):
    gramian, weights = (torch.tensor(values, dtype=torch.float64) for values in (gramian, weights))
    return fc.Combination(gramian, weights, 1e-12)


def recorded(*combinations, names=None):
    source = SimpleNamespace(names=tuple(names or map(str, range(len(combinations[0].weights)))), combination=None)
    monitor = fc.ConflictMonitor(source)
    for each in combinations:
        monitor.record(each)
    return monitor


# What is recorded


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_a_record_is_what_the_combination_says(monkeypatch, batch):
    monkeypatch.setattr(monitor_module, "_LARGEST_BATCH", batch)
    model, buf, x = problem()
    infos = []
    with fc.ConflictMonitor(buf) as monitor:
        train(model, buf, x, 8, lambda info: (infos.append(info), monitor.step()))
    history = monitor.history
    assert history.names == tuple(NAMES)
    assert history.pairs == [(0, 1), (0, 2), (1, 2)]
    assert history.steps.tolist() == list(range(8))
    for t, info in enumerate(infos):
        cosines = info.cosines.numpy()
        np.testing.assert_allclose(history.norms[t], info.norms.numpy(), rtol=1e-14)
        np.testing.assert_allclose(history.cosines[t], [cosines[i, j] for i, j in history.pairs], atol=1e-15)
        np.testing.assert_array_equal(history.weights[t], info.weights.numpy())
        np.testing.assert_allclose(history.decreases[t], (info.gramian @ info.weights).numpy(), rtol=1e-12)
        assert history.ranks[t] == info.rank == 3
        np.testing.assert_allclose(history.conditions[t], np.linalg.cond(cosines), rtol=1e-9)
        assert history.conflict_rates[t] == sum(cosines[i, j] < 0 for i, j in history.pairs) / 3
    assert 0 < history.conflict_rates.mean() < 1
    np.testing.assert_allclose(history.mean_cosines(), np.mean([i.cosines.numpy() for i in infos], axis=0), atol=1e-14)


def test_the_predicted_decrease_is_what_a_small_step_brings():
    model, buf, x = problem(dtype=torch.float64)
    monitor = fc.ConflictMonitor(buf)
    before = torch.stack(losses_of(model, x)).detach()
    buf.backward(losses_of(model, x))
    monitor.record(buf.combine())
    torch.optim.SGD(model.parameters(), lr=1e-7).step()
    after = torch.stack(losses_of(model, x)).detach()
    torch.testing.assert_close((before - after) / 1e-7, torch.tensor(monitor.history.decreases[0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("gramian", "weights", "cosines", "decreases", "rate", "rank", "condition"),
    [
        ([[4.0, -2.0], [-2.0, 1.0]], [0.0, 0.0], [-1.0], [0.0, 0.0], 1.0, 1, math.inf),
        ([[4.0, 2.0], [2.0, 1.0]], [1.0, 1.0], [1.0], [6.0, 3.0], 0.0, 1, math.inf),
        ([[4.0, 0.0], [0.0, 0.0]], [1.0, 0.0], [math.nan], [4.0, 0.0], math.nan, 1, 1.0),
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0], [math.nan], [0.0, 0.0], math.nan, 0, math.nan),
        ([[9.0]], [0.5], [], [4.5], math.nan, 1, 1.0),
        (
            [[1.0, math.nan, -1.0], [math.nan] * 3, [-1.0, math.nan, 4.0]],
            [1.0, 0.0, 1.0],
            [math.nan, -0.5, math.nan],
            [0.0, math.nan, 3.0],
            1.0,
            2,
            3.0,
        ),
        ([[1.0, math.inf], [math.inf, math.inf]], [1.0, 0.0], [math.nan], [1.0, math.inf], math.nan, 1, 1.0),
    ],
    ids=["opposed", "duplicate", "zero", "all zero", "one loss", "dropped", "infinite"],
)
def test_degenerate_gradients(gramian, weights, cosines, decreases, rate, rank, condition):
    history = recorded(combination(gramian, weights)).history
    np.testing.assert_array_equal(history.cosines[0], cosines)
    np.testing.assert_array_equal(history.decreases[0], decreases)
    np.testing.assert_array_equal(history.conflict_rates, [rate])
    assert history.ranks.tolist() == [rank]
    np.testing.assert_allclose(history.conditions, [condition], rtol=1e-14)


def test_a_gradient_without_direction_takes_no_part_in_a_mean():
    zero = combination([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0])
    history = recorded(zero, combination([[1.0, -0.5], [-0.5, 1.0]], [1.0, 1.0]), zero).history
    assert history.mean_cosines().tolist() == [[1.0, -0.5], [-0.5, 1.0]]
    assert np.isnan(recorded(zero).history.mean_cosines()[0, 1])


def test_every_records_one_step_in_so_many_and_counts_them_all():
    model, buf, x = problem()
    monitor = fc.ConflictMonitor(buf, every=3, first_step=100)
    infos = []
    train(model, buf, x, 8, lambda info: (infos.append(info), monitor.step()))
    assert monitor.history.steps.tolist() == [100, 103, 106]
    np.testing.assert_array_equal(monitor.history.weights, [infos[i].weights.numpy() for i in (0, 3, 6)])


class Operations(TorchDispatchMode):
    """What torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_between_batches_a_step_is_two_small_copies():
    """Nothing else is asked of the device: no reading (item, tolist, bool), no arithmetic."""
    model, buf, x = problem()
    monitor = fc.ConflictMonitor(buf)
    for steps in (1, 5):  # the first one makes room
        train(model, buf, x, 1, lambda info: monitor.step())
        with Operations() as operations:
            for _ in range(steps):
                monitor.step()
    assert operations.names == ["aten.copy_.default"] * 10


def test_a_record_is_not_touched_by_what_is_combined_later():
    """As of a step in a captured graph, whose K and c lie in one place."""
    kept = combination([[4.0, 1.0], [1.0, 1.0]], [1.0, 2.0])
    monitor = recorded(kept)
    kept.gramian.zero_()
    kept.weights.zero_()
    monitor.record(kept)
    assert monitor.history.norms.tolist() == [[2.0, 1.0], [0.0, 0.0]]
    assert monitor.history.weights.tolist() == [[1.0, 2.0], [0.0, 0.0]]


def test_a_monitor_begun_under_inference_mode_goes_on_outside():
    one = combination([[4.0]], [1.0])
    with torch.inference_mode():
        monitor = recorded(one)
    monitor.record(one)
    assert len(monitor.history) == 2


def test_an_optimizer_is_monitored_by_its_averages():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(5, 4)
    optimizer = fc.optim.MConFIG(model.parameters(), lr=1e-3, num_losses=NAMES)
    monitor = fc.ConflictMonitor(optimizer)
    infos = []
    for _ in range(6):
        with optimizer.record(i := optimizer.next_loss()):
            losses_of(model, x)[NAMES.index(i)].backward()
        optimizer.step()
        monitor.step()
        infos.append(optimizer.combination)
    history = monitor.history
    assert history.ranks.tolist() == [1, 2, 3, 3, 3, 3]
    np.testing.assert_array_equal(history.weights, [info.weights.numpy() for info in infos])
    np.testing.assert_array_equal(history.norms, [info.norms.numpy() for info in infos])
    with pytest.raises(TypeError, match="GradientBuffer, whose rows hold gradients, got MConFIG"):
        monitor.by_module()


# Where it goes

ODD_NAMES = ["a,b", 'say "c"', "d.e"]


def test_the_file_reads_back_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor_module, "_LARGEST_BATCH", 4)
    path = tmp_path / "run.csv"
    model, buf, x = problem(ODD_NAMES)
    monitor = fc.ConflictMonitor(buf, csv=path)
    lines = []
    train(model, buf, x, 6, lambda info: (monitor.step(), lines.append(path.read_text().count("\n"))))
    assert lines == [1, 1, 1, 5, 5, 5]
    zero = combination(np.zeros((3, 3)).tolist(), [0.0, -0.0, math.nan])
    monitor.record(zero)
    monitor.close()
    read = fc.ConflictHistory.read_csv(path)
    assert read.names == tuple(ODD_NAMES)
    assert len(read) == 7
    assert read.table.tobytes() == monitor.history.table.tobytes()
    assert path.read_text().splitlines()[0].startswith('step,"norm.a,b","norm.say ""c""",norm.d.e,"cosine.a,b.say')


def test_a_run_that_is_resumed_goes_on_in_its_file(tmp_path):
    path = tmp_path / "run.csv"
    model, buf, x = problem()
    for first in (0, 4):
        with fc.ConflictMonitor(buf, csv=path, existing="append", first_step=first, memory=False) as monitor:
            train(model, buf, x, 4, lambda info, monitor=monitor: monitor.step())
    assert fc.ConflictHistory.read_csv(path).steps.tolist() == list(range(8))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"first_step must be over 7, the last in .*, got 7"):
        fc.ConflictMonitor(buf, csv=path, existing="append", first_step=7)
    other = fc.GradientBuffer(model, ["pde", "boundary"])
    with pytest.raises(
        ValueError, match=r"is of the losses \['pde', 'boundary', 'initial'\], not \['pde', 'boundary'\]"
    ):
        fc.ConflictMonitor(other, csv=path, existing="append")
    assert path.read_bytes() == before
    with pytest.raises(RuntimeError, match=r"memory=False.*ConflictHistory.read_csv"):
        monitor.plot(tmp_path / "run.png")


def test_a_script_may_be_run_again_and_again(tmp_path):
    """The default loses nothing; the other choices are said."""
    path = tmp_path / "run.csv"
    model, buf, x = problem()

    def run(**options):
        with fc.ConflictMonitor(buf, csv=path, **options) as monitor:
            train(model, buf, x, 4, lambda info: monitor.step())
        return {found.name: len(fc.ConflictHistory.read_csv(found)) for found in tmp_path.iterdir()}

    assert run() == {"run.csv": 4}
    first = path.read_bytes()
    assert run() == {"run.csv": 4, "run.1.csv": 4}
    assert (tmp_path / "run.1.csv").read_bytes() == first
    assert run(existing="append") == {"run.csv": 8, "run.1.csv": 4}
    assert fc.ConflictHistory.read_csv(path).steps.tolist() == list(range(8))
    assert run() == {"run.csv": 4, "run.1.csv": 4, "run.2.csv": 8}
    assert run(existing="overwrite") == {"run.csv": 4, "run.1.csv": 4, "run.2.csv": 8}
    with pytest.raises(ValueError, match="existing must be one of 'keep', 'overwrite', 'append', got 'ask'"):
        run(existing="ask")


def test_what_a_killed_run_left_is_gone_on_with(tmp_path):
    path = tmp_path / "run.csv"
    model, buf, x = problem()
    path.touch()  # killed before the first line
    with fc.ConflictMonitor(buf, csv=path, existing="append") as monitor:
        train(model, buf, x, 4, lambda info: monitor.step())
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.warns(UserWarning, match=r"run.csv' ends in the middle of a line, which is removed"):
        monitor = fc.ConflictMonitor(buf, csv=path, existing="append")
    train(model, buf, x, 2, lambda info: monitor.step())
    monitor.close()
    assert fc.ConflictHistory.read_csv(path).steps.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [0, 1, 30])
def test_a_run_killed_within_its_first_line_is_begun_anew(tmp_path, size):
    path = tmp_path / "run.csv"
    model, buf, x = problem()
    fc.ConflictMonitor(buf, csv=path).close()
    path.write_bytes(path.read_bytes()[:size])
    with fc.ConflictMonitor(buf, csv=path, existing="append") as monitor:
        train(model, buf, x, 2, lambda info: monitor.step())
    assert fc.ConflictHistory.read_csv(path).steps.tolist() == [0, 1]


@pytest.mark.parametrize("content", ["a,b\n1,2\n3", "no table", "\udcff\n"])
def test_another_file_is_not_appended_to_and_stays_as_it_is(tmp_path, content):
    path = tmp_path / "run.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    _, buf, _ = problem()
    with pytest.raises(ValueError, match=r"run.csv' is no file of a ConflictMonitor"):
        fc.ConflictMonitor(buf, csv=path, existing="append")
    assert path.read_bytes() == content.encode(errors="surrogateescape")


def test_only_files_are_moved_aside(tmp_path):
    _, buf, _ = problem()
    folder = tmp_path / "run.csv"
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        fc.ConflictMonitor(buf, csv=folder)
    assert list(tmp_path.iterdir()) == [folder]
    device = Path("/dev/null")
    fc.ConflictMonitor(buf, csv=device).close()
    assert device.is_char_device()


def test_what_is_printed(tmp_path):
    model, buf, x = problem()
    monitor = fc.ConflictMonitor(buf, csv=tmp_path / "run.csv", every=2)
    train(model, buf, x, 4, lambda info: monitor.step())
    names = "losses=['pde', 'boundary', 'initial']"
    assert repr(monitor) == f"ConflictMonitor({names}, 2 records, every=2, csv={str(tmp_path / 'run.csv')!r})"
    assert repr(monitor.history) == f"ConflictHistory({names}, 2 records, steps 0 to 2)"
    table = monitor.by_module()
    head, *rows = str(table).splitlines()
    assert head.split("  ")[0] == "module"
    assert len(rows) == len(table)
    for line, row in zip(rows, table, strict=True):
        assert line.startswith(row.module or "(the model)")
        assert f"{row.worst_cosine:.4g}" in line
    assert str(table[:1]).splitlines()[1].split() == rows[0].split()
    monitor.close()
    monitor = fc.ConflictMonitor(buf, csv=tmp_path / "run.csv")
    assert len(fc.ConflictHistory.read_csv(tmp_path / "run.1.csv")) == 2
    assert repr(monitor.history) == f"ConflictHistory({names}, 0 records)"


def test_an_absent_loss_is_a_gap_everywhere(tmp_path):
    model, buf, x = problem()
    writer = Writer()
    monitor = fc.ConflictMonitor(buf, csv=tmp_path / "run.csv", writer=writer, modules_every=1)
    for step in range(6):
        losses = losses_of(model, x)
        buf.backward([losses[0], None if step % 2 else losses[1], losses[2]])
        buf.combine()
        monitor.step()
    monitor.close()
    history = monitor.history
    gaps = [False, True] * 3
    for values in (history.norms, history.weights, history.decreases):
        assert np.isnan(values[:, 1]).tolist() == gaps
        assert np.isfinite(values[:, [0, 2]]).all()
    assert np.isnan(history.cosines).tolist() == [[gap, False, gap] for gap in gaps]
    assert history.ranks.tolist() == [3, 2] * 3
    read = fc.ConflictHistory.read_csv(tmp_path / "run.csv")
    assert read.table.tobytes() == history.table.tobytes()
    assert history.to_pandas()["norm.boundary"].isna().tolist() == gaps
    assert [step for tag, step in writer.scalars if tag == "conflict/norm/boundary"] == [0, 2, 4]
    assert [step for tag, step in writer.scalars if tag == "conflict/norm/pde"] == list(range(6))
    whole = sum(row.norm_share for row in monitor.by_module())
    assert whole == pytest.approx(1.0)


def test_the_picture_of_a_loss_that_is_often_absent_shows_its_points(tmp_path):
    """Alone between two gaps a point is no line, and is drawn as a dot."""
    from fastconfig.conflict.figure import _draw

    table = monitor_module.ConflictHistory.of(
        ["pde", "data"],
        list(range(60)),
        np.tile(np.eye(2), (60, 1, 1)),
        np.ones((60, 2)),
        [1e-12] * 60,
        [(1,) if step % 2 else () for step in range(60)],
    )
    norms = _draw(table).axes[4]
    dots = [line for line in norms.get_lines() if line.get_linestyle() == "None" and len(line.get_xdata())]
    assert len(dots) == 1
    assert dots[0].get_xdata().tolist() == list(range(0, 60, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "first line"),
        ("step,loss\n1,2\n", "first line"),
        (
            "step,norm.a,weight.a,decrease.a,conflict_rate,rank,condition\n0,1.0,1.0,1.0,nan,1,1.0\n1,1.0,",
            "middle|number of",
        ),
        ("step,norm.a,weight.a,decrease.a,conflict_rate,rank,condition\n0,1.0,1.0,1.0,nan,1,1.", "middle of a line"),
        ("step,norm.a,weight.a,decrease.a,conflict_rate,rank,condition\n0,1.0\n", "middle of a line"),
        ("step,norm.a,weight.a,decrease.a,conflict_rate,rank,condition\n0,1.0,1.0,1.0,nan,1,x\n", "could not convert"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, message):
    path = tmp_path / "run.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"run.csv.*({message})"):
        fc.ConflictHistory.read_csv(path)


def test_what_was_recorded_before_an_exception_is_written(tmp_path):
    path = tmp_path / "run.csv"
    model, buf, x = problem()

    def diverge():
        with fc.ConflictMonitor(buf, csv=path) as monitor:
            train(model, buf, x, 2, lambda info: monitor.step())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        diverge()
    assert len(fc.ConflictHistory.read_csv(path)) == 2


class Writer:
    """What a monitor asks of a TensorBoard's SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag, scalar_value, global_step):
        assert isinstance(scalar_value, float)
        assert (tag, global_step) not in self.scalars
        self.scalars[tag, global_step] = scalar_value


def test_a_writer_takes_every_number():
    model, buf, x = problem()
    writer = Writer()
    with fc.ConflictMonitor(buf, writer=writer) as monitor:
        train(model, buf, x, 3, lambda info: monitor.step())
    history = monitor.history
    assert len(writer.scalars) == 3 * history.table.shape[1]  # the step is no number of its own; the worst cosine is
    for t in range(3):
        assert writer.scalars["conflict/norm/boundary", t] == history.norms[t, 1]
        assert writer.scalars["conflict/cosine/pde.initial", t] == history.cosines[t, 1]
        assert writer.scalars["conflict/worst_cosine", t] == history.cosines[t].min()
        assert writer.scalars["conflict/condition", t] == history.conditions[t]


def test_of_many_losses_a_writer_takes_the_worst_pair_alone():
    gramian = torch.eye(12, dtype=torch.float64)
    gramian[3, 7] = gramian[7, 3] = -0.25
    source = SimpleNamespace(names=tuple(map(str, range(12))), combination=None)
    writer = Writer()
    with fc.ConflictMonitor(source, writer=writer) as monitor:
        monitor.record(fc.Combination(gramian, torch.ones(12, dtype=torch.float64), 1e-12))
    assert writer.scalars["conflict/worst_cosine", 0] == -0.25
    assert len(writer.scalars) == 3 * 12 + 4


def test_pandas_takes_the_columns_by_name():
    pytest.importorskip("pandas")
    model, buf, x = problem()
    monitor = fc.ConflictMonitor(buf, every=2)
    train(model, buf, x, 5, lambda info: monitor.step())
    frame = monitor.to_pandas()
    assert frame.index.tolist() == [0, 2, 4]
    assert frame.index.name == "step"
    assert frame.columns.tolist() == columns_of(NAMES)[1:]
    assert frame["rank"].tolist() == [3, 3, 3]
    np.testing.assert_array_equal(frame["cosine.pde.initial"], monitor.history.cosines[:, 1])


# The modules


def gradients_by_module(model, x):
    """For each module with parameters of its own, (3, n_module) by autograd alone."""
    parts = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            rows = [torch.autograd.grad(losses_of(model, x)[i], own) for i in range(3)]
            parts[name] = np.array([np.concatenate([gradient.flatten() for gradient in row]) for row in rows])
    return parts


def test_modules_are_ranked_by_what_autograd_says_of_them():
    model, buf, x = problem(dtype=torch.float64)
    monitor = fc.ConflictMonitor(buf, modules_every=2)
    cosines, shares = {}, {}
    for step in range(5):
        batch = x + 0.3 * step
        if step % 2 == 0:
            parts = gradients_by_module(model, batch)
            whole = sum((part**2).sum(axis=1) for part in parts.values())
            for name, part in parts.items():
                unit = part / np.linalg.norm(part, axis=1, keepdims=True)
                cosines.setdefault(name, []).append([unit[i] @ unit[j] for i, j in ((0, 1), (0, 2), (1, 2))])
                shares.setdefault(name, []).append(((part**2).sum(axis=1) / whole).mean())
        buf.backward(losses_of(model, batch))
        buf.combine()
        monitor.step()
        torch.optim.SGD(model.parameters(), lr=0.05).step()
    ranking = monitor.by_module()
    assert {row.module for row in ranking} == {"", "body", "head"}
    assert [row.worst_cosine for row in ranking] == sorted(row.worst_cosine for row in ranking)
    for row in ranking:
        mean = np.mean(cosines[row.module], axis=0)
        assert row.worst_cosine == pytest.approx(mean.min(), abs=1e-12)
        assert row.pair == [("pde", "boundary"), ("pde", "initial"), ("boundary", "initial")][mean.argmin()]
        assert row.conflict_rate == np.mean(np.array(cosines[row.module]) < 0)
        assert row.norm_share == pytest.approx(np.mean(shares[row.module]), abs=1e-12)
    assert sum(row.norm_share for row in ranking) == pytest.approx(1.0)


def test_a_module_that_one_loss_alone_reaches_comes_last():
    """As a task's head. Where nothing was looked at so far, the rows are, as they are now."""
    body, heads = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    model = nn.ModuleDict({"heads": heads, "body": body})
    buf = fc.GradientBuffer(model, ["left", "right"])
    shared = body(torch.ones(2))
    monitor = fc.ConflictMonitor(buf)
    assert all(math.isnan(row.worst_cosine) and row.norm_share == 0 for row in monitor.by_module())
    buf.backward([heads[0](shared).sum(), heads[1](shared).sum()])
    body_row, *head_rows = monitor.by_module()
    left, right = buf.segments[0].views(buf.rows[0])[-2:], buf.segments[0].views(buf.rows[1])[-2:]
    left, right = (torch.cat([view.flatten() for view in views]) for views in (left, right))
    assert body_row.module == "body"
    assert body_row.worst_cosine == pytest.approx(float(torch.cosine_similarity(left, right, dim=0)), abs=1e-6)
    assert [row.module for row in head_rows] == ["heads.0", "heads.1"]
    for row in head_rows:
        assert row.pair is None
        assert math.isnan(row.worst_cosine)
        assert math.isnan(row.conflict_rate)
        assert 0 < row.norm_share < 1


def test_a_look_at_gradients_that_are_not_finite_leaves_the_others_whole():
    model, buf, x = problem()
    monitor = fc.ConflictMonitor(buf)
    buf.backward(losses_of(model, x))
    squares = {name: gramian.diagonal().numpy() for name, gramian in buf.gramian(by="module").items()}
    shares = {name: square / sum(squares.values()) for name, square in squares.items()}
    monitor.look_at_modules()
    once = {row.module: row for row in monitor.by_module()}
    buf.rows[1].fill_(math.nan)
    monitor.look_at_modules()
    for row in monitor.by_module():
        assert row.worst_cosine == pytest.approx(once[row.module].worst_cosine, abs=1e-12)
        assert row.pair == once[row.module].pair
        assert row.norm_share == pytest.approx(shares[row.module] @ [2.0, 1.0, 2.0] / 5.0)


# The picture


def drawn(m, steps=6):
    rng = np.random.default_rng(m)
    names = [f"loss of task {i}" for i in range(m)]
    rows = rng.normal(size=(steps, m, m + 3)) + rng.normal(size=(m, m + 3))
    kept = [combination((g @ g.T).tolist(), np.abs(rng.normal(size=m)).tolist()) for g in rows]
    return recorded(*kept, names=names), names


@pytest.mark.parametrize("m", [1, 3, 10, 40])
def test_the_picture_labels_every_loss_and_centres_its_colours_on_0(tmp_path, m):
    pytest.importorskip("matplotlib")
    from fastconfig.conflict import figure as conflict_figure

    monitor, names = drawn(m)
    monitor.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["run.png"]

    figure = conflict_figure._draw(monitor.history)
    heat_map, _, pairs, cosines, norms, weights, rate = figure.axes[:7]
    assert [label.get_text() for label in heat_map.get_xticklabels()] == names
    assert [label.get_text() for label in heat_map.get_yticklabels()] == names
    (image,) = heat_map.get_images()
    assert image.get_clim() == (-1.0, 1.0)
    assert image.get_cmap()(0.5)[:3] == pytest.approx((1.0, 1.0, 1.0), abs=0.05)
    np.testing.assert_array_equal(image.get_array(), monitor.history.mean_cosines())
    for ax in (norms, weights):
        shown = ax.get_yticklabels() if ax.get_images() else ax.get_legend().get_texts()
        assert [label.get_text() for label in shown] == names
    worst = np.nanmin(monitor.history.mean_cosines()) if m > 1 else None
    assert [bar.get_width() for bar in pairs.patches][:1] == ([worst] if m > 1 else [])
    assert bool(rate.get_lines()) == (m > 1)
    assert cosines.get_ylim() == pytest.approx((-1.05, 1.05))


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_the_picture_survives_gaps_odd_names_and_negative_weights(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    hole = combination([[math.nan, math.nan], [math.nan, 0.0]], [math.nan, -1.0])
    monitor = recorded(hole, combination([[1.0, -1.0], [-1.0, 1.0]], [0.0, 2.0]), names=["_a", "b$^_\\$" * 9])
    monitor.plot(tmp_path / f"run.{suffix}")
    assert (tmp_path / f"run.{suffix}").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"path must end in .png, .svg, .pdf, got .*run.jpg"):
        monitor.plot(tmp_path / "run.jpg")


# What is refused


def test_nothing_to_record_or_draw(tmp_path):
    model, buf, x = problem()
    monitor = fc.ConflictMonitor(buf)
    with pytest.raises(RuntimeError, match="nothing was combined yet"):
        monitor.step()
    with pytest.raises(RuntimeError, match="nothing was recorded yet"):
        monitor.plot(tmp_path / "run.png")
    assert len(monitor.history) == 0
    assert monitor.history.cosines.shape == (0, 3)
    train(model, buf, x, 1, lambda info: monitor.step())
    monitor.close()
    with pytest.raises(RuntimeError, match="closed"):
        monitor.step()
    assert len(monitor.history) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"buffer": object()}, TypeError, "buffer must be a GradientBuffer, an MConFIG or a list of names, got object"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 1.5}, TypeError, "every must be an int, got 1.5"),
        ({"first_step": -1}, ValueError, "first_step must be at least 0, got -1"),
        ({"modules_every": True}, TypeError, "modules_every must be an int, got True"),
        ({"writer": "runs"}, TypeError, "writer must have add_scalar.*'runs'"),
        ({"modules_every": 1}, ValueError, r"GradientBuffer\(model, ...\)"),
    ],
)
def test_bad_arguments(tmp_path, options, error, message):
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        fc.ConflictMonitor(**{"buffer": fc.GradientBuffer([weight], 2), "csv": tmp_path / "run.csv", **options})
    assert not list(tmp_path.iterdir())


def test_bad_combinations():
    monitor = recorded(combination([[1.0]], [1.0]))
    with pytest.raises(TypeError, match=r"combination must be what combine returned, got 3"):
        monitor.record(3)
    with pytest.raises(ValueError, match="the buffer's 1 losses, got one of 2"):
        monitor.record(combination([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0]))


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("pandas", lambda monitor, path: monitor.to_pandas()),
        ("matplotlib", lambda monitor, path: monitor.plot(path)),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path, package, use):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}, which is not installed; pip install {package}$"):
        use(recorded(combination([[1.0]], [1.0])), tmp_path / "run.png")
