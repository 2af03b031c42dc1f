"""How fast models are, measured in turns in one process, and how fast the smaller one could be at best.

An episode is what serving does: a prompt at once (prefill), then tokens one by one with the cache of keys and values
(decode). In every round each model runs one episode after the other, in alternating order, so that a machine that
drifts drifts for all of them; a speed-up is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import math
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from cfsp_framework.benchmark.candidates import Contestant
from cfsp_framework.benchmark.hardware import synchronise
from cfsp_framework.benchmark.roofline import Costs, Machine, count_costs
from cfsp_framework.config import FrozenRecord
from cfsp_framework.errors import ConfigError
from cfsp_framework.modeling.config_facts import context_length
from cfsp_framework.modeling.size import measure_size
from cfsp_framework.runtime.progress import Progress

_LEAST_SECONDS = 0.1
"""Episodes are repeated within a round until they take this long, so that the clock and the scheduler matter little."""
_STATUS = Path("/proc/self/status")
_FORGET = Path("/proc/self/clear_refs")


class Workload(FrozenRecord):
    """What every model is run on."""

    batch_sizes: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = (128, 512)
    """Tokens of a prompt."""
    decode_tokens: int = 32
    """Tokens decoded after it; 0: prefill only."""
    repeats: int = 7
    """Rounds that are measured, after one that warms up."""
    cache: Literal["dynamic", "static"] = "dynamic"
    """Whether the cache grows with each token, as ``generate`` has it, or has its full length from the start."""
    clock: Literal["wall", "processor"] = "wall"
    """Processor seconds, of all threads, are what other programs on a CPU disturb less."""
    seed: int = 0

    @property
    def points(self) -> tuple[tuple[int, int], ...]:
        """Batch size and length of every setting."""
        return tuple((batch, length) for batch in self.batch_sizes for length in self.lengths)


class Spread(FrozenRecord):
    """The middle of some measurements and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles as medians lie: interpolated, and those of one value are the value."""
        low, middle, high = statistics.quantiles([*values] * (2 if len(values) == 1 else 1), n=4, method="inclusive")
        return cls(median=middle, low=low, high=high)


class ModelSize(FrozenRecord):
    """One of the models, and what it takes."""

    name: str
    parameters: int
    bytes: int
    flops_per_token: int
    """Two per weight of every matrix product, the head's too, attention scores aside."""
    least_width: int
    most_width: int
    widths: int
    """How many different ones."""
    channels: int
    """Of all feed-forwards together."""
    peak_bytes: int | None
    """Its weights and the most that a run of the largest setting added; None where the system does not tell."""


class Ideal(FrozenRecord):
    """The speed-up there would be if nothing but the products, or nothing but reading the weights, took time."""

    flops: float
    bytes: float
    bound: Literal["FLOPs", "bytes"]
    """What bounds the dense model on this machine: its computing or its reading takes longer."""
    expected: float
    """By the larger of both times of either model: between ``flops`` and ``bytes`` where the models are bound
    differently, else the one that bounds."""


class Speed(FrozenRecord):
    """One model, one phase, one setting."""

    model: str
    phase: Literal["prefill", "decode"]
    batch_size: int
    length: int
    seconds: Spread
    """Of a prompt, or of one token for each sequence of the batch."""
    tokens_per_second: float
    speed_up: Spread | None
    """Over the first model, round by round; None for itself."""
    ideal: Ideal | None

    @property
    def reached(self) -> float | None:
        """The share of the ideal speed-up that was measured."""
        return self.speed_up.median / self.ideal.expected if self.speed_up and self.ideal else None


class Benchmark(FrozenRecord):
    """Everything a benchmark found out."""

    format: Literal["cfsp-benchmark"] = "cfsp-benchmark"
    version: Literal[1] = 1
    device: str
    threads: int
    """Of a CPU's products."""
    dtype: str
    flops_per_second: float
    """Of large matrix products, measured at the start."""
    bytes_per_second: float
    """Of matrices that are read for one product, measured at the start."""
    memory: Literal["CUDA allocator", "resident set", "not measured"]
    """Where ``peak_bytes`` come from."""
    workload: Workload
    random_weights: bool
    models: tuple[ModelSize, ...]
    speeds: tuple[Speed, ...]
    versions: dict[str, str]

    def to_json(self) -> str:
        """Indented JSON."""
        return self.model_dump_json(indent=2) + "\n"


