"""M-ConFIG's step on CUDA and ROCm tensors: ``kernels/`` launched. What each method means stands in ``reference``.

Up to 64 losses a step is two launches, for a small problem one. More than 8 losses have a table of their gradients'
addresses, and the parameter groups one of their numbers: each is written by a launch of its own when it is new, and
kept. Nothing waits for the device, except where ``nonfinite="raise"`` asks to; every step may be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fastconfig.backends import triton as gpu
from fastconfig.backends.launching import Kernel, arguments_of, launch
from fastconfig.backends.moments import Decision, Group, Ledger, Moments, Piece, Recorded, StepRule
from fastconfig.backends.momentum import reference
from fastconfig.backends.rules import ConFIGRule

if not gpu.IMPORT_ERROR:
    from fastconfig.kernels import geometry, launched_momentum, launched_tables

    _ARGUMENTS = {
        name: arguments_of(getattr(launched_momentum, name))
        for name in ("moments_of_few", "moments_of_many", "momentum_update")
    }

_GRADIENTS_A_LAUNCH = 8


@dataclass(frozen=True)
class Gradients:
    """The recorded gradients as the kernels take them."""

    dtype: torch.dtype
    aligned: bool
    """Whether every row, and the averages and the second moment, begin at multiples of 16 bytes."""
    count: int
    bits: int
    """Bit i says whether loss i has a gradient; of up to 64 losses, as a signed number."""
    addresses: dict[str, int]
    """Up to 8 losses: address0 to address7, by loss."""
    slots: int
    """Up to 8 losses: byte i is the place of loss i among the gradients."""
    table: Tensor | None
    """Beyond: see ``launched_momentum.moments_of_many``."""

    def of_few(self) -> dict[str, object]:
        """The arguments of the kernels that take addresses."""
        return {**self.addresses, "slots": self.slots, "recorded": self.bits}


class Segment:
    """As ``reference.Segment``."""

    def __init__(self, moments: Moments, pieces: Sequence[Piece]) -> None:
        self.moments = moments
        self.pieces = tuple(pieces)
        first, second = moments
        self.device = first.device
        self._reference = reference.Segment(moments, pieces)
        self._m, self._n = first.shape
        self._stride = first.stride(0) if self._m > 1 else 0
        self._starts = first.data_ptr() | second.data_ptr() | self._stride * first.itemsize
        dtypes = {piece.values.dtype for piece in self.pieces} or {first.dtype}
        self._parameter_dtype = dtypes.pop()
        self._has_kernels = not dtypes and (self._m <= geometry.FEW or gpu.device_of(self.device).has_matrix_units)
        self._vector = geometry.VECTOR_BYTES // first.itemsize
        few_bytes = self._m * self._n * first.itemsize
        self._is_small = self._m <= geometry.FEW and few_bytes <= gpu.device_of(self.device).one_launch_bytes
        self._pieces, self._ranges = _tables_of(self.pieces, self._n, self.device)
        self._rates: list[Tensor] = []  # learning rates that the last launch reads by address, kept until the next

    @gpu.on_its_device
    def products(self, recorded: Recorded, scales: Tensor, beta1: float) -> Tensor:
        """As reference.Segment.products, in one launch: all products are formed, and those asked for returned."""
        if not self._runs(recorded):
            return self._reference.products(recorded, scales, beta1)
        gramian = torch.empty(self._m, self._m, dtype=torch.float64, device=self.device)
        workspace = gpu.workspace_for(self.device)
        with workspace.lock:
            look = {
                "gramian": gramian,
                "scales": scales,
                "beta1": beta1,
                **_NO_DECISION,
            }
            self._launch_look(workspace, self._gradients(recorded, workspace), gpu.rule_numbers(None, self._m), look)
        if recorded.losses == tuple(range(self._m)):
            return gramian
        return torch.stack([gramian[i] for i in recorded.losses])  # indexed by a list, it would wait

    @gpu.on_its_device
    def update(self, recorded: Recorded, rule: StepRule, decision: Decision) -> None:
        """As reference.Segment.update, in one launch."""
        if not self._runs(recorded):
            self._reference.update(recorded, rule, decision)
            return
        workspace = gpu.workspace_for(self.device)
        with workspace.lock:
            self._launch_update(workspace, self._gradients(recorded, workspace), rule, decision.numbers, None)

    @gpu.on_its_device
    def update_square(self, recorded: Recorded, rule: StepRule, decision: Decision) -> Tensor:
        """As reference.Segment.update_square, in one launch."""
        if not self._runs(recorded):
            return self._reference.update_square(recorded, rule, decision)
        measured = torch.empty((), dtype=torch.float64, device=self.device)
        workspace = gpu.workspace_for(self.device)
        with workspace.lock:
            self._launch_update(workspace, self._gradients(recorded, workspace), rule, decision.numbers, measured)
        return measured

    @gpu.on_its_device
    def step(
        self,
        ledger: Ledger,
        recorded: Recorded,
        rule: StepRule,
        method: ConFIGRule,
        scales: Tensor,
        found_inf: Tensor | None = None,
    ) -> None:
        """As reference.Segment.step: two launches, or one where one program does it all."""
        if self._m > geometry.SOLVED or method.nonfinite == "raise" or not self._runs(recorded):
            reference.step_in_parts(self, gpu.config_weights, ledger, recorded, rule, method, scales, found_inf)
            return
        if found_inf is not None:
            found_inf = found_inf.to(self.device, torch.float32)
        workspace = gpu.workspace_for(self.device)
        with workspace.lock:
            workspace.reserve_square(self._m)
            gradients = self._gradients(recorded, workspace)
            look = {
                "gramian": workspace.gramian,
                "scales": scales,
                "beta1": rule.beta1,
                "beta2": rule.beta2,
                "ledger_gramian": ledger.gramian,
                "ledger_weights": ledger.weights,
                "ledger_counts": ledger.counts,
                "ledger_totals": ledger.totals,
                "numbers": workspace.decision,
                "found_inf": found_inf,
                "weights": workspace.weights,
                "direction": gpu.direction_on(method, self.device),
                "scratch": workspace.scratch,
            }
            decides = gpu.rule_numbers(method, self._m)
            if self._is_small:
                self._launch_look(workspace, gradients, decides, look | self._where_to_write(rule, workspace))
            else:
                self._launch_look(workspace, gradients, decides, look)
                self._launch_update(workspace, gradients, rule, workspace.decision, None)

    def _runs(self, recorded: Recorded) -> bool:
        """Whether there are kernels for these gradients: all of one dtype."""
        return self._has_kernels and all(row.dtype == recorded.rows[0].dtype for row in recorded.rows)

    def _gradients(self, recorded: Recorded, workspace: gpu.Workspace) -> Gradients:
        starts, bits, slots = self._starts, 0, 0
        addresses = dict.fromkeys(_ADDRESSES, 0)
        few = self._m <= geometry.FEW
        for slot, (i, row) in enumerate(zip(recorded.losses, recorded.rows, strict=True)):
            address = row.data_ptr()
            starts |= address
            bits |= 1 << i
            if few:
                slots |= slot << (8 * i)
                addresses[_ADDRESSES[i]] = address
        if bits >= 1 << 63:
            bits = bits - (1 << 64) if self._m <= geometry.SOLVED else 0
        table = None if few else self._table_of(recorded, workspace)
        aligned = starts % geometry.VECTOR_BYTES == 0
        return Gradients(recorded.rows[0].dtype, aligned, len(recorded.losses), bits, addresses, slots, table)

    def _table_of(self, recorded: Recorded, workspace: gpu.Workspace) -> Tensor:
        losses, addresses = recorded.losses, tuple(row.data_ptr() for row in recorded.rows)

        def write(table: Tensor) -> None:
            for first in range(0, len(losses), _GRADIENTS_A_LAUNCH):
                some = slice(first, first + _GRADIENTS_A_LAUNCH)
                count = len(losses[some])
                padding = (0,) * (_GRADIENTS_A_LAUNCH - count)
                arguments = (table, self._m, first, count, *losses[some], *padding, *addresses[some], *padding)
                launch(launched_tables.table_of_gradients, 1, self.device, arguments, self._plain)

        return workspace.table((self._m, losses, addresses), 2 * self._m, write)

    def _groups_of(self, rule: StepRule, workspace: gpu.Workspace) -> Tensor:
        self._rates.clear()
        entries = tuple(self._words_of(group) for group in rule.groups)

        def write(table: Tensor) -> None:
            for index, entry in enumerate(entries):
                launch(launched_tables.table_of_group, 1, self.device, (table, index, *entry), self._plain)

        return workspace.table(entries, geometry.GROUP_WORDS * len(entries), write)

    def _words_of(self, group: Group) -> tuple[float, float, float, float, int, int, int]:
        """A group's entry in the table: see ``kernels/parameters.py``."""
        rate, address, is_double = 0.0, 0, 0
        if isinstance(group.lr, Tensor) and (group.lr.device.type != "cpu" or gpu.INTERPRETED):
            lr = group.lr
            if lr.device != self.device or lr.dtype not in (torch.float32, torch.float64):
                lr = lr.to(self.device, torch.float64)
            self._rates.append(lr)
            address, is_double = lr.data_ptr(), int(lr.dtype == torch.float64)
        else:
            rate = float(group.lr)
        along = 1.0 if group.maximize else -1.0
        return rate, group.weight_decay, group.eps, along, address, is_double, int(group.assign)

    def _where_to_write(self, rule: StepRule, workspace: gpu.Workspace) -> dict[str, object]:
        return {
            "second": self.moments.second,
            "pieces": self._pieces,
            "ranges": self._ranges,
            "groups": self._groups_of(rule, workspace),
        }

    def _launch_look(
        self, workspace: gpu.Workspace, gradients: Gradients, rule: gpu.RuleNumbers, look: dict[str, object]
    ) -> None:
        """The Gramian of the new averages, and what else ``look`` has the arguments of."""
        look["tracked"], look["rtol"], _ = rule
        if self._m <= geometry.FEW:
            self._launch_few(workspace, gradients, rule, look)
        else:
            self._launch_many(workspace, gradients, rule, look)

    def _launch_few(
        self, workspace: gpu.Workspace, gradients: Gradients, rule: gpu.RuleNumbers, look: dict[str, object]
    ) -> None:
        device = gpu.device_of(self.device)
        config, programs = geometry.one(self._m), 1
        if not self._is_small:
            config = geometry.look(self._m)
            tile = config.warps * device.lanes * self._vector * config.unroll
            programs = geometry.programs(
                self._n, tile, config.programs * device.multiprocessors, config.group, device.multiprocessors
            )
        partials = tickets = None
        if programs > 1:
            groups = -(-programs // config.group)
            workspace.reserve_sums((programs + groups) * geometry.pairs(self._m), 1 + groups)
            partials, tickets = workspace.partials, workspace.tickets
        _, _, constants = rule
        self._launch(
            "moments_of_few",
            programs,
            (gradients.dtype, gradients.aligned, config, constants),
            {
                **_NOWHERE,
                **look,
                **gradients.of_few(),
                "count": gradients.count,
                "partials": partials,
                "tickets": tickets,
            },
            lambda: (
                {
                    "GRADIENT": gpu.DTYPES[gradients.dtype],
                    "PARAMETER": gpu.DTYPES[self._parameter_dtype],
                    "ALIGNED": gradients.aligned,
                    **dict(constants),
                    **gpu.few_constants(config, self._m, self._vector, self.device),
                },
                gpu.compiler_options(self.device, config.warps, config.programs),
            ),
        )

    def _launch_many(
        self, workspace: gpu.Workspace, gradients: Gradients, rule: gpu.RuleNumbers, look: dict[str, object]
    ) -> None:
        device = gpu.device_of(self.device)
        config = geometry.look_many(self._m, self.moments.first.itemsize, device.lanes)
        strip_pairs = config.strip_pairs(self._m)
        most = max(1, config.programs * device.multiprocessors // strip_pairs)
        programs = geometry.programs(self._n, config.warps * config.depth, most, config.group)
        groups = -(-programs // config.group)
        workspace.reserve_sums(
            strip_pairs * (programs + groups) * config.partial_elements(), 1 + strip_pairs * (1 + groups)
        )
        _, _, constants = rule
        self._launch(
            "moments_of_many",
            programs * strip_pairs,
            (gradients.dtype, gradients.aligned, config, constants),
            {
                **look,
                "table": gradients.table,
                "recorded": gradients.bits,
                "count": gradients.count,
                "partials": workspace.partials,
                "tickets": workspace.tickets,
            },
            lambda: (
                {
                    "DTYPE": gpu.DTYPES[self.moments.first.dtype],
                    "GRADIENT": gpu.DTYPES[gradients.dtype],
                    **dict(constants),
                    "LEFT": config.left,
                    "RIGHT": config.right,
                    "WARPS": config.warps,
                    "DEPTH": config.depth,
                    "ALIGNED": gradients.aligned,
                    "GROUP": config.group,
                    "FENCE": device.fence(config.warps),
                },
                gpu.compiler_options(self.device, config.warps, config.programs),
            ),
        )

    def _launch(
        self,
        name: str,
        programs: int,
        kind: tuple[object, ...],
        named: dict[str, object],
        prepare: Callable[[], tuple[dict[str, object], dict[str, object]]],
    ) -> None:
        """Launch a kernel of averages, whose arguments are given by name."""
        named["averages"], named["stride"], named["n"] = self.moments.first, self._stride, self._n
        arguments = tuple([named[argument] for argument in _ARGUMENTS[name]])
        absent = tuple([argument is None for argument in arguments])
        whole = (kind, absent, self._m, self.moments.first.dtype, self._parameter_dtype, self.device)
        launch(cast("Kernel", getattr(launched_momentum, name)), programs, whole, arguments, prepare)

    def _plain(self) -> tuple[dict[str, object], dict[str, object]]:
        """The constants and options of a kernel that has none and is one warp."""
        return {}, gpu.compiler_options(self.device, 1, 1)

    def _launch_update(
        self,
        workspace: gpu.Workspace,
        gradients: Gradients,
        rule: StepRule,
        numbers: Tensor,
        measured: Tensor | None,
    ) -> None:
        """Write, or with ``measured`` find |update|²."""
        device = gpu.device_of(self.device)
        config = geometry.write(self._m)
        threads = config.warps * device.lanes
        most = config.programs * device.multiprocessors
        group = geometry.look(1).group
        partials = tickets = None
        programs = geometry.programs(self._n, threads * self._vector, most)
        if measured is not None:
            programs = geometry.programs(self._n, threads * self._vector, most, group, device.multiprocessors)
            groups = -(-programs // group)
            workspace.reserve_sums(programs + groups, 1 + groups)
            partials, tickets = workspace.partials, workspace.tickets
        self._launch(
            "momentum_update",
            programs,
            (gradients.dtype, gradients.aligned, config, group),
            {
                **gradients.of_few(),
                **self._where_to_write(rule, workspace),
                "table": gradients.table,
                "numbers": numbers,
                "beta1": rule.beta1,
                "beta2": rule.beta2,
                "partials": partials,
                "tickets": tickets,
                "measured": measured,
            },
            lambda: (
                {
                    "GRADIENT": gpu.DTYPES[gradients.dtype],
                    "PARAMETER": gpu.DTYPES[self._parameter_dtype],
                    "M": self._m,
                    "THREADS": threads,
                    "VECTOR": self._vector,
                    "ALIGNED": gradients.aligned,
                    "GROUP": group,
                    "FENCE": device.fence(config.warps),
                },
                gpu.compiler_options(self.device, config.warps, config.programs),
            ),
        )


_ADDRESSES = tuple(f"address{i}" for i in range(_GRADIENTS_A_LAUNCH))
_NO_DECISION = {
    "beta2": 0.0,
    **dict.fromkeys(("ledger_gramian", "ledger_weights", "ledger_counts", "ledger_totals", "numbers", "found_inf")),
    **dict.fromkeys(("weights", "direction", "scratch")),
}
"""A look that decides nothing."""
_NOWHERE = dict.fromkeys(("second", "pieces", "ranges", "groups"))
"""A look that leaves writing to another launch."""


def _tables_of(pieces: Sequence[Piece], n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tables ``pieces`` and ``ranges`` of ``kernels/parameters.py``."""
    entries = sorted(
        (piece.first, piece.first + len(piece.values), piece.values.data_ptr(), piece.group)
        for piece in pieces
        if len(piece.values)
    )
    table = torch.tensor([(address, first, end, group) for first, end, address, group in entries], dtype=torch.int64)
    table = table.reshape(-1, geometry.PIECE_WORDS)
    starts = torch.arange(0, n, geometry.PIECE_COLUMNS)
    first = torch.searchsorted(table[:, 2].contiguous(), starts, right=True)
    last = torch.searchsorted(table[:, 1].contiguous(), starts + geometry.PIECE_COLUMNS)
    return table.to(device), torch.stack([first, last], dim=1).int().to(device)
