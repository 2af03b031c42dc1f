"""Cutting: a narrower model computes what the dense one computes with the removed channels masked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cfsp_framework import Budget, Compensator, Criterion, PruningPlan, RunConfig, Update, prune
from cfsp_framework.api.components import Allocator
from cfsp_framework.engine.collect import collect
from cfsp_framework.engine.measure import measure_block
from cfsp_framework.engine.measurements import summarise
from cfsp_framework.engine.replay import embed
from cfsp_framework.errors import PlanError
from cfsp_framework.host.registry import ConfiguredComponent, Plugins
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.feed_forwards import DenseFeedForward
from cfsp_framework.pruning.compensation import FirstPassCompensation
from cfsp_framework.pruning.cut import cut_model
from cfsp_framework.pruning.planning import plan_blocks
from cfsp_framework.pruning.surgery import added_biases, apply_updates, check_fits, cut_block
from cfsp_framework.runtime.progress import Progress
from cfsp_framework.statistics import DOWN_INPUT_GRAM, DOWN_INPUT_MEAN
from helpers.compensation import GivenUpdates
from helpers.types import MakeModel, MakePlan, OpenTiny

WINDOWS = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(2))
WIDTHS = (40, 24, 56)
OpenPair = Callable[[str], tuple[Decoder, Decoder]]


def module_of(decoder: Decoder, index: int) -> DenseFeedForward:
    """Return block ``index``'s only feed-forward module."""
    (module,) = decoder.feed_forward_modules(index)
    assert isinstance(module, DenseFeedForward)
    return module


@torch.no_grad()
def logits(decoder: Decoder, windows: Tensor = WINDOWS) -> Tensor:
    output: Tensor = decoder.model(windows, use_cache=False).logits
    return output


@pytest.fixture
def open_pair(make_model: MakeModel, open_tiny: OpenTiny) -> OpenPair:
    """``open_pair(name)``: the same model twice."""
    return lambda name: (open_tiny(make_model(name))[1], open_tiny(make_model(name))[1])


@torch.no_grad()
def zero_removed(decoder: Decoder, plan: PruningPlan) -> None:
    """Mask the removed channels of the dense model."""
    for index, block in enumerate(plan.blocks):
        removed = sorted(set(range(block.width)) - set(block.kept))
        module_of(decoder, index).down.weight[:, removed] = 0


def test_a_cut_model_is_the_dense_one_with_removed_channels_masked(
    family: str, open_pair: OpenPair, make_plan: MakePlan
) -> None:
    cut, dense = open_pair(family)
    plan, before = make_plan(cut, WIDTHS), logits(dense)
    cut_model(cut, plan)
    zero_removed(dense, plan)
    torch.testing.assert_close(logits(cut), logits(dense), rtol=1e-4, atol=1e-5)
    assert (logits(cut) - before).abs().max() > 0.05, "the removed channels mattered"


def test_modules_and_configuration_have_the_planned_widths(
    family: str, make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan
) -> None:
    _, decoder = open_tiny(make_model(family))
    (layout,) = decoder.architecture.feed_forwards
    cut_model(decoder, make_plan(decoder, WIDTHS))
    assert decoder.widths == WIDTHS
    for index, width in enumerate(WIDTHS):
        (feed_forward,) = decoder.feed_forwards(index)
        gate = feed_forward.gate
        assert gate is not None
        assert feed_forward.width == len(feed_forward.up) == len(gate) == width
        for name, linear in module_of(decoder, index).projections.items():
            assert isinstance(linear, nn.Linear)
            assert linear.weight.shape == (linear.out_features, linear.in_features)
            assert linear.weight.is_contiguous()
            assert linear.weight.requires_grad
            wide = width * (2 if layout.fused else 1)
            assert (linear.in_features if name == layout.down else linear.out_features) == wide or name == layout.down
        module = decoder.blocks[index].get_submodule(layout.path)
        assert getattr(module, "intermediate_size", width) == width
        assert decoder.config.per_layer_config[index].intermediate_size == width
    assert decoder.config.to_dict()["per_layer_config"] == {
        str(index): {"intermediate_size": width} for index, width in enumerate(WIDTHS)
    }


