"""Every family: a cut model equals a masked one, reopens in every way, streams, and is measured right; or is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfsp_framework import BlockStatistics, FeedForwardLayout
from cfsp_framework.data.windows import PADDING
from cfsp_framework.engine.collect import collect
from cfsp_framework.engine.measurements import FeedForwardMeasurement
from cfsp_framework.engine.replay import ForwardOptions, embed, finish, logits, pass_block
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.modeling.decoder import Decoder, open_decoder
from cfsp_framework.modeling.detection import find_architecture
from cfsp_framework.modeling.feed_forwards import DenseFeedForward, ExpertFeedForwards, FeedForwardModule
from cfsp_framework.pipeline import prune
from cfsp_framework.runtime.progress import Progress
from cfsp_framework.statistics import DOWN_INPUT_SQUARES
from helpers import families
from helpers.families import BASE, FAMILIES, IDS, MIXTURES, PRUNED, REFUSED, Examination, Reader

PLUGINS = load_plugins()
# One family of every form, for the dtype most models have.
FORMS = {
    "gated": "llama",
    "fused": "phi3",
    "plain": "phi",
    "plain Conv1D": "gpt2",
    "experts: fused": "mixtral",
    "experts: fused interleaved transposed with biases": "gpt_oss",
    "experts: fused transposed": "llama4_text",
}
DESCRIBED = tuple(
    name for name in PRUNED if name != "gemma3n_text" and PLUGINS.architecture(families.config_of(name)) is not None
)


def skip_unknown(name: str) -> None:
    if not FAMILIES[name].known:
        pytest.skip(f"this version of Transformers has no {FAMILIES[name].model_type}")


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with families.reader(tmp_path_factory.mktemp("remote")) as reader:
        yield reader


@pytest.fixture(scope="module", params=PRUNED)
def examined(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, remote: Reader) -> Examination:
    """Each family in turn; the tests of a family share its results."""
    name: str = request.param
    skip_unknown(name)
    return Examination(name, tmp_path_factory.mktemp(name), remote)


def opened(name: str, change: Callable[[Decoder], None] = lambda decoder: None) -> Decoder:
    """Open a fresh model of a family, in memory only."""
    skip_unknown(name)
    decoder = open_decoder(families.build(name), PLUGINS)
    change(decoder)
    return decoder


def committed() -> dict[str, list[str]]:
    """Return the rows of the document's table by family."""
    section = families.DOCUMENT.read_text(encoding="utf-8").split("<!-- families -->")[1]
    lines = section.split("<!-- end of families -->")[0].strip().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == list(families.HEADINGS)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    return {row[0].strip("`"): row for row in rows}


def test_a_cut_model_computes_the_same_as_a_masked_one(examined: Examination) -> None:
    from_masked, from_dense = examined.cut
    assert from_masked <= families.CUT_TOLERANCE
    assert from_dense > 1e-2


def test_a_run_changes_only_feed_forwards(examined: Examination) -> None:
    result = examined.memory
    assert len(list(examined.source.glob("*.safetensors"))) > 1
    assert result.report.reload_difference < 1e-5
    assert result.plan.achieved_ratio == pytest.approx(0.4, abs=0.05)
    shares = {entry.block: len(entry.kept) / entry.width for entry in result.plan.blocks}
    assert len(set(shares.values())) > 1, "blocks differ in width"
    dense, pruned = families.tensors_of(examined.source), families.tensors_of(result.folder)
    assert dense.keys() == pruned.keys()
    same = {key for key in dense if dense[key].shape == pruned[key].shape}
    assert all(dense[key].equal(pruned[key]) for key in same)
    layouts = examined.dense.architecture.feed_forwards
    names = {name for layout in layouts for name in (layout.gate, layout.up, layout.down) if name}
    assert all(is_projection(key, names) for key in dense.keys() - same)


def is_projection(key: str, names: set[str]) -> bool:
    """Return whether a tensor of a checkpoint is of a projection; some families name experts differently on disk."""
    on_disk = {"w1", "w2", "w3", "gate_proj", "up_proj", "input_linear", "output_linear"}
    parts = {part.removesuffix("_bias") for part in key.split(".")}
    return bool(parts & (names | on_disk)) and "router" not in parts


