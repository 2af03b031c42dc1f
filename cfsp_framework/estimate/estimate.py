"""Estimate how long a pruning run takes and how much memory it needs, before anything is loaded (docs/scale.md).

``N`` windows of ``T`` tokens, hidden size ``D``, ``F`` channels of a feed-forward, ``K`` processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from cfsp_framework.api.components import Collector
from cfsp_framework.api.data import HELD_OUT_EVERY, Site, Stream
from cfsp_framework.benchmark.hardware import BATCH_TOKENS, NOMINAL, Hardware, this_machine
from cfsp_framework.errors import ConfigError
from cfsp_framework.estimate.model_shape import BlockShape, ModelShape, measure_shape
from cfsp_framework.host.selection import get_curve_kind, get_stream, get_target_mix

if TYPE_CHECKING:
    from cfsp_framework.config import RunConfig
    from cfsp_framework.host.registry import ConfiguredComponent
    from cfsp_framework.host.selection import Selection

MEASURING = 1.08
"""Time of a block that is measured, in times of a forward (docs/benchmarks.md)."""
GRAM_SHARE = 9 / 16
"""Share of a Gram matrix's products that its collector computes: panels of the upper triangle."""
RANK = 4.0
"""Float64 FLOPs, in cubes of F, that a criterion or allocator spends on a Gram matrix: removal orders, error curves."""
REFIT = 2.0
"""Float64 FLOPs, in cubes of F, that a compensator spends on a Gram matrix."""
SQUARES = 8
"""Float64 matrices (F, F) in memory during that algebra."""
BACKWARD = 3.0
"""Time of a forward with its backward, in times of a forward."""
INTERPRETER = 420 * 10**6
"""Bytes of a process that has imported everything."""
SHARD = 5 * 10**9
"""Bytes of one file of a checkpoint."""
HASHES_AT_ONCE = 4
"""Files of a checkpoint that are hashed at the same time."""
AHEAD = 2
"""Blocks in memory while a model is streamed: one computes, the next is read."""


@dataclass(frozen=True)
class Pass:
    """One pass of calibration windows through the blocks, and the statistics collected in every feed-forward."""

    windows: int = 0
    forwards: float = 0.0
    """Forwards of every block, per token."""
    streams: int = 1
    """Copies of the hidden states."""
    grams: int = 0
    """Gram matrices (F, F) over all windows."""
    held_out_grams: int = 0
    crosses: int = 0
    """Products (D, F) with targets over all windows."""
    held_out_crosses: int = 0
    copies: int = 0
    """Inputs or targets (n, D) kept for every token; those of fitted and held-out windows count as one."""
    vectors: int = 0
    """Sums (F,) or smaller."""
    cubes: float = 0.0
    """Float64 FLOPs, in cubes of F, of the algebra on Gram matrices."""


@dataclass(frozen=True)
class RunWorkload:
    """Work of a run, for a model of any size."""

    seqlen: int
    select: Pass
    """The pass that channels are chosen by."""
    compensate: Pass = Pass()
    """The compensator's own pass, if it needs one."""
    ratio: float = 0.5
    """Share to remove of the feed-forwards' parameters, or of all parameters."""
    of_all_parameters: bool = False
    batch_size: int | None = None
    """Windows per batch; None: the device's default."""
    notes: tuple[str, ...] = ()
    """Costs that are not counted."""


@dataclass(frozen=True)
class Way:
    """Estimated costs of the run on one machine, in memory or streamed."""

    hardware: str
    measured: bool
    streamed: bool
    processes: int
    seconds: Mapping[str, float]
    """Seconds per phase, named as in ``report.json``."""
    causes: Mapping[str, float]
    """The same seconds by cause: compute, disk, transfer, all-reduce."""
    host_bytes: int
    """Peak bytes of one node."""
    device_bytes: int
    """Peak bytes of one GPU; 0 without one."""
    fits: bool

    @property
    def total(self) -> float:
        """Seconds of the run."""
        return sum(self.seconds.values())

    @property
    def collect(self) -> float:
        """Seconds in the blocks, while they are measured and while they are compensated."""
        return self.seconds["collect"] + self.seconds["cut"]

    @property
    def bound(self) -> str:
        """The cause of most seconds."""
        return max(self.causes, key=self.causes.__getitem__)


