"""Every family: a cut model is a masked one, opens again in every way, streams, and is measured right; or is refused."""

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


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with families.reader(tmp_path_factory.mktemp("remote")) as reader:
        yield reader


@pytest.fixture(scope="module", params=PRUNED)
def examined(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, remote: Reader) -> Examination:
    """Each family in turn; what one test had to make serves the next."""
    name: str = request.param
    if not FAMILIES[name].known:
        pytest.skip(f"this version of Transformers has no {FAMILIES[name].model_type}")
    return Examination(name, tmp_path_factory.mktemp(name), remote)


def opened(name: str, change: Callable[[Decoder], None] = lambda decoder: None) -> Decoder:
    """A fresh model of a family, in memory only."""
    if not FAMILIES[name].known:
        pytest.skip(f"this version of Transformers has no {FAMILIES[name].model_type}")
    decoder = open_decoder(families.build(name), PLUGINS)
    change(decoder)
    return decoder


def committed() -> dict[str, list[str]]:
    """The rows of the document's table, by family."""
    section = families.DOCUMENT.read_text(encoding="utf-8").split("<!-- families -->")[1]
    lines = section.split("<!-- end of families -->")[0].strip().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == list(families.HEADINGS)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    return {row[0].strip("`"): row for row in rows}


def test_a_cut_model_computes_what_a_masked_one_does(examined: Examination) -> None:
    from_masked, from_dense = examined.cut
    assert from_masked <= families.CUT_TOLERANCE
    assert from_dense > 1e-2


def test_a_whole_run_writes_what_it_says(examined: Examination) -> None:
    result = examined.memory
    assert len(list(examined.source.glob("*.safetensors"))) > 1
    assert result.report.reload_difference < 1e-5
    assert result.plan.achieved_ratio == pytest.approx(0.4, abs=0.05)
    shares = {entry.block: len(entry.kept) / entry.width for entry in result.plan.blocks}
    assert len(set(shares.values())) > 1, "blocks that differ are what has to open again"
    dense, pruned = families.tensors_of(examined.source), families.tensors_of(result.folder)
    assert dense.keys() == pruned.keys()
    same = {key for key in dense if dense[key].shape == pruned[key].shape}
    assert all(dense[key].equal(pruned[key]) for key in same)
    names = {name for layout in layouts_of(examined.dense) for name in (layout.gate, layout.up, layout.down) if name}
    assert all(belongs(key, names) for key in dense.keys() - same)


def layouts_of(decoder: Decoder) -> tuple[FeedForwardLayout, ...]:
    return decoder.architecture.feed_forwards


def belongs(key: str, names: set[str]) -> bool:
    """Whether a tensor of a checkpoint is of a projection; some families call experts otherwise on disk."""
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


def test_adapters_lie_on_what_was_meant_and_merge_to_the_same(examined: Examination) -> None:
    found = examined.adapters
    assert found.trained == found.planned
    assert found.added > 1e-2
    assert max(found.merged, found.reopened) <= families.ADAPTER_TOLERANCE


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
    found, ids, real = finish(decoder, windows.clamp(min=0), batch.hidden), windows.clamp(min=0), windows != PADDING
    own = decoder.model(ids, attention_mask=real.long(), use_cache=False).logits
    assert families.relative(found[real], own[real]) < 1e-5
    assert families.relative(found[0, :13], decoder.model(IDS[:1, :13], use_cache=False).logits[0]) < 1e-5
    assert batch.counted is not None
    assert batch.counted.equal(real)


def test_what_is_collected_is_what_hooks_see(examined: Examination) -> None:
    decoder = examined.dense
    measured, seen = measure(decoder), by_hand(decoder)
    assert [(one.block, one.path) for one in measured] == list(seen)
    for one, (squares, tokens) in zip(measured, seen.values(), strict=True):
        statistics = one.statistics
        assert statistics.unseen == (tokens == 0)
        assert statistics.tokens == max(tokens, 1)
        if tokens:
            torch.testing.assert_close(statistics[DOWN_INPUT_SQUARES], squares, rtol=1e-4, atol=1e-5)


def test_every_token_reaches_so_many_experts(examined: Examination) -> None:
    routed: dict[tuple[int, str], int] = {}
    for one in measure(examined.dense):
        where = (one.block, one.path.rpartition(".")[0] if one.path[-1:].isdigit() else one.path)
        routed[where] = routed.get(where, 0) + (0 if one.statistics.unseen else one.statistics.tokens)
    experts = {
        (index, module.layout.path)
        for index in range(len(examined.dense.blocks))
        for module in examined.dense.feed_forward_modules(index)
        if module.experts
    }
    assert routed == {
        where: IDS.numel() * (FAMILIES[examined.name].routed if where in experts else 1) for where in routed
    }


