"""Combination at the features: losses go back to what the trunk hands over, one combination goes on through the trunk.

Sener & Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018, section 3.3 (MGDA-UB).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.compiler import is_dynamo_compiling

from fastconfig.backends.rows import Rows
from fastconfig.backends.rules import NonFiniteError
from fastconfig.gradients.across import Batch
from fastconfig.gradients.combination import (
    Combination,
    Scaler,
    checked_method,
    combine_segments,
    overflow_of,
    rtol_of,
    scale_of,
)
from fastconfig.gradients.graph import Behind, Edge, Heads, Part, computes_what_is_asked, edge_of, look_behind
from fastconfig.gradients.local import is_sharded
from fastconfig.gradients.losses import Loss, Losses
from fastconfig.gradients.memory import fresh
from fastconfig.gradients.processes import Sync
from fastconfig.gradients.ranks import Ranks, is_group, world
from fastconfig.methods import Method, StreamingMethod
from fastconfig.validation import FLOAT_DTYPES, REAL_OF_COMPLEX, check_rows

Bypass = Literal["error", "sum"]
"""What becomes of a gradient that reaches, around the features, what lies behind them."""

FREED_BYTES = 1 << 20
"""From so many bytes of gradients in front of the features on, what heads have saved is freed at once. That takes a
pass over their nodes, 5 µs each; less is freed with the losses."""


def backward(
    losses: Sequence[Loss] | Mapping[str, Loss],
    *,
    features: Tensor | Sequence[Tensor],
    method: Method | StreamingMethod | str | None = None,
    scaler: Scaler | None = None,
    retain_graph: bool = False,
    bypass: Bypass = "error",
    sync: Sync = "auto",
) -> Combination:
    """Backpropagate the losses to the features, combine them there, and the combination once through the trunk.

    One pass through the trunk instead of m, and rows as long as the features instead of the parameters. Every ``.grad``
    accumulates as after ``backward()``: heads get their own losses' gradients, as they are, the trunk Σ c_i ∂L_i/∂z
    carried on through z = ``features``. There is nothing to make beforehand, and nothing but ``zero_grad()`` to
    remember.

    **What it promises.** The rule holds at the features: by ConFIG the combination has the same positive cosine with
    each loss's gradient of the features: a small step of *the features* against it lowers every loss. **What it does
    not:** the parameters' gradients may still conflict with the update that comes of it, as ∂z/∂θ changes angles. What
    is minimised is an upper bound (Sener & Koltun 2018, section 3.3), which helps as far as the trunk lets features
    move freely. And features have columns for each sample: losses of different samples, as those of the interior and
    of the boundary in a physics-informed network, never conflict here, however they do at the parameters. Where the
    promise must hold there, use ``GradientBuffer``.

    Args:
        losses: as of ``GradientBuffer.backward``: tensors of one element, computed from the features; callables that
            return one, called and backpropagated one by one; None for a loss without labels in this batch. Or a dict of
            them by name.
        features: what the losses share: one tensor, or several of any shapes, dtypes and devices, also where one is
            computed from another, as the levels of an encoder. Their Gramians add up. A leaf, as from ``detach()``
            and ``requires_grad_()``, gets the combination as its ``.grad``.
        method: the rule from the Gramian to the weights, or the name of one, as in ``fc.combine``; ``ConFIG()`` by
            default. One that remembers is to be made once.
        scaler: as in ``GradientBuffer.combine``: the ``torch.amp.GradScaler`` by which the losses were multiplied.
        retain_graph: keep the graph, for another backward pass.
        bypass: a loss may reach parameters of the trunk around the features, too: weights that are tied to a head's,
            derivatives of the output by the input, a penalty on the weights. What goes around is not combined. So
            ``"error"`` refuses; ``"sum"`` adds it to their ``.grad`` as it is.
        sync: on several processes, whose batches are parts of one: the process group, over which the Gramian is summed,
            so that all take the same weights, those of the whole batch (each rank's loss being the mean over its part,
            and gradients averaged, as DistributedDataParallel and FSDP2 do). None: every process for itself.
            ``"auto"``: one process; where there are several, an error that asks.

    Returns:
        The ``Combination`` at the features: their cosines, norms and the weights. A ``ConflictMonitor`` takes it by
        ``record``.

    Raises:
        TypeError: a loss that is neither a tensor nor a callable nor None; features that are no plain dense tensors of
            floating-point or complex numbers; no method.
        ValueError: no loss, or every one None; one of several elements; features that need no gradient, are given
            twice, or that no loss is computed from; a method by name that remembers; ``bypass`` as above.
        RuntimeError: several processes and ``sync="auto"``.
        FloatingPointError: a gradient is not finite and the method raises on it; the trunk is left as it was.

        Losses given as tensors are all checked before anything is written. Where a pass or a callable raises, heads of
        the losses before it have their gradients.

    Hooks of the features themselves (``z.register_hook``) are called once, with the combination.

    Example:
        >>> import torch, fastconfig as fc
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(3)]
        >>> z = trunk(torch.ones(16, 4)).tanh()
        >>> info = fc.backward([head(z).square().mean() for head in heads], features=z, method="mgda")
        >>> info.weights.shape, trunk.weight.grad.shape
        (torch.Size([3]), torch.Size([8, 4]))
    """
    if is_dynamo_compiling():  # it runs autograd, which stays outside of graphs
        eager: Callable[..., Combination] = torch.compiler.disable(backward)
        return eager(
            losses,
            features=features,
            method=method,
            scaler=scaler,
            retain_graph=retain_graph,
            bypass=bypass,
            sync=sync,
        )
    boundary = Boundary(features)
    called, given = _in_order(losses)
    ranks = _ranks_of(sync)
    together = None if ranks is None else Batch(ranks, len(called), boundary.home)
    try:
        called.check(given, may_all_be_absent=together is not None)
        if bypass not in get_args(Bypass):
            raise ValueError(f"bypass must be 'error' or 'sum', got {bypass!r}")
        rule = checked_method(method, len(called))
        segments = boundary.segments(_rows_of(given, boundary, called, bypass, retain_graph))
        if not segments and together is None:
            raise ValueError(_NOT_REACHED)
    except Exception as error:
        if together is not None:
            together.fail(error)
        raise
    m = len(called)
    gramian, weights = torch.empty(m * m + m, dtype=torch.float64, device=boundary.home).split([m * m, m])
    gramian = gramian.view(m, m)
    absent = [i for i, loss in enumerate(given) if loss is None]
    scale, parts = scale_of(scaler, boundary.home), list(segments.values())
    try:
        if together is None:
            combine_segments(parts, rule, gramian, weights, scale)
        else:
            absent = together.combine(parts, rule, gramian, weights, scale, absent)
    except NonFiniteError as error:
        raise called.with_name(error) from None
    for _, out in parts if scaler is not None else ():
        out[:1] += overflow_of(gramian).to(out.device)
    outputs = {i: out for i, (_, out) in segments.items()}
    del segments, parts  # and with them the rows, before the trunk's pass needs memory
    boundary.go_on(outputs, retain_graph)
    return Combination(gramian, weights, rtol_of(rule), called, absent)


def _in_order(losses: Sequence[Loss] | Mapping[str, Loss]) -> tuple[Losses, Sequence[Loss]]:
    """The losses by row, and how they are called."""
    if isinstance(losses, Tensor) or not isinstance(losses, (Mapping, Sequence)):
        raise TypeError(f"losses must be a sequence or a dict of losses, got {type(losses).__name__}")
    if not losses:
        raise ValueError("losses must hold at least one loss, got none")
    if unnamed := [key for key in losses if not isinstance(key, str)] if isinstance(losses, Mapping) else []:
        raise TypeError(f"losses must be a dict by name, got the key {unnamed[0]!r}; give a list, or names")
    called = Losses(list(losses) if isinstance(losses, Mapping) else len(losses))
    return called, called.in_order(losses)


def _ranks_of(sync: Sync) -> Ranks | None:
    """Those whose batches are parts of one; None where a process trains alone."""
    if is_group(sync):
        ranks = Ranks(sync)
        return None if ranks.count == 1 else ranks
    if sync not in ("auto", None):
        raise ValueError(f"sync must be 'auto', a process group or None, got {sync!r}")
    if sync == "auto" and world() is not None:
        raise RuntimeError(
            "several processes train, and nothing says whether their features are of one batch: give "
            "sync=torch.distributed.group.WORLD, or the group of those that share a batch, and all take the weights of "
            "the whole; or sync=None where every process trains for itself"
        )
    return None


class Boundary:
    """The features, between the heads and the trunk.

    Args:
        features: as given.

    Attributes:
        features: one tensor or several.
        edges: where they stand in the graph, each with its number.
        home: the device of the first.

    Raises:
        TypeError, ValueError: as ``backward``.
    """

    def __init__(self, features: Tensor | Sequence[Tensor]) -> None:
        is_one = isinstance(features, Tensor)
        if not is_one and (isinstance(features, (str, bytes)) or not isinstance(features, Sequence)):
            raise TypeError(f"features must be a tensor or a sequence of tensors, got {type(features).__name__}")
        self.features = (features,) if isinstance(features, Tensor) else tuple(features)
        if not self.features:
            raise ValueError("features must hold at least one tensor, got none; give what the heads are computed from")
        self.edges: dict[Edge, int] = {}
        for i, feature in enumerate(self.features):
            name = "features" if is_one else f"features[{i}]"
            _check_feature(feature, name)
            first = self.edges.setdefault(edge_of(feature), i)
            if first != i:
                raise ValueError(f"{name} is features[{first}]; give each tensor once")
        self.home = self.features[0].device
        self._behind: Behind | None = None

    @property
    def behind(self) -> Behind:
        """What lies behind them."""
        if self._behind is None:
            self._behind = look_behind(self.edges)
        return self._behind

    def is_run_through(self, parts: Sequence[Part], bypass: Bypass) -> bool:
        """Whether what lies behind the features is run, too, as autograd is asked for something there.

        Raises:
            ValueError: a leaf of the heads lies behind the features, and ``bypass`` is "error".
        """
        behind = self.behind.leaves
        shared = {node: leaf for part in parts for node, leaf in part.leaves.items() if node in behind}
        if shared and bypass == "error":
            shape = tuple(next(iter(shared.values())).shape)
            raise ValueError(
                f"{len(shared)} tensors that need a gradient, the first of shape {shape}, lie behind the features and "
                "are reached by a loss around them, too, where nothing is combined: tied weights, a derivative by the "
                "input, a penalty on the weights, or heads computed from other tensors than these features. Give all "
                "that the trunk hands over, use GradientBuffer, or say bypass='sum' to add what goes around as it is"
            )
        return bool(shared) or self.behind.is_nested

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Let the features' hooks rest, and their ``.grad``: no gradient arrives until the combination."""
        kept = {i: feature.grad for i, feature in enumerate(self.features) if feature.retains_grad}
        resting = [(hooks, dict(hooks)) for feature in self.features if (hooks := feature._backward_hooks)]
        for hooks, _ in resting:
            hooks.clear()
        try:
            yield
        finally:
            for hooks, those in resting:
                hooks.update(those)
            for i, grad in kept.items():
                self.features[i].grad = grad

    def run(
        self, losses: Sequence[Tensor], parts: Sequence[Part], rows: Sequence[list[Tensor | None]], is_needed: bool
    ) -> None:
        """Backpropagate losses down to the features, and into their heads, which accumulate once.

        One pass does it for losses whose graphs have no node in common. Autograd then runs the nodes of the features,
        too, to which no gradient comes, and frees what they saved unless the whole graph is kept. Nodes of PyTorch's
        own compute nothing then. One that computes all it has, such as a compiled model, is not to be run: there, as
        where graphs have nodes in common, gradients of the features come first, and one pass goes into the heads.

        Args:
            losses: some.
            parts: of each, what it leads to.
            rows: of each, where the gradient of every feature goes.
            is_needed: whether another pass needs the graph on this side of the features.
        """
        alone = [i for i, part in enumerate(parts) if len(part.losses) == 1]
        features = self._reached([parts[i] for i in alone])
        edges = [GradientEdge(*edge_of(feature)) for feature in features]
        is_one_pass = all(computes_what_is_asked(edge.node) for edge in edges)
        before = [[i] for i in range(len(losses)) if i not in alone] + ([] if is_one_pass or not alone else [alone])
        for group in before:
            self._run_to_features([losses[i] for i in group], [parts[i] for i in group], [rows[i] for i in group])
        taken = {id(part): (part, None) for part in parts} | (
            {id(parts[i]): (parts[i], rows[i]) for i in alone} if is_one_pass else {}
        )
        heads = {node: GradientEdge(node, 0) for part in parts for node in part.leaves}
        inputs = [*(edges if is_one_pass else ()), *heads.values()]
        if not inputs:
            return
        is_kept = is_needed or (is_one_pass and bool(edges))
        with _taken(taken.values()) as size:
            torch.autograd.backward(losses, _ones(losses), retain_graph=is_kept, inputs=inputs)
        if is_kept and not is_needed and size() >= FREED_BYTES:
            self._free(losses, parts)

    def _reached(self, parts: Sequence[Part]) -> list[Tensor]:
        """The features that these lead to."""
        numbers = {crossing.feature for part in parts for crossing in part.crossings}
        return [self.features[i] for i in sorted(numbers)]

    def _run_to_features(
        self, losses: Sequence[Tensor], parts: Sequence[Part], rows: Sequence[list[Tensor | None]]
    ) -> None:
        features = self._reached(parts)
        if features:
            with _taken(list(zip(parts, rows, strict=True))):
                torch.autograd.grad(losses, features, _ones(losses), retain_graph=True, allow_unused=True)

    def _free(self, losses: Sequence[Tensor], parts: Sequence[Part]) -> None:
        """Free what the nodes between losses and features have saved, by a pass that computes nothing.

        Nodes that compute all they have would: theirs are freed with the losses.
        """
        plain = [i for i, part in enumerate(parts) if part.crossings and not part.foreign]
        if not plain:
            return
        roots = [losses[i] for i in plain]
        with ExitStack() as hooks:
            for node in {edge_of(loss)[0] for loss in roots}:
                hooks.callback(node.register_prehook(_nothing).remove)
            features = self._reached([parts[i] for i in plain])
            torch.autograd.grad(roots, features, _ones(roots), allow_unused=True)

    def segments(self, rows: Sequence[Sequence[Tensor | None]]) -> dict[int, tuple[Rows, Tensor]]:
        """Of each feature that a loss has reached, by its number, the rows, and memory for what becomes of them.

        Args:
            rows: of each loss the gradient of every feature.
        """
        found: dict[int, tuple[Rows, Tensor]] = {}
        for i in range(len(self.features)):
            grads = [row[i] for row in rows]
            known = [grad for grad in grads if grad is not None]
            if known:
                zero = torch.zeros_like(known[0]) if len(known) < len(grads) else known[0]
                described = check_rows([(zero if grad is None else grad).reshape(-1) for grad in grads])
                found[i] = described, fresh(described.n, described.dtype, described.device)
        return found

    def go_on(self, combined: Mapping[int, Tensor], retain_graph: bool) -> None:
        """Backpropagate from the features what was combined there, flat, by the feature's number."""
        roots = [self.features[i] for i in combined]
        grads = [_shaped_like(self.features[i], flat) for i, flat in combined.items()]
        if roots:
            torch.autograd.backward(roots, grads, retain_graph=retain_graph)