def test_experts_of_a_block_keep_equally_many_channels_of_their_own(examined: Examination) -> None:
    kept: dict[tuple[int, str], set[tuple[int, ...]]] = {}
    for entry in examined.memory.plan.blocks:
        if entry.path[-1:].isdigit() and len(entry.kept) < entry.width:
            kept.setdefault((entry.block, entry.path.rpartition(".")[0]), set()).add(entry.kept)
    assert bool(kept) == (examined.name in MIXTURES)
    for chosen in kept.values():
        assert len({len(channels) for channels in chosen}) == 1
        assert len(chosen) > 1


def test_streaming_writes_the_same_checkpoint(examined: Examination) -> None:
    assert examined.streaming_differences == []
    assert examined.streamed.report.reload_difference < 1e-5
    assert examined.streamed.report.streamed


def test_adapters_have_the_planned_ranks_and_merge_to_the_same(examined: Examination) -> None:
    check = examined.adapters
    assert check.trained == check.planned
    assert check.added > 1e-2
    assert max(check.merged, check.reopened) <= families.ADAPTER_TOLERANCE


def test_reopens_where_this_package_is_imported(examined: Examination) -> None:
    assert examined.imported == examined.expected


def test_reopens_by_the_code_it_brings(examined: Examination) -> None:
    assert examined.remote["own_code"] == (examined.name != "gemma3n_text")  # whose configuration has a list of widths
    assert families.agree(examined.remote, examined.expected)
    if examined.name not in MIXTURES:
        assert examined.remote["logits"] == examined.expected["logits"]


def test_block_by_block_is_the_models_own_forward(examined: Examination) -> None:
    decoder = examined.dense
    assert families.relative(logits(decoder, IDS), families.logits_of(decoder)) < 1e-5


@torch.no_grad()
def test_padding_on_the_right_changes_no_real_token(examined: Examination) -> None:
    decoder, windows = examined.dense, IDS.clone()
    windows[0, 13:] = PADDING
    [batch] = embed(decoder, windows, ForwardOptions(batch_size=2))
    for index in range(len(decoder.blocks)):
        pass_block(decoder, index, [batch])
    ids, real = windows.clamp(min=0), windows != PADDING
    replayed = finish(decoder, ids, batch.hidden)
    expected = decoder.model(ids, attention_mask=real.long(), use_cache=False).logits
    assert families.relative(replayed[real], expected[real]) < 1e-5
    assert families.relative(replayed[0, :13], decoder.model(IDS[:1, :13], use_cache=False).logits[0]) < 1e-5
    assert batch.counted is not None
    assert batch.counted.equal(real)


def test_statistics_are_those_hooks_measure(examined: Examination) -> None:
    decoder = examined.dense
    measured, expected = measure(decoder), measure_with_hooks(decoder)
    assert [(part.block, part.path) for part in measured] == list(expected)
    for part, (squares, tokens) in zip(measured, expected.values(), strict=True):
        statistics = part.statistics
        assert statistics.unseen == (tokens == 0)
        assert statistics.tokens == max(tokens, 1)
        if tokens:
            torch.testing.assert_close(statistics[DOWN_INPUT_SQUARES], squares, rtol=1e-4, atol=1e-5)


def test_every_token_is_counted_once_per_expert_it_is_routed_to(examined: Examination) -> None:
    decoder = examined.dense
    tokens: dict[tuple[int, str], int] = {}
    for part in measure(decoder):
        place = (part.block, part.path.rpartition(".")[0] if part.path[-1:].isdigit() else part.path)
        tokens[place] = tokens.get(place, 0) + (0 if part.statistics.unseen else part.statistics.tokens)
    expected = {
        (index, module.layout.path): IDS.numel() * (FAMILIES[examined.name].routed if module.experts else 1)
        for index in range(len(decoder.blocks))
        for module in decoder.feed_forward_modules(index)
    }
    assert tokens == expected


def test_the_document_has_the_familys_row(examined: Examination) -> None:
    assert committed()[examined.name] == examined.row()