def test_the_document_says_what_is_found(examined: Examination) -> None:
    assert committed()[examined.name] == examined.row()


def measure(decoder: Decoder, *criteria: str) -> tuple[FeedForwardMeasurement, ...]:
    chosen = {name: PLUGINS.criteria.create(name, {}) for name in criteria}
    collectors = PLUGINS.collectors_for([DOWN_INPUT_SQUARES])
    return collect(decoder, IDS, chosen, collectors, seed=0, progress=Progress())


Seen = dict[tuple[int, str], tuple[Tensor, int]]


@torch.no_grad()
def by_hand(decoder: Decoder) -> Seen:
    """The sum of squares and the tokens of every feed-forward, by plain hooks on the model's own forward."""
    seen: Seen = {}
    with ExitStack() as hooks:
        for index in range(len(decoder.blocks)):
            for holder in (module for group in decoder.groups(index) for module in group.modules):
                seen.update({(index, path): (torch.zeros(holder.width), 0) for path in holder.paths})
                module = holder.down if isinstance(holder, DenseFeedForward) else holder.module
                hook = module.register_forward_pre_hook(partial(listen, seen, index, holder), with_kwargs=True)
                hooks.callback(hook.remove)
        decoder.model(IDS, use_cache=False)
    return seen


def listen(
    seen: Seen,
    index: int,
    holder: FeedForwardModule,
    module: nn.Module,
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
) -> None:
    """What a down projection, or a module of experts, is called with."""
    given = [*arguments, *keywords.values()]
    if isinstance(holder, ExpertFeedForwards):
        for expert, path in enumerate(holder.paths):
            rows = routed(module, expert, len(holder.paths), *given)  # (n, D)
            seen[index, path] = activations(module, expert, rows).square().sum(0), len(rows)
    else:
        rows = given[0].flatten(0, -2)  # (n, F)
        seen[index, holder.paths[0]] = rows.square().sum(0), len(rows)


def routed(module: Any, expert: int, count: int, hidden: Tensor, *routing: Tensor) -> Tensor:
    """The tokens an expert gets, ``(n, D)``."""
    if routing:
        return hidden[(routing[0] == expert).any(-1)]
    copies = hidden.view(count, -1, hidden.shape[-1])[expert]  # Llama 4: 0 where a token is for others
    return copies[copies.abs().sum(-1) > 0]