def plan_workload(config: RunConfig, selection: Selection, context: int | None) -> RunWorkload:
    """Return the work of a run with this configuration; ``context`` is the model's longest sequence.

    Raises:
        ConfigError: the calibration windows are longer than the context.
    """
    if config.calibration.seqlen is not None and context is not None and config.calibration.seqlen > context:
        raise ConfigError(f"--seqlen {config.calibration.seqlen} is longer than the model's context of {context}.")
    twice = bool(selection.second_pass)
    split = twice and not config.calibration.reuse_windows and config.calibration.samples > 1
    first = -(-config.calibration.samples // 2) if split else config.calibration.samples
    return RunWorkload(
        seqlen=config.calibration.seqlen or min(1024, context or 1024),
        select=_first_pass(selection, first),
        compensate=_second_pass(selection, config.calibration.samples - first if split else config.calibration.samples)
        if twice
        else Pass(),
        ratio=config.budget.ratio,
        of_all_parameters=config.budget.unit == "parameters",
        batch_size=config.calibration.batch_size,
        notes=tuple(_not_counted(config, selection)),
    )


def _first_pass(selection: Selection, windows: int) -> Pass:
    sites = [chosen.component.site for chosen in selection.collectors]
    backward = Site.GRADIENT in sites
    forwards = BACKWARD * backward + any(site is not Site.GRADIENT for site in sites)
    readers = [selection.criterion.required(), selection.allocator.required()]
    ranking = sum(any(s.shape == "(F, F)" for s in read) for read in readers)
    ranking += get_curve_kind(selection.allocator) is not None
    return _pass(selection.collectors, windows if sites else 0, forwards, cubes=RANK * ranking)


def _second_pass(selection: Selection, windows: int) -> Pass:
    """Return the compensator's pass.

    On the pruned stream a block runs dense and cut, and dense on the other stream if targets mix in its outputs.
    """
    compensator = selection.compensator
    pruned, teacher = get_stream(compensator) is Stream.PRUNED, get_target_mix(compensator) > 0
    cubes = REFIT * any(s.shape == "(F, F)" for s in compensator.required())
    forwards, streams = (2.0 + teacher, 1 + teacher) if pruned else (1.0, 1)
    return _pass(selection.second_pass, windows, forwards, streams=streams, cubes=cubes)


def _pass(
    collectors: Iterable[ConfiguredComponent[Collector]],
    windows: int,
    forwards: float,
    *,
    streams: int = 1,
    cubes: float = 0.0,
) -> Pass:
    provided = [chosen.component.provides for chosen in collectors]
    shapes = [(statistic.shape, statistic.name.endswith("held_out")) for statistic in provided]
    return Pass(
        windows,
        forwards,
        streams,
        grams=shapes.count(("(F, F)", False)),
        held_out_grams=shapes.count(("(F, F)", True)),
        crosses=shapes.count(("(D, F)", False)),
        held_out_crosses=shapes.count(("(D, F)", True)),
        copies=shapes.count(("(n, D)", False)),
        vectors=sum(not statistic.heavy for statistic in provided),
        cubes=cubes,
    )


def _not_counted(config: RunConfig, selection: Selection) -> Iterable[str]:
    if selection.searches:
        yield f"the forwards with which {selection.allocator.component.name} tries widths are not counted"
    if selection.probes:
        yield f"the forwards with which the blocks' sensitivities are measured for {selection.allocator.component.name} are not counted"
    if config.budget.rounds > 1:
        yield f"one round is counted; each of the {config.budget.rounds} measures and cuts the model anew"
    if any(chosen.component.provides.shape == "(n, D)" for chosen in selection.second_pass):
        yield f"the training of {selection.compensator.component.name} in every feed-forward is not counted"
    if any(chosen.component.site is Site.GRADIENT for chosen in selection.collectors):
        yield "gradients need the whole model at once; activations kept for the backward are not counted, nor is it streamed"
    ordered = [c.component.name for c in (*selection.collectors, *selection.second_pass) if c.component.ordered]
    if ordered:
        yield f"{ordered[0]} depends on the order of all windows: only one process can run"
    if config.budget.drop_attention:
        yield "choosing the attentions to drop is not counted"


def estimate(shape: ModelShape, workload: RunWorkload, hardware: Hardware) -> tuple[Way, Way]:
    """Estimate the run with the whole model in memory, and streamed block by block, with one process on each device."""
    in_memory, streamed = (_Run(shape, workload, hardware, streamed=streamed).estimate() for streamed in (False, True))
    return in_memory, streamed


@dataclass(frozen=True)
class _Run:
    shape: ModelShape
    workload: RunWorkload
    hardware: Hardware
    streamed: bool
    seconds: dict[str, float] = field(default_factory=dict)
    causes: dict[str, float] = field(default_factory=dict)

    def estimate(self) -> Way:
        self.causes.update(dict.fromkeys(("compute", "disk", "transfer", "all-reduce"), 0.0))
        self._load()
        self._run("collect", self.workload.select)
        self._run("cut", self.workload.compensate)
        self._save()
        hardware = self.hardware
        host, device = self._memory()
        return Way(
            hardware=hardware.name,
            measured=hardware.measured,
            streamed=self.streamed,
            processes=hardware.processes,
            seconds=self.seconds,
            causes=self.causes,
            host_bytes=host,
            device_bytes=device,
            fits=host <= hardware.host_memory and device <= hardware.device_memory,
        )

    def _spend(self, phase: str, cause: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.causes[cause] += seconds

    def _load(self) -> None:
        """Load the weights, or those outside the blocks if streamed; the first process hashes the files."""
        shape, hardware, stored = self.shape, self.hardware, self.shape.stored_bytes
        hashed = max(stored / min(HASHES_AT_ONCE, hardware.cores), min(stored, SHARD))  # by the busiest core
        self._spend("load", "disk", hashed / hardware.hashing)
        checked = self._read(stored, again=not self.streamed, processes=1)
        size = shape.outside_stored_bytes if self.streamed else stored
        self._spend("load", "disk", checked + self._read(size, again=self.streamed))
        self._spend("load", "transfer", (shape.outside_bytes if self.streamed else shape.bytes) / self._to_device)

    def _run(self, phase: str, part: Pass) -> None:
        """Pass over the blocks; a streamed model is read once more to be cut, even if nothing is measured."""
        for index, block in enumerate(self.shape.blocks):
            compute = self._compute(block, part)
            self._spend(phase, "all-reduce", self._all_reduce(block, part))
            if not self.streamed:
                self._spend(phase, "compute", compute)
                continue
            disk, transfer = self._read(block.stored_bytes, again=True), block.bytes / self._to_device
            if not self.hardware.has_gpu:
                self._spend(phase, "compute", compute)
                self._spend(phase, "disk", disk)
                continue
            if index == 0:  # nothing computes while the first block is read
                self._spend(phase, "disk", disk)
                self._spend(phase, "transfer", transfer)
            slower = "compute" if compute >= disk + transfer else "disk" if disk >= transfer else "transfer"
            self._spend(phase, slower, max(compute, disk + transfer))

    def _save(self) -> None:
        """Write the checkpoint, read it again, and run both models on one window, head included."""
        shape, written, seqlen = self.shape, self._written, self.workload.seqlen
        save = "cut" if self.streamed else "save"  # a streamed block is written as soon as it is cut
        self._spend(save, "disk", written / self.hardware.disk_write)
        self._spend(save, "transfer", written / self._to_device)
        self._spend("verify", "disk", self._read(written, again=True, processes=1))
        self._spend("verify", "transfer", written / self._to_device)
        flops = shape.flops_per_token(seqlen) * written / shape.bytes + 2 * shape.hidden * shape.vocabulary
        self._spend("verify", "compute", 2 * seqlen * flops / self.hardware.rate(shape.dtype))

    @property
    def _to_device(self) -> float:
        return self.hardware.to_device if self.hardware.has_gpu else math.inf

    def _read(self, size: int, *, again: bool, processes: int | None = None) -> float:
        """Return seconds until every process of a node has read ``size`` bytes: one from the disk, others from its cache.

        The system caches a checkpoint that takes at most half of the memory.
        """
        hardware, processes = self.hardware, processes or self.hardware.devices
        cached = self.shape.stored_bytes <= hardware.host_memory / 2
        later = size / (hardware.cached_read if cached else hardware.disk_read)
        return processes * later if again else size / hardware.disk_read + (processes - 1) * later

    def _compute(self, block: BlockShape, part: Pass) -> float:
        """Return seconds one process computes for one block: forwards and products for its windows, algebra for all."""
        shape, hardware = self.shape, self.hardware
        tokens = self._windows(part) * self.workload.seqlen
        grams = GRAM_SHARE * (part.grams + part.held_out_grams / HELD_OUT_EVERY)
        crosses = part.crosses + part.held_out_crosses / HELD_OUT_EVERY
        forward = MEASURING * part.forwards * tokens * shape.block_flops(block, self.workload.seqlen)
        products = algebra = 0.0
        for group in block.feed_forwards:
            per_token = 2 * group.width**2 * grams + 2 * shape.hidden * group.width * crosses
            products += tokens * group.share * group.count * per_token
            algebra += part.cubes * group.count * group.width**3
        return (
            forward / hardware.rate(shape.dtype)
            + products / hardware.rate("float32")
            + algebra / hardware.rate("float64")
        )

    def _windows(self, part: Pass) -> int:
        """Return the windows of the process that has most of them."""
        return -(-part.windows // self.hardware.processes)

    def _all_reduce(self, block: BlockShape, part: Pass) -> float:
        """Return seconds of a ring all-reduce of the block's sums, in float64."""
        count = self.hardware.processes
        if part.windows == 0 or count == 1:
            return 0.0
        values = sum(
            group.count * (self._heavy(group.width, part) + part.vectors * group.width) for group in block.feed_forwards
        )
        return 2 * (count - 1) / count * 8 * values / self.hardware.link

    def _heavy(self, width: int, part: Pass) -> int:
        """Return the values in the matrices of one feed-forward."""
        grams, crosses = part.grams + part.held_out_grams, part.crosses + part.held_out_crosses
        return grams * width**2 + crosses * self.shape.hidden * width

    @property
    def _written(self) -> int:
        return pruned_bytes(self.shape, self.workload)

    def _memory(self) -> tuple[int, int]:
        """Return the peak bytes of one node's host memory and of one GPU."""
        shape, devices = self.shape, self.hardware.devices
        working = max(self._working(part) for part in (self.workload.select, self.workload.compensate))
        logits = self.workload.seqlen * shape.vocabulary * (12 + 2 * shape.element_size)
        if self.streamed:
            ahead = min(AHEAD, len(shape.blocks))
            dense = ahead * max(block.bytes for block in shape.blocks)
            pruned = ahead * max(_pruned_block(shape, self.workload, block) for block in shape.blocks)
            peak = shape.outside_bytes + max(dense + working, pruned + logits)
            passing = dense
        else:
            verified = 2 * self._written  # the pruned model, and the checkpoint that was opened again
            if not self.hardware.has_gpu:
                # The dense weights are the checkpoint's pages, which stay mapped when narrower ones replace them.
                verified += sum(
                    f.parameters * block.bytes // block.parameters
                    for block in shape.blocks
                    for f in block.feed_forwards
                )
            peak = max(shape.bytes + working, verified + logits)
            passing = shape.bytes
        if not self.hardware.has_gpu:
            return INTERPRETER + peak, 0
        return devices * (INTERPRETER + passing), peak

    def _working(self, part: Pass) -> int:
        """Return bytes beside the weights while blocks are measured: hidden states, a batch, one block's statistics."""
        shape, windows = self.shape, self._windows(part)
        if windows == 0:
            return 0
        hidden = windows * self.workload.seqlen * shape.hidden * shape.element_size
        heavy = max(
            sum(group.count * 4 * self._heavy(group.width, part) for group in block.feed_forwards)
            for block in shape.blocks
        )
        finishing = 4 * shape.widest**2 * 2 if part.grams else 0  # both triangles while a matrix is mirrored
        algebra = 8 * shape.widest**2 * SQUARES if part.cubes else 0
        batch = activation_bytes(shape, self.workload, windows, self.hardware.batch_tokens)
        kept = part.copies * max(shape.experts_per_token, 1)  # each expert's own
        return hidden * (part.streams + kept) + batch + heavy + max(finishing, algebra)


def pruned_bytes(shape: ModelShape, workload: RunWorkload) -> int:
    """Return the bytes of the checkpoint that is written."""
    return shape.outside_bytes + sum(_pruned_block(shape, workload, block) for block in shape.blocks)


def _pruned_block(shape: ModelShape, workload: RunWorkload, block: BlockShape) -> int:
    """Return the bytes of a block whose feed-forwards lost the same share as all others."""
    inside = sum(group.parameters for block in shape.blocks for group in block.feed_forwards)
    removed = workload.ratio * (shape.parameters if workload.of_all_parameters else inside)
    share = min(1.0, removed / inside) if inside else 0.0
    return block.bytes - round(share * sum(f.parameters for f in block.feed_forwards) * block.bytes / block.parameters)


def activation_bytes(shape: ModelShape, workload: RunWorkload, windows: int, batch_tokens: int) -> int:
    """Return the bytes of one batch inside a block: outputs of projections and attention, and float32 copies."""
    batch = workload.batch_size or max(1, batch_tokens // workload.seqlen)
    tokens = min(batch, windows) * workload.seqlen
    width = max((sum(f.share * f.count * f.width for f in b.feed_forwards) for b in shape.blocks), default=0)
    outputs = tokens * (3 * width + 4 * shape.attention + 4 * shape.hidden) * shape.element_size
    return round(outputs + 8 * workload.seqlen * shape.widest)


@dataclass(frozen=True)
class Estimate:
    """Result of ``cfsp plan --estimate``."""

    model: str
    shape: ModelShape
    workload: RunWorkload
    hardware: tuple[Hardware, ...]
    ways: tuple[Way, ...]

    def describe(self) -> dict[str, int | str]:
        """Return sizes of the model and its run; bytes are of one process that has all windows."""
        shape, workload = self.shape, self.workload
        block = max(shape.blocks, key=lambda block: block.bytes)
        part = max(workload.select, workload.compensate, key=lambda part: part.grams + part.held_out_grams)
        matrices = part.grams + part.held_out_grams
        windows = max(workload.select.windows, workload.compensate.windows)
        return {
            "family": shape.family,
            "dtype": shape.dtype,
            "parameters": shape.parameters,
            "bytes": shape.bytes,
            "blocks": len(shape.blocks),
            "parameters_per_block": block.parameters,
            "bytes_per_block": block.bytes,
            "read_bytes_per_block": block.stored_bytes,
            "parameters_outside": shape.outside_parameters,
            "bytes_outside": shape.outside_bytes,
            "hidden_size": shape.hidden,
            "feed_forward_width": shape.widest,
            "experts": shape.experts,
            "experts_per_token": shape.experts_per_token,
            "seqlen": workload.seqlen,
            "windows": windows,
            "flops_per_token": shape.flops_per_token(workload.seqlen),
            "hidden_state_bytes": windows * workload.seqlen * shape.hidden * shape.element_size,
            "activation_bytes_cpu": activation_bytes(shape, workload, windows, BATCH_TOKENS["cpu"]),
            "activation_bytes_gpu": activation_bytes(shape, workload, windows, BATCH_TOKENS["cuda"]),
            "gram_bytes": max(
                sum(f.count * 4 * f.width**2 * matrices for f in block.feed_forwards) for block in shape.blocks
            ),
            "written_bytes": pruned_bytes(shape, workload),
        }

    def to_dict(self) -> dict[str, object]:
        """Return the estimate as one JSON object; rates are FLOP/s and bytes/s."""
        return {
            "model": self.model,
            "shape": self.describe(),
            "workload": asdict(self.workload),
            "hardware": [asdict(hardware) | _finite(hardware) for hardware in self.hardware],
            "ways": [{**asdict(way), "total_seconds": way.total, "bound": way.bound} for way in self.ways],
        }


def _finite(hardware: Hardware) -> dict[str, float | None]:
    """Return the rates that may be infinite, which JSON has no number for, as None then."""
    rates = {"to_device": hardware.to_device, "link": hardware.link}
    return {name: rate if math.isfinite(rate) else None for name, rate in rates.items()}


def estimate_run(config: RunConfig) -> Estimate:
    """Estimate time and memory of a run with this configuration: here, and on machines with GPUs.

    This reads the model's configuration, no weights and no data, and measures this machine, which takes about a second.

    Raises:
        InputError: the model's configuration or the options cannot be used.
    """
    from cfsp_framework.host.manager import load_plugins
    from cfsp_framework.host.selection import select
    from cfsp_framework.modeling.loading import build_from_config, pick_device

    selection = select(config, load_plugins(config.run.plugins))
    device = pick_device(config.model.device)
    shape = measure_shape(*build_from_config(config))
    workload = plan_workload(config, selection, shape.context)
    algebra = {"float64"} if workload.select.cubes + workload.compensate.cubes else set[str]()
    machines = (this_machine(device, {shape.dtype, *algebra}), *NOMINAL)
    ways = tuple(way for machine in machines for way in estimate(shape, workload, machine))
    return Estimate(config.model.source, shape, workload, machines, ways)