def _check_feature(feature: Tensor, name: str) -> None:
    if not isinstance(feature, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(feature).__name__}")
    if is_sharded(feature):
        raise TypeError(f"{name} must be a plain tensor, got a DTensor; give this rank's part, z.to_local()")
    if feature.dtype not in FLOAT_DTYPES and feature.dtype not in REAL_OF_COMPLEX:
        raise TypeError(f"{name} must be float32, float64, bfloat16, float16 or complex, got {feature.dtype}")
    if not feature.requires_grad:
        raise ValueError(
            f"{name} does not require grad, so no gradient can reach it; compute it from the parameters, outside "
            "torch.no_grad(), or call requires_grad_() where it was detached"
        )


def _shaped_like(feature: Tensor, flat: Tensor) -> Tensor:
    if feature.is_complex():
        flat = torch.view_as_complex(flat.view(-1, 2))
    return flat.view(feature.shape)


def _rows_of(
    losses: Sequence[Loss], boundary: Boundary, called: Losses, bypass: Bypass, retain_graph: bool
) -> list[list[Tensor | None]]:
    """Backpropagate each loss to the features, and into its heads: of each loss the gradient of every feature.

    Losses whose graphs have no node in common are backpropagated in one pass, the others one by one.
    """
    passes = _Passes(boundary, bypass, len(losses), retain_graph)
    tensors = {i: loss for i, loss in enumerate(losses) if isinstance(loss, Tensor)}
    for i, loss in tensors.items():
        passes.add(i, loss)
    if tensors and not passes.reach_features() and not any(map(callable, losses)):
        raise ValueError(_NOT_REACHED)
    with boundary.closed():
        passes.run()
        for i, function in enumerate(losses):
            if function is not None and not isinstance(function, Tensor):
                value = function()
                called.check_one(value, i)
                passes.add(i, value)
                passes.run()
    return passes.rows