def measure(decoder: Decoder, *criteria: str) -> tuple[FeedForwardMeasurement, ...]:
    chosen = {name: PLUGINS.criteria.create(name, {}) for name in criteria}
    collectors = PLUGINS.collectors_for([DOWN_INPUT_SQUARES])
    return collect(decoder, IDS, chosen, collectors, seed=0, progress=Progress())


Sums = dict[tuple[int, str], tuple[Tensor, int]]


@torch.no_grad()
def measure_with_hooks(decoder: Decoder) -> Sums:
    """Return the sum of squares and the tokens of every feed-forward, from plain hooks on the model's own forward."""
    sums: Sums = {}
    with ExitStack() as hooks:
        for index in range(len(decoder.blocks)):
            for holder in (module for group in decoder.groups(index) for module in group.modules):
                sums.update({(index, path): (torch.zeros(holder.width), 0) for path in holder.paths})
                module = holder.down if isinstance(holder, DenseFeedForward) else holder.module
                hook = module.register_forward_pre_hook(partial(add_squares, sums, index, holder), with_kwargs=True)
                hooks.callback(hook.remove)
        decoder.model(IDS, use_cache=False)
    return sums


def add_squares(
    sums: Sums,
    index: int,
    holder: FeedForwardModule,
    module: nn.Module,
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
) -> None:
    """Sum the squared inputs of a down projection, or of each one in a module of experts."""
    inputs = [*arguments, *keywords.values()]
    if isinstance(holder, ExpertFeedForwards):
        for expert, path in enumerate(holder.paths):
            rows = routed_rows(expert, len(holder.paths), *inputs)  # (n, D)
            sums[index, path] = activations(module, expert, rows).square().sum(0), len(rows)
    else:
        rows = inputs[0].flatten(0, -2)  # (n, F)
        sums[index, holder.paths[0]] = rows.square().sum(0), len(rows)


def routed_rows(expert: int, count: int, hidden: Tensor, *routing: Tensor) -> Tensor:
    """Return the tokens routed to an expert, ``(n, D)``."""
    if routing:
        return hidden[(routing[0] == expert).any(-1)]
    copies = hidden.view(count, -1, hidden.shape[-1])[expert]  # Llama 4: 0 where a token is for others
    return copies[copies.abs().sum(-1) > 0]