def test_equal_widths_make_an_ordinary_configuration(
    family: str, make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan
) -> None:
    _, decoder = open_tiny(make_model(family))
    before = decoder.config.to_dict()
    cut_model(decoder, make_plan(decoder, (48, 48, 48)))
    assert not decoder.config.is_heterogeneous
    assert decoder.config.to_dict() == {**before, "intermediate_size": 48}


@pytest.mark.parametrize("widths", [(64, 64, 8), (1, 1, 64), (63, 64, 64)])
def test_blocks_may_stay_whole_or_keep_a_single_channel(
    widths: tuple[int, ...], open_pair: OpenPair, make_plan: MakePlan
) -> None:
    cut, dense = open_pair("phi3")
    plan = make_plan(cut, widths)
    cut_model(cut, plan)
    zero_removed(dense, plan)
    assert cut.widths == widths
    torch.testing.assert_close(logits(cut), logits(dense), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def permute_channels(decoder: Decoder) -> list[list[int]]:
    """Shuffle every block's channels, which does not change the output; return the old channel at each position."""
    orders: list[list[int]] = []
    draw = torch.Generator().manual_seed(3)
    for index, width in enumerate(decoder.widths):
        order = torch.randperm(width, generator=draw)
        (feed_forward,) = decoder.feed_forwards(index)
        parts = {name: getattr(feed_forward, name) for name in ("up", "gate", "up_bias", "gate_bias")}
        permuted = {name: value[order].clone() for name, value in parts.items() if value is not None}
        apply_updates(decoder, index, [Update(down=feed_forward.down[:, order].clone(), **permuted)])
        orders.append(order.tolist())
    return orders


def test_permuting_the_channels_permutes_the_plan(family: str, open_pair: OpenPair, plugins: Plugins) -> None:
    original, permuted = open_pair(family)
    orders = permute_channels(permuted)
    torch.testing.assert_close(logits(permuted), logits(original), rtol=1e-4, atol=1e-5)

    criteria: dict[str, ConfiguredComponent[Criterion]] = {
        name: plugins.criteria.create(name, {}) for name in plugins.criteria if name != "random"
    }
    allocator: ConfiguredComponent[Allocator] = plugins.allocators.create("cfsp", {})
    required = allocator.component.required().union(*(c.component.required() for c in criteria.values()))
    collectors = plugins.collectors_for(required)
    measured = [
        collect(decoder, WINDOWS, criteria, collectors, seed=0, progress=Progress()) for decoder in (original, permuted)
    ]
    for name in criteria:
        before, after = (
            plan_blocks(summarise(decoder, measurements, name), allocator, Budget(0.5))
            for decoder, measurements in zip((original, permuted), measured, strict=True)
        )
        for order, left, right in zip(orders, before, after, strict=True):
            assert sorted(order[channel] for channel in right.kept) == list(left.kept), f"{name}, {left.block}"


def test_ratio_0_is_the_identity(family: str, make_model: MakeModel, open_tiny: OpenTiny, tmp_path: Path) -> None:
    folder = make_model(family)
    config = RunConfig.build(
        model=str(folder), ratio=0, criterion="magnitude", allocator="uniform", compensator="none", device="cpu"
    )
    result = prune(config, tmp_path / "out")
    assert result.report.reload_difference == 0
    assert result.plan.achieved_ratio == 0
    (_, before), (_, after) = open_tiny(folder), open_tiny(tmp_path / "out")
    assert torch.equal(logits(after), logits(before))
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))