class _Passes:
    """Backward passes of losses down to the features.

    Args:
        boundary: the features.
        bypass: as in ``backward``.
        num_losses: m.
        retain_graph: whether to keep the graphs.

    Attributes:
        rows: of each loss, the gradient of every feature.
    """

    def __init__(self, boundary: Boundary, bypass: Bypass, num_losses: int, retain_graph: bool) -> None:
        self.rows: list[list[Tensor | None]] = [[None] * len(boundary.features) for _ in range(num_losses)]
        self._boundary = boundary
        self._bypass = bypass
        self._retain_graph = retain_graph
        self._heads = Heads(boundary.edges)
        self._waiting: list[tuple[int, Tensor, int]] = []  # row, loss, and its number among those added

    def add(self, row: int, loss: Tensor) -> None:
        """Take in a loss that is to be backpropagated by the next ``run``."""
        feature = self._boundary.edges.get(edge_of(loss))
        if feature is None:
            self._waiting.append((row, loss, self._heads.add(loss)))
        else:  # the loss is a feature
            self.rows[row][feature] = torch.ones_like(loss)

    def reach_features(self) -> bool:
        """Whether one of the losses so far leads to a feature."""
        are_some = any(grad is not None for row in self.rows for grad in row)
        return are_some or any(part.crossings for part in self._heads.parts)

    def run(self) -> None:
        """Backpropagate those that wait.

        Raises:
            ValueError: as ``Boundary.is_run_through``, before anything is written.
        """
        waiting, self._waiting = self._waiting, []
        parts = self._heads.parts
        is_needed = self._boundary.is_run_through(parts, self._bypass) or self._retain_graph
        if waiting:
            self._boundary.run(
                [loss for _, loss, _ in waiting],
                [parts[number] for _, _, number in waiting],
                [self.rows[row] for row, _, _ in waiting],
                is_needed,
            )