def benchmark(
    contestants: Sequence[Contestant],
    workload: Workload,
    *,
    random_weights: bool = False,
    progress: Progress | None = None,
) -> Benchmark:
    """Time ``contestants`` on ``workload``; the first is what the others are compared with.

    Raises:
        ConfigError: prompts and decoded tokens are longer than a context, or the models differ in dtype.
    """
    progress = progress or Progress()
    first = contestants[0]
    check_workload(contestants, workload)
    device, dtype = first.model.device, str(first.model.dtype).removeprefix("torch.")
    machine = Machine.measured(dtype, device)
    costs = [count_costs(one.model) for one in contestants]
    peaks = [_peak(one, workload) for one in contestants]
    speeds: list[Speed] = []
    with progress.bar("benchmark", total=len(workload.points) * (workload.repeats + 1) * len(contestants)) as step:
        for batch, length in workload.points:
            rounds = _race(contestants, workload, batch, length, step)
            speeds += _told(contestants, costs, machine, rounds, batch, length, workload.decode_tokens)
    return Benchmark(
        device=_device_name(device),
        threads=torch.get_num_threads(),
        dtype=dtype,
        flops_per_second=machine.flops,
        bytes_per_second=machine.bytes,
        memory=_memory_source(device),
        workload=workload,
        random_weights=random_weights,
        models=tuple(_size(one, peak) for one, peak in zip(contestants, peaks, strict=True)),
        speeds=tuple(speeds),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )


def check_workload(contestants: Sequence[Contestant], workload: Workload) -> None:
    """Refuse what could not be run or would compare unlike things."""
    longest = max(workload.lengths) + workload.decode_tokens
    for one in contestants:
        context = context_length(one.model.config)
        if context is not None and longest > context:
            raise ConfigError(
                f"{max(workload.lengths)} tokens of --lengths and {workload.decode_tokens} of --decode-tokens are more "
                f"than the context of {one.name}, {context}."
            )
        if one.model.dtype != contestants[0].model.dtype:
            raise ConfigError(
                f"{one.name} is in {str(one.model.dtype).removeprefix('torch.')}, {contestants[0].name} in "
                f"{str(contestants[0].model.dtype).removeprefix('torch.')}; give --dtype."
            )
    if workload.clock == "processor" and contestants[0].model.device.type != "cpu":
        raise ConfigError("--clock processor is for CPUs; a GPU's work is none of the processor's.")


Rounds = dict[int, list[tuple[float, float]]]
"""By model: seconds of a prefill and of decoding one token, one pair for each round."""


def _race(contestants: Sequence[Contestant], workload: Workload, batch: int, length: int, step: Any) -> Rounds:
    """Every model in turn, forwards and backwards; a round that is not counted warms up and finds how often to run."""
    prompts = [_prompt(one.model, workload, batch, length) for one in contestants]
    counts = []
    for one, ids in zip(contestants, prompts, strict=True):
        _episode(one.model, ids, workload)
        spent = max(1e-6, sum(_episode(one.model, ids, workload)))
        counts.append(max(1, math.ceil(_LEAST_SECONDS / spent)))
        step()
    times: Rounds = {number: [] for number in range(len(contestants))}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of an episode would be somebody's bad luck
    try:
        for number in range(workload.repeats):
            order = range(len(contestants)) if number % 2 == 0 else reversed(range(len(contestants)))
            for index in order:
                found = [_episode(contestants[index].model, prompts[index], workload) for _ in range(counts[index])]
                prefill, decode = (sum(part) / len(found) for part in zip(*found, strict=True))
                times[index].append((prefill, decode / max(1, workload.decode_tokens)))
                step()
    finally:
        if collecting:
            gc.enable()
    return times


@torch.inference_mode()
def _episode(model: PreTrainedModel, ids: Tensor, workload: Workload) -> tuple[float, float]:
    """Seconds of one prefill of ``ids (B, T)``, and of decoding all tokens after it."""
    cache = _cache(model, ids.shape[1] + workload.decode_tokens, workload.cache)
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"cache" if "cache" in accepted else "past_key_values": cache, "use_cache": True}
    keep = "logits_to_keep" in accepted  # the head for the last token alone, as ``generate`` does
    # By index, which copies that token's hidden state: of a slice, PyTorch on a CPU multiplies a copy of the whole head.
    prompt, single = (
        {"logits_to_keep": torch.tensor([n - 1], device=ids.device)} if keep else {} for n in (ids.shape[1], 1)
    )
    device = model.device
    now = time.perf_counter if workload.clock == "wall" else time.process_time
    synchronise(device)
    start = now()
    model(ids, **options, **prompt)
    synchronise(device)
    middle = now()
    last = ids[:, -1:]  # (B, 1): which token it is takes no time
    for _ in range(workload.decode_tokens):
        model(last, **options, **single)
    synchronise(device)
    return middle - start, now() - middle


