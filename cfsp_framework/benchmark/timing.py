"""Time models in turns in one process, and compare their speed-ups with the ideal.

An episode is the work of a server: a prompt in one call (prefill), then tokens one by one with the key-value cache
(decode). In every round each model runs its episodes, in alternating order, so that a drift of the machine affects all
models alike; a speed-up is the median over the rounds of the ratio within a round.
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
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from cfsp_framework.benchmark.candidates import Candidate
from cfsp_framework.benchmark.hardware import synchronize
from cfsp_framework.benchmark.roofline import CallCosts, MachineRates, ModelCosts, count_costs
from cfsp_framework.config import FrozenRecord
from cfsp_framework.errors import ConfigError
from cfsp_framework.modeling.config_facts import context_length
from cfsp_framework.modeling.size import measure_size
from cfsp_framework.runtime.progress import Progress

LEAST_SECONDS = 0.1
"""A round repeats an episode for this long, so that the resolution of the clock and the scheduler matter little."""
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


class BenchmarkSettings(FrozenRecord):
    """Work that every model does."""

    batch_sizes: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = (128, 512)
    """Tokens of a prompt."""
    decode_tokens: int = 32
    """Tokens decoded after the prompt; 0: prefill only."""
    repeats: int = 7
    """Measured rounds; one more warms up."""
    cache: Literal["dynamic", "static"] = "dynamic"
    """Whether the cache grows with each token, as in ``generate``, or is allocated at full length."""
    clock: Literal["wall", "processor"] = "wall"
    """Processor seconds, of all threads, are disturbed less by other programs on a CPU."""
    seed: int = 0

    @property
    def points(self) -> tuple[tuple[int, int], ...]:
        """Batch size and prompt length of every setting."""
        return tuple((batch, length) for batch in self.batch_sizes for length in self.lengths)


class Spread(FrozenRecord):
    """Median and quartiles of measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute interpolated quartiles; those of a single value are the value."""
        low, middle, high = statistics.quantiles([*values] * (2 if len(values) == 1 else 1), n=4, method="inclusive")
        return cls(median=middle, low=low, high=high)


class ModelSize(FrozenRecord):
    """Size and memory of one model."""

    name: str
    parameters: int
    bytes: int
    flops_per_token: int
    """Two per weight of every matrix product, the head included, attention scores excluded."""
    least_width: int
    most_width: int
    widths: int
    """Number of distinct widths."""
    channels: int
    """Of all feed-forwards together."""
    peak_bytes: int | None
    """Weights and the most that a run of the largest setting added; None if the system does not report it."""


class Ideal(FrozenRecord):
    """Speed-up if only the matrix products, or only reading the weights, took time."""

    flops: float
    bytes: float
    bound: Literal["FLOPs", "bytes"]
    """The slower of the two for the dense model on this machine."""
    expected: float
    """Ratio of the larger times of both models: between ``flops`` and ``bytes`` if different things bound them."""


class Speed(FrozenRecord):
    """Speed of one model in one phase of one setting."""

    model: str
    phase: Phase
    batch_size: int
    length: int
    seconds: Spread
    """Of a prompt, or of one token for each sequence of the batch."""
    tokens_per_second: float
    speed_up: Spread | None
    """Over the first model, round by round; None for the first model."""
    ideal: Ideal | None

    @property
    def reached(self) -> float | None:
        """Measured share of the ideal speed-up."""
        return self.speed_up.median / self.ideal.expected if self.speed_up and self.ideal else None


class BenchmarkReport(FrozenRecord):
    """Result of a benchmark."""

    format: Literal["cfsp-benchmark"] = "cfsp-benchmark"
    version: Literal[1] = 1
    device: str
    threads: int
    """Threads of matrix products on a CPU."""
    dtype: str
    flops_per_second: float
    """Of large matrix products, measured at the start."""
    bytes_per_second: float
    """Of matrices that are read for one product, measured at the start."""
    memory: Literal["CUDA allocator", "resident set", "not measured"]
    """Source of ``peak_bytes``."""
    workload: BenchmarkSettings
    random_weights: bool
    models: tuple[ModelSize, ...]
    speeds: tuple[Speed, ...]
    versions: dict[str, str]

    def to_json(self) -> str:
        """Return indented JSON."""
        return self.model_dump_json(indent=2) + "\n"


def time_models(
    candidates: Sequence[Candidate],
    settings: BenchmarkSettings,
    *,
    random_weights: bool = False,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Time ``candidates`` and compare each with the first.

    Raises:
        ConfigError: prompt and decoded tokens exceed a model's context, or the models differ in dtype.
    """
    progress = progress or Progress()
    check_settings(candidates, settings)
    device, dtype = candidates[0].model.device, candidates[0].dtype
    machine = MachineRates.measure(dtype, device)
    costs = [count_costs(candidate.model) for candidate in candidates]
    models = tuple(_measure_model(candidate, settings) for candidate in candidates)
    speeds: list[Speed] = []
    with progress.bar("benchmark", total=len(settings.points) * (settings.repeats + 1) * len(candidates)) as step:
        for batch, length in settings.points:
            rounds = _time_rounds(candidates, settings, batch, length, step)
            speeds += _compare(candidates, costs, machine, rounds, batch, length, settings.decode_tokens)
    return BenchmarkReport(
        device=_device_name(device),
        threads=torch.get_num_threads(),
        dtype=dtype,
        flops_per_second=machine.flops,
        bytes_per_second=machine.bytes,
        memory=_memory_source(device),
        workload=settings,
        random_weights=random_weights,
        models=models,
        speeds=tuple(speeds),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )


def check_settings(candidates: Sequence[Candidate], settings: BenchmarkSettings) -> None:
    """Refuse settings that cannot be run and models that cannot be compared."""
    first, length = candidates[0], max(settings.lengths)
    for candidate in candidates:
        context = context_length(candidate.model.config)
        if context is not None and length + settings.decode_tokens > context:
            raise ConfigError(
                f"{length} tokens of --lengths and {settings.decode_tokens} of --decode-tokens are more than the "
                f"context of {candidate.name}, {context}."
            )
        if candidate.dtype != first.dtype:
            raise ConfigError(
                f"{candidate.name} is in {candidate.dtype}, {first.name} in {first.dtype}; give --dtype to compare them."
            )
    if settings.clock == "processor" and first.model.device.type != "cpu":
        raise ConfigError("--clock processor measures a CPU only; use --clock wall on a GPU.")


Rounds = list[list[tuple[float, float]]]
"""For each model the rounds' seconds of a prefill and of decoding one token."""


def _time_rounds(
    candidates: Sequence[Candidate], settings: BenchmarkSettings, batch: int, length: int, step: Callable[[], None]
) -> Rounds:
    """Run every model in turn; a first round, which does not count, warms up and decides how often to repeat."""
    prompts = [_draw_prompt(candidate.model, settings, batch, length) for candidate in candidates]  # (B, T) each
    counts = []
    for candidate, ids in zip(candidates, prompts, strict=True):
        run_episode(candidate.model, ids, settings)
        seconds = max(1e-6, sum(run_episode(candidate.model, ids, settings)))
        counts.append(max(1, math.ceil(LEAST_SECONDS / seconds)))
        step()
    rounds: Rounds = [[] for _ in candidates]
    with _without_garbage_collection():
        for number in range(settings.repeats):
            for index in range(len(candidates)) if number % 2 == 0 else reversed(range(len(candidates))):
                model, ids, count = candidates[index].model, prompts[index], counts[index]
                episodes = [run_episode(model, ids, settings) for _ in range(count)]
                prefill, decode = (sum(seconds) / count for seconds in zip(*episodes, strict=True))
                rounds[index].append((prefill, decode / max(1, settings.decode_tokens)))
                step()
    return rounds