def test_a_plan_for_a_model_of_other_shapes_is_refused_and_nothing_changes(
    make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan
) -> None:
    _, decoder = open_tiny(make_model("llama"))
    plan = make_plan(decoder, WIDTHS)
    first, second, third = plan.blocks
    narrower = first.model_copy(update={"width": 63, "kept": (0, 1)})
    elsewhere = first.model_copy(update={"path": "feed_forward"})
    wrong: list[tuple[str, object, str]] = [
        ("model", plan.model.model_copy(update={"family": "qwen2"}), "qwen2 model of 3 blocks"),
        ("blocks", (first, second), "llama model of 2 blocks"),
        ("blocks", (narrower, second, third), "entry 0 .* width 63; .* width 64"),
        ("blocks", (elsewhere, second, third), "feed_forward.* has mlp"),
        ("blocks", (second, first, third), "entry 0 is block 1"),
    ]
    before = logits(decoder)
    for field, value, message in wrong:
        bad = plan.model_copy(update={field: value})
        with pytest.raises(PlanError, match=message):
            check_fits(decoder, bad)
        with pytest.raises(PlanError, match=message):
            cut_model(decoder, bad)
    assert torch.equal(logits(decoder), before)
    assert decoder.widths == (64, 64, 64)
    check_fits(decoder, plan)


def test_a_plan_fits_once(make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan) -> None:
    _, decoder = open_tiny(make_model("llama"))
    plan = make_plan(decoder, WIDTHS)
    cut_model(decoder, plan)
    with pytest.raises(PlanError, match="width 64; the model has mlp of width 40"):
        cut_model(decoder, plan)


def test_cutting_twice_is_cutting_once(open_pair: OpenPair, make_plan: MakePlan) -> None:
    twice, once = open_pair("llama-bias")
    first = make_plan(twice, WIDTHS)
    cut_model(twice, first)
    second = make_plan(twice, (16, 16, 16))
    cut_model(twice, second)
    assert not twice.config.is_heterogeneous
    for index in range(3):
        kept = [first.blocks[index].kept[channel] for channel in second.blocks[index].kept]
        cut_block(once, index, [torch.tensor(kept)])
    assert torch.equal(logits(twice), logits(once))


def test_bias_restores_the_mean_output_of_the_removed_channels(
    family: str, make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan, plugins: Plugins
) -> None:
    folder = make_model(family)
    (_, cut), (_, dense), (_, untouched) = (open_tiny(folder) for _ in range(3))
    plan = make_plan(cut, (40, 64, 24))  # the second block loses nothing
    compensator: ConfiguredComponent[Compensator] = plugins.compensators.create("bias", {})
    collectors = plugins.collectors_for({DOWN_INPUT_MEAN})
    measurements = collect(cut, WINDOWS, {}, collectors, seed=0, progress=Progress())
    statistics = {(measurement.block, measurement.path): measurement.statistics for measurement in measurements}
    cut_model(cut, plan, FirstPassCompensation(cut, statistics, compensator, seed=0))

    native = module_of(dense, 0).down.bias is not None
    for index, block in enumerate(plan.blocks):
        removed = sorted(set(range(block.width)) - set(block.kept))
        down = module_of(dense, index).down
        lost = down.weight.detach()[:, removed] @ statistics[index, block.path][DOWN_INPUT_MEAN][removed]
        down.bias = nn.Parameter(lost if down.bias is None else down.bias.detach() + lost)
    zero_removed(dense, plan)
    torch.testing.assert_close(logits(cut), logits(dense), rtol=1e-4, atol=1e-5)
    assert added_biases(cut.config) == ([] if native else ["mlp.down_proj"])
    assert all(module_of(cut, index).down.bias is not None for index in range(3))
    if not native:
        assert torch.equal(module_of(cut, 1).down.bias, torch.zeros(32))

    outputs = [record_output(decoder, 0).mean((0, 1)) for decoder in (cut, untouched)]  # of the same inputs
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_biases_that_are_added_one_after_another_are_all_configured(
    make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan
) -> None:
    _, decoder = open_tiny(make_model("llama"))
    down_biases = GivenUpdates(lambda _, kept: [Update(down_bias=torch.ones(32))])
    up_biases = GivenUpdates(lambda _, kept: [Update(up_bias=torch.ones(len(kept[0])))])
    cut_model(decoder, make_plan(decoder, (40, 64, 24)), down_biases)
    assert added_biases(decoder.config) == ["mlp.down_proj"]
    cut_model(decoder, make_plan(decoder, (40, 32, 16)), up_biases)
    assert added_biases(decoder.config) == ["mlp.down_proj", "mlp.up_proj"]
    for index, down, up in ((0, 1, 0), (1, 0, 1), (2, 1, 1)):  # zero where a block lost nothing
        (feed_forward,) = decoder.feed_forwards(index)
        assert feed_forward.down_bias is not None
        assert feed_forward.up_bias is not None
        assert feed_forward.gate_bias is None
        assert torch.equal(feed_forward.down_bias, torch.full((32,), float(down)))
        assert torch.equal(feed_forward.up_bias, torch.full((decoder.widths[index],), float(up)))