def _ones(losses: Sequence[Tensor]) -> list[Tensor]:
    return [torch.ones_like(loss) for loss in losses]


@contextmanager
def _taken(parts: Iterable[tuple[Part, list[Tensor | None] | None]]) -> Iterator[Callable[[], int]]:
    """Keep the gradients that go into the features, each part's in its row or nowhere, so that none arrives there.

    Args:
        parts: each with its row, or None.

    Yields:
        What tells how many bytes of gradients have come to the nodes in front of the features so far.
    """
    sizes: list[int] = []

    def take(
        row: list[Tensor | None] | None,
        places: Sequence[tuple[int, int]],
        grads: tuple[Tensor | None, ...],
        before: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, ...]:
        kept = list(grads)
        for output, feature in places:
            grad, kept[output] = kept[output], None
            if grad is not None and row is not None:
                known = row[feature]
                row[feature] = grad if known is None else known + grad
        sizes.extend(grad.nbytes for grad in before if grad is not None)
        return tuple(kept)

    handles = []
    for part, row in parts:
        outputs: dict[Node, list[tuple[int, int]]] = {}
        for node, output, feature in part.crossings:
            outputs.setdefault(node, []).append((output, feature))
        handles += [node.register_hook(partial(take, row, places)) for node, places in outputs.items()]
    try:
        yield lambda: sum(sizes)
    finally:
        for handle in handles:
            handle.remove()


def _nothing(grads: tuple[Any, ...]) -> tuple[None, ...]:
    """A node's hook: no gradient comes."""
    return (None,) * len(grads)


_NOT_REACHED = (
    "features are reached by no loss, so there is nothing to combine there; compute the heads from the very tensors "
    "that are given, undetached, and by torch.compile trunk and heads apart: what is compiled together is one node, "
    "with nothing between features and losses"
)