def _cache(model: PreTrainedModel, length: int, kind: str) -> Any:
    config: Any = model.config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=length)


def _prompt(model: PreTrainedModel, workload: Workload, batch: int, length: int) -> Tensor:
    draw = torch.Generator().manual_seed(workload.seed)
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=draw).to(model.device)  # (B, T)


def _told(
    contestants: Sequence[Contestant],
    costs: Sequence[Costs],
    machine: Machine,
    rounds: Rounds,
    batch: int,
    length: int,
    decoded: int,
) -> list[Speed]:
    """What a setting's rounds say of each phase and each model."""
    speeds = []
    phases: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode") if decoded else ("prefill",)
    for place, phase in enumerate(phases):
        dense = [pair[place] for pair in rounds[0]]
        for number, one in enumerate(contestants):
            seconds = [pair[place] for pair in rounds[number]]
            spread = Spread.of(seconds)
            ratios = [before / after for before, after in zip(dense, seconds, strict=True)]
            speeds.append(
                Speed(
                    model=one.name,
                    phase=phase,
                    batch_size=batch,
                    length=length,
                    seconds=spread,
                    tokens_per_second=batch * (length if phase == "prefill" else 1) / spread.median,
                    speed_up=Spread.of(ratios) if number else None,
                    ideal=ideal(costs[0], costs[number], machine, phase, batch, length, decoded) if number else None,
                )
            )
    return speeds


def ideal(
    dense: Costs, pruned: Costs, machine: Machine, phase: str, batch: int, length: int, decoded: int = 0
) -> Ideal:
    """What the best possible program would gain on ``machine``; a token is decoded on half of all that are decoded."""
    if phase == "prefill":
        before, after = dense.prefill(batch, length), pruned.prefill(batch, length)
    else:
        before, after = dense.decode(batch, length + decoded // 2), pruned.decode(batch, length + decoded // 2)
    return Ideal(
        flops=before.flops / after.flops,
        bytes=before.bytes / after.bytes,
        bound="FLOPs" if machine.bound(before) == "FLOPs" else "bytes",
        expected=machine.seconds(before) / machine.seconds(after),
    )


def _size(one: Contestant, peak: int | None) -> ModelSize:
    size = measure_size(one.model)
    return ModelSize(
        name=one.name,
        parameters=size.parameters,
        bytes=size.bytes,
        flops_per_token=size.flops_per_token,
        least_width=min(one.widths),
        most_width=max(one.widths),
        widths=len(set(one.widths)),
        channels=sum(one.widths),
        peak_bytes=peak,
    )


def _peak(one: Contestant, workload: Workload) -> int | None:
    """Bytes of the weights and of what an episode of the largest setting adds to them."""
    device = one.model.device
    weights = measure_size(one.model).bytes
    batch, length = max(workload.points, key=math.prod)
    ids = _prompt(one.model, workload, batch, length)
    few = workload.model_copy(update={"decode_tokens": min(1, workload.decode_tokens)})
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _episode(one.model, ids, few)
        return weights + torch.cuda.max_memory_allocated(device) - before
    if _memory_source(device) == "not measured":
        return None
    gc.collect()
    _trim()
    _FORGET.write_text("5")  # the peak so far
    before = psutil.Process().memory_info().rss
    _episode(one.model, ids, few)
    peak = int(_STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return weights + max(0, peak - before)


def _memory_source(device: torch.device) -> Literal["CUDA allocator", "resident set", "not measured"]:
    if device.type == "cuda":
        return "CUDA allocator"
    return "resident set" if device.type == "cpu" and sys.platform == "linux" else "not measured"


def _trim() -> None:
    """Have freed memory returned, which would hide what a run takes; where the C library cannot, nothing happens."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"CPU ({named[0]})" if named else "CPU"
    return f"{device.type.upper()} ({platform.processor() or platform.machine()})"