def activations(module: Any, expert: int, rows: Tensor) -> Tensor:
    """Return the inputs of an expert's down projection for ``rows (n, D)``, by the families' formulas: ``(n, F)``."""
    kind, weight = type(module).__name__, module.gate_up_proj[expert]
    if kind == "GptOssExperts":
        both = rows @ weight + module.gate_up_proj_bias[expert]
        gate, up = both[:, ::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
        product: Tensor = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    else:
        gate, up = (rows @ weight if kind == "Llama4TextExperts" else rows @ weight.mT).chunk(2, -1)
        product = nn.functional.silu(gate) * up
    return product


@torch.no_grad()
def avoid_expert(decoder: Decoder, expert: int = 1) -> None:
    """Make every router send no token to one expert: it weighs the first coordinate alone, which is large."""
    embeddings: Any = decoder.model.get_input_embeddings()
    embeddings.weight[:, 0] += 5
    for index, block in enumerate(decoder.blocks):
        for module in decoder.feed_forward_modules(index):
            if module.experts:
                mixture, _, experts = module.layout.path.rpartition(".")
                shape = (len(module.paths), decoder.config.hidden_size)
                parameters = block.get_submodule(mixture).named_parameters()
                [router] = [p for name, p in parameters if p.shape == shape and not name.startswith(f"{experts}.")]
                router[:, 0] = 0
                router[expert, 0] = -100


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_no_token_reaches_is_scored_by_its_weights(name: str) -> None:
    decoder = opened(name, avoid_expert)
    measured = measure(decoder, "cfsp", "wanda-sp")
    indices = range(len(decoder.blocks))
    feed_forwards = {(part.block, part.path): part for index in indices for part in decoder.feed_forwards(index)}
    unseen = [part for part in measured if part.statistics.unseen]
    assert any(part.path.endswith(".1") for part in unseen)
    assert len(unseen) < len(measured)
    for part in unseen:
        feed_forward, scores = feed_forwards[part.block, part.path], part.scores
        assert not scores["cfsp"].isclose(scores["cfsp"][0]).all()
        ones = BlockStatistics({DOWN_INPUT_SQUARES: torch.ones(feed_forward.width)}, 0)
        assert scores["cfsp"].equal(PLUGINS.criteria.create("cfsp", {}).component.score(feed_forward, ones))
        by_weights = feed_forward.down.abs().sum(0)
        assert not by_weights.isclose(by_weights[0]).all()
        torch.testing.assert_close(scores["wanda-sp"] / scores["wanda-sp"].sum(), by_weights / by_weights.sum())


def test_the_report_names_experts_no_token_reached(tmp_path: Path) -> None:
    decoder = opened("mixtral", avoid_expert)
    source = families.write(decoder.model, tmp_path / "dense")
    [note] = [
        note
        for note in prune(families.run_config(source, round_to=4), tmp_path / "out").report.notes
        if "no calibration token reached 3 experts" in note
    ]
    assert all(f"{index} (mlp.experts.1)" in note for index in range(3))


@pytest.mark.parametrize("form", FORMS)
def test_a_run_in_bfloat16_streams_and_reopens(form: str, tmp_path: Path, remote: Reader) -> None:
    examined = Examination(FORMS[form], tmp_path, remote, torch.bfloat16)
    assert form in [families.form_of(module) for module in examined.modules]
    assert examined.streaming_differences == []
    assert examined.memory.report.reload_difference == examined.streamed.report.reload_difference == 0
    assert {tensor.dtype for tensor in families.tensors_of(examined.memory.folder).values()} == {torch.bfloat16}
    assert examined.imported == examined.expected


@pytest.mark.parametrize("name", DESCRIBED)
def test_detection_agrees_with_descriptions(name: str) -> None:
    model = opened(name).model
    described, detected = PLUGINS.architecture(model.config), find_architecture(model)
    assert described is not None
    assert (detected.family, detected.base, detected.blocks) == (described.family, described.base, described.blocks)
    assert sorted(map(comparable, detected.feed_forwards)) == sorted(map(comparable, described.feed_forwards))


def comparable(layout: FeedForwardLayout) -> tuple[object, ...]:
    """Return a layout without ``additive``, which shapes do not show."""
    names = (layout.path, layout.up, layout.down, layout.gate or "")
    return (*names, layout.experts, layout.width_key, layout.times)


def test_the_width_key_is_found_where_width_and_hidden_size_are_equal() -> None:
    model = families.build("xglm", ffn_dim=32)
    assert find_architecture(model).feed_forwards[0].width_key == "ffn_dim"


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_pruned_is_refused_before_anything_is_read(name: str, tmp_path: Path) -> None:
    skip_unknown(name)
    assert families.refusal(name, tmp_path) == FAMILIES[name].refused
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_document_has_exactly_these_families() -> None:
    assert tuple(committed()) == PRUNED
    refusals = re.split("<!-- (?:end of )?refused families -->", families.DOCUMENT.read_text(encoding="utf-8"))[1]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", refusals, flags=re.MULTILINE)
    assert rows == [(name, FAMILIES[name].refused) for name in REFUSED]


def test_the_base_families_pass_everything_unless_refused() -> None:
    assert len(BASE) == 39
    rows = committed()
    green = {name for name in BASE if name in rows and set(rows[name][4:]) <= {"yes", "needs none"}}
    assert len(green) >= 36
    assert {*BASE} - green <= {*REFUSED}


def test_the_plugin_in_the_document_makes_a_refused_family_work(tmp_path: Path) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", families.DOCUMENT.read_text(), flags=re.DOTALL | re.MULTILINE)
    plugin = tmp_path / "my_families.py"
    plugin.write_text(code, encoding="utf-8")
    source = families.write(families.build("biogpt"), tmp_path / "dense")
    options: dict[str, Any] = {"plugins": (str(plugin),), "allocator": "uniform", "ratio": 0.5, "round_to": 4}
    result = prune(families.run_config(source, **options), tmp_path / "out")
    assert result.plan.widths == (32, 32, 32)
    assert result.report.reload_difference == 0