def record_output(decoder: Decoder, index: int) -> Tensor:
    """Return the output of block ``index``'s feed-forward on the windows, ``(N, T, D)``."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    handle = module_of(decoder, index).down.register_forward_hook(keep)
    logits(decoder)
    handle.remove()
    return outputs[0]


PARTS = ("down", "up", "gate", "down_bias", "up_bias", "gate_bias")


@pytest.mark.parametrize("parts", [*[(part,) for part in PARTS], PARTS, ("up", "gate_bias")], ids=str)
@pytest.mark.parametrize("name", ["llama-bias", "phi3"])
def test_exactly_the_changes_of_a_compensator_are_written(
    name: str, parts: tuple[str, ...], make_model: MakeModel, open_tiny: OpenTiny
) -> None:
    _, decoder = open_tiny(make_model(name))
    (before,) = decoder.feed_forwards(1)
    old = {part: None if getattr(before, part) is None else getattr(before, part).clone() for part in PARTS}
    draw = torch.Generator().manual_seed(4)
    shapes = {"down": (32, 64), "up": (64, 32), "gate": (64, 32), "down_bias": (32,)}
    new = {part: torch.randn(shapes.get(part, (64,)), generator=draw) for part in parts}
    apply_updates(decoder, 1, [Update(**new)])  # type: ignore[arg-type]
    (after,) = decoder.feed_forwards(1)
    for part in PARTS:
        value, expected = getattr(after, part), new.get(part, old[part])
        if expected is None:  # the other half of a bias that one half needs
            assert value is None or not value.any(), part
        else:
            assert torch.equal(value, expected), part


def test_an_update_is_written_in_the_models_dtype(make_model: MakeModel, open_tiny: OpenTiny) -> None:
    _, decoder = open_tiny(make_model("phi3", dtype="bfloat16"))
    apply_updates(decoder, 0, [Update(down=torch.ones(32, 64), down_bias=torch.ones(32), up=torch.ones(64, 32))])
    (feed_forward,) = decoder.feed_forwards(0)
    for tensor in (feed_forward.down, feed_forward.down_bias, feed_forward.up):
        assert tensor is not None
        assert tensor.dtype == torch.bfloat16
        assert bool((tensor == 1).all())


def test_a_gram_matrix_of_a_cut_block_is_the_kept_part_of_the_dense_one(
    make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan, plugins: Plugins
) -> None:
    _, decoder = open_tiny(make_model("phi3"))
    collectors = plugins.collectors_for({DOWN_INPUT_GRAM})
    (dense,) = measure_block(decoder, 0, embed(decoder, WINDOWS), collectors)
    kept = torch.tensor(make_plan(decoder, WIDTHS).blocks[0].kept)
    cut_block(decoder, 0, [kept])
    (narrow,) = measure_block(decoder, 0, embed(decoder, WINDOWS), collectors)
    expected = dense[DOWN_INPUT_GRAM][kept][:, kept]
    torch.testing.assert_close(narrow[DOWN_INPUT_GRAM], expected, rtol=1e-4, atol=1e-5)