@contextmanager
def _without_garbage_collection() -> Generator[None]:
    """Disable the garbage collector inside the block: it would slow down a single episode."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@torch.inference_mode()
def run_episode(model: PreTrainedModel, ids: Tensor, settings: BenchmarkSettings) -> tuple[float, float]:
    """Return the seconds of one prefill of ``ids (B, T)``, and of decoding all tokens after it."""
    config: Any = model.config
    length = ids.shape[1] + settings.decode_tokens
    static = settings.cache == "static"
    cache = StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"cache" if "cache" in accepted else "past_key_values": cache, "use_cache": True}
    keep = "logits_to_keep" in accepted  # logits of the last token alone, as in ``generate``
    # An index copies one hidden state; for a slice, PyTorch on a CPU copies the whole head before the product.
    prompt, single = (
        {"logits_to_keep": torch.tensor([n - 1], device=ids.device)} if keep else {} for n in (ids.shape[1], 1)
    )
    read_clock = time.perf_counter if settings.clock == "wall" else time.process_time
    synchronize(model.device)
    start = read_clock()
    model(ids, **options, **prompt)
    synchronize(model.device)
    middle = read_clock()
    last = ids[:, -1:]  # (B, 1): the time does not depend on which token is decoded
    for _ in range(settings.decode_tokens):
        model(last, **options, **single)
    synchronize(model.device)
    return middle - start, read_clock() - middle


def _draw_prompt(model: PreTrainedModel, settings: BenchmarkSettings, batch: int, length: int) -> Tensor:
    draw = torch.Generator().manual_seed(settings.seed)
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=draw).to(model.device)  # (B, T)


def _compare(
    candidates: Sequence[Candidate],
    costs: Sequence[ModelCosts],
    machine: MachineRates,
    rounds: Rounds,
    batch: int,
    length: int,
    decoded: int,
) -> list[Speed]:
    """Summarise the rounds of a setting for each phase and model."""
    speeds = []
    for place, phase in enumerate(PHASES if decoded else PHASES[:1]):
        dense = [pair[place] for pair in rounds[0]]
        for number, candidate in enumerate(candidates):
            seconds = [pair[place] for pair in rounds[number]]
            spread = Spread.of(seconds)
            ratios = [before / after for before, after in zip(dense, seconds, strict=True)]
            speeds.append(
                Speed(
                    model=candidate.name,
                    phase=phase,
                    batch_size=batch,
                    length=length,
                    seconds=spread,
                    tokens_per_second=batch * (length if phase == "prefill" else 1) / spread.median,
                    speed_up=Spread.of(ratios) if number else None,
                    ideal=compute_ideal(costs[0], costs[number], machine, phase, batch, length, decoded)
                    if number
                    else None,
                )
            )
    return speeds


def compute_ideal(
    dense: ModelCosts, pruned: ModelCosts, machine: MachineRates, phase: str, batch: int, length: int, decoded: int = 0
) -> Ideal:
    """Return the speed-up of the best possible program on ``machine``; tokens are decoded after half of ``decoded``."""

    def cost(model: ModelCosts) -> CallCosts:
        return model.prefill(batch, length) if phase == "prefill" else model.decode(batch, length + decoded // 2)

    before, after = cost(dense), cost(pruned)
    return Ideal(
        flops=before.flops / after.flops,
        bytes=before.bytes / after.bytes,
        bound=machine.bound(before),
        expected=machine.seconds(before) / machine.seconds(after),
    )


def _measure_model(candidate: Candidate, settings: BenchmarkSettings) -> ModelSize:
    size, widths = measure_size(candidate.model), candidate.widths
    added = _measure_peak(candidate.model, settings)
    return ModelSize(
        name=candidate.name,
        parameters=size.parameters,
        bytes=size.bytes,
        flops_per_token=size.flops_per_token,
        least_width=min(widths),
        most_width=max(widths),
        widths=len(set(widths)),
        channels=sum(widths),
        peak_bytes=None if added is None else size.bytes + added,
    )


def _measure_peak(model: PreTrainedModel, settings: BenchmarkSettings) -> int | None:
    """Return the bytes that an episode of the largest setting adds to the weights."""
    device, source = model.device, _memory_source(model.device)
    if source == "not measured":
        return None
    ids = _draw_prompt(model, settings, *max(settings.points, key=math.prod))  # (B, T)
    short = settings.model_copy(update={"decode_tokens": min(1, settings.decode_tokens)})
    if source == "CUDA allocator":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run_episode(model, ids, short)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)  # return freed memory, which would hide what the episode adds
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = psutil.Process().memory_info().rss
    run_episode(model, ids, short)
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return max(0, peak - before)


def _memory_source(device: torch.device) -> Literal["CUDA allocator", "resident set", "not measured"]:
    if device.type == "cuda":
        return "CUDA allocator"
    return "resident set" if device.type == "cpu" and sys.platform == "linux" else "not measured"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"CPU ({names[0]})" if names else "CPU"
    return f"{device.type.upper()} ({platform.processor() or platform.machine()})"