def activations(module: Any, expert: int, rows: Tensor) -> Tensor:
    """What an expert's down projection gets for ``rows (n, D)``, by the formulas of the families: ``(n, F)``."""
    kind, weight = type(module).__name__, module.gate_up_proj[expert]
    if kind == "GptOssExperts":
        both = rows @ weight + module.gate_up_proj_bias[expert]
        gate, up = both[:, ::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
        found: Tensor = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    else:
        gate, up = (rows @ weight if kind == "Llama4TextExperts" else rows @ weight.mT).chunk(2, -1)
        found = nn.functional.silu(gate) * up
    return found


@torch.no_grad()
def shun(decoder: Decoder, expert: int = 1) -> None:
    """Make the first coordinate of every token large, and every router averse to it for one expert, else blind to it."""
    embeddings: Any = decoder.model.get_input_embeddings()
    embeddings.weight[:, 0] += 5
    for index, block in enumerate(decoder.blocks):
        for module in decoder.feed_forward_modules(index):
            if module.experts:
                mixture, _, experts = module.layout.path.rpartition(".")
                shape = (len(module.paths), decoder.config.hidden_size)
                named = block.get_submodule(mixture).named_parameters()
                [router] = [one for name, one in named if one.shape == shape and not name.startswith(f"{experts}.")]
                router[:, 0] = 0
                router[expert, 0] = -100


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_no_token_reaches_is_judged_by_its_weights(name: str) -> None:
    decoder = opened(name, shun)
    measured = measure(decoder, "cfsp", "wanda-sp")
    parts = {(one.block, one.path): one for index in range(len(decoder.blocks)) for one in decoder.feed_forwards(index)}
    unseen = [one for one in measured if one.statistics.unseen]
    assert any(one.path.endswith(".1") for one in unseen)
    assert len(unseen) < len(measured)
    for one in unseen:
        feed_forward = parts[one.block, one.path]
        assert not one.scores["cfsp"].isclose(one.scores["cfsp"][0]).all()
        ones = BlockStatistics({DOWN_INPUT_SQUARES: torch.ones(feed_forward.width)}, 0)
        assert one.scores["cfsp"].equal(PLUGINS.criteria.create("cfsp", {}).component.score(feed_forward, ones))
        by_weights = feed_forward.down.abs().sum(0)
        assert not by_weights.isclose(by_weights[0]).all()
        torch.testing.assert_close(one.scores["wanda-sp"] / one.scores["wanda-sp"].sum(), by_weights / by_weights.sum())


def test_the_report_names_experts_no_token_reached(tmp_path: Path) -> None:
    decoder = opened("mixtral", shun)
    source = families.write(decoder.model, tmp_path / "dense")
    result = prune(families.run_config(source, round_to=4), tmp_path / "out")
    places = "; ".join(f"{index} (mlp.experts.1)" for index in range(3))
    note = f"no calibration token reached 3 experts, which are judged by weights alone: block {places}"
    assert note in result.report.notes


@pytest.mark.parametrize("form", FORMS)
def test_a_run_in_bfloat16_streams_and_reopens(form: str, tmp_path: Path, remote: Reader) -> None:
    examined = Examination(FORMS[form], tmp_path, remote, torch.bfloat16)
    assert form in [families.form_of(module) for module in examined.modules]
    assert examined.streaming_differences == []
    assert examined.memory.report.reload_difference == examined.streamed.report.reload_difference == 0
    assert {tensor.dtype for tensor in families.tensors_of(examined.memory.folder).values()} == {torch.bfloat16}
    assert examined.imported == examined.expected


@pytest.mark.parametrize("name", DESCRIBED)
def test_the_finder_agrees_with_what_is_described(name: str) -> None:
    model = opened(name).model
    described, found = PLUGINS.architecture(model.config), find_architecture(model)
    assert described is not None
    assert (found.family, found.base, found.blocks) == (described.family, described.base, described.blocks)
    assert sorted(map(told, found.feed_forwards)) == sorted(map(told, described.feed_forwards))


def told(layout: FeedForwardLayout) -> tuple[object, ...]:
    """A layout but for whether its output joins the stream as it is, which shapes do not tell."""
    names = (layout.path, layout.up, layout.down, layout.gate or "")
    return (*names, layout.experts, layout.width_key, layout.times)


def test_channels_as_many_as_hidden_units_are_told_apart() -> None:
    model = families.build("xglm", ffn_dim=32)
    assert find_architecture(model).feed_forwards[0].width_key == "ffn_dim"


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_pruned_is_refused_before_anything_is_read(name: str, tmp_path: Path) -> None:
    if not FAMILIES[name].known:
        pytest.skip(f"this version of Transformers has no {FAMILIES[name].model_type}")
    assert families.refusal(name, tmp_path) == FAMILIES[name].refused
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    row = f"| `{name}` | {FAMILIES[name].refused} |"
    assert row in families.DOCUMENT.read_text(encoding="utf-8")


def test_the_tables_have_exactly_these_families() -> None:
    assert tuple(committed()) == PRUNED
    refusals = re.split("<!-- (?:end of )?refused families -->", families.DOCUMENT.read_text(encoding="utf-8"))[1]
    assert re.findall(r"^\| `(\w+)` \|", refusals, flags=re.MULTILINE) == list(REFUSED)


def test_of_the_base_families_all_but_those_refused_pass_everything() -> None:
    assert len(BASE) == 39
    rows = committed()
    green = [name for name in BASE if name in rows and set(rows[name][4:]) <= {"yes", "needs none"}]
    assert len(green) >= 36
    assert not {*BASE} - {*green} - {*REFUSED}


def test_the_plugin_in_the_document_makes_a_refused_family_work(tmp_path: Path) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", families.DOCUMENT.read_text(), flags=re.DOTALL | re.MULTILINE)
    plugin = tmp_path / "my_families.py"
    plugin.write_text(code, encoding="utf-8")
    source = families.write(families.build("biogpt"), tmp_path / "dense")
    options: dict[str, Any] = {"plugins": (str(plugin),), "allocator": "uniform", "ratio": 0.5, "round_to": 4}
    result = prune(families.run_config(source, **options), tmp_path / "out")
    assert result.plan.widths == (32, 32, 32)
    assert result.report.reload_difference == 0
