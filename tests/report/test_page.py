"""The page says and draws what the runs say."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from steppe.errors import MissingExtraError, OutputError, RunError
from steppe.measures.report import FREQUENCY_EDGES, BlockReport, Report
from steppe.report import find_runs, write_report
from steppe.report.find import _natural
from steppe.report.page import charts_of, groups_of
from steppe.report.readings import (
    against,
    read_density,
    read_derivative,
    read_flops,
    read_frequency,
    read_gap,
    read_identity,
    read_inference,
    read_layers,
    read_quality,
    read_terms,
)
from steppe.report.series import baseline_of, pick
from steppe.report.sheets import (
    acceleration_sheet,
    settings_sheet,
    speed_sheet,
    summary_table,
)
from steppe.runs import Run, write_run

go = pytest.importorskip("plotly.graph_objects")
NAN = math.nan
D, F, SAMPLES, TOKENS = 4, 8, 2, 10


def block(name: str, density: float, gain: float = 2.0, **changes: object) -> BlockReport:
    """A block for which the identity holds: AF = ρ′ T̄ F · active_gain."""
    derivative = changes.get("derivative_density", density)
    assert isinstance(derivative, float)
    plain = BlockReport(
        name=name,
        d_model=D,
        d_hidden=F,
        gated=False,
        samples=SAMPLES,
        tokens=TOKENS,
        density=density,
        derivative_density=density,
        dead_neurons=1,
        neuron_frequency=(1, *(0,) * (len(FREQUENCY_EDGES) - 1), F - 1),
        AF_up=derivative * TOKENS / SAMPLES * F * gain,
        AF_gate=NAN,
        AF_down=1.0,
        active_gain=gain,
        squared_input_norm=4.0,
        squared_activation_gradient=0.5,
        squared_gradient_norm_up=1.0,
        squared_gradient_norm_gate=NAN,
        squared_gradient_norm_down=1.0,
        standard_errors={"AF_up": 0.4, "AF_per_entry": 0.01, "squared_input_norm": 0.25},
    )
    return dataclasses.replace(plain, **changes)


def report(*densities: float, **changes: object) -> Report:
    blocks = tuple(block(f"layer.{i}", density, **changes) for i, density in enumerate(densities))
    return Report(
        density=sum(densities) / len(densities),
        derivative_density=sum(b.derivative_density for b in blocks) / len(blocks),
        blocks=blocks,
    )


def run(name: str, training: list[float], held_out: float | None, **changes: object) -> Run:
    """A run of two blocks, the second one 0.1 denser than the first."""
    return dataclasses.replace(
        Run(
            name=name,
            model="Toy",
            tokens_per_sample=TOKENS / SAMPLES,
            steps=[10 * k for k in range(len(training))],
            training=[report(d - 0.05, d + 0.05) for d in training],
            held_out_steps=[] if held_out is None else [100],
            held_out=[] if held_out is None else [report(held_out - 0.05, held_out + 0.05)],
        ),
        **changes,
    )


VANILLA = run("vanilla", [0.5, 0.4, 0.3], 0.2, quality={"accuracy": 0.9})
SPARSER = run("sparser", [0.5, 0.3, 0.15], 0.1, quality={"accuracy": 0.95})
DENSER = run("denser", [0.5, 0.5, 0.45], 0.4, quality={"accuracy": 0.8})
NOTHING = Run(name="nothing", model="Toy", tokens_per_sample=NAN)


def plain(words: str) -> str:
    return words.replace("\u00a0", " ")


def page_of(runs: list[Run], folder: Path) -> str:
    return write_report(runs, folder / "report.html").read_text(encoding="utf-8")


def figures_of(page: str) -> dict[str, list]:
    """The embedded JSON, by the key of the chart."""
    text = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page)
    assert text is not None
    return {chart["key"]: chart["views"] for chart in json.loads(text[1], parse_constant=no_number)}


def no_number(word: str) -> float:
    raise AssertionError(f"{word} is not JSON")


class Outline(HTMLParser):
    """Elements outside scripts, and the text that is read."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._silent = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        self.words += "" if self._silent else data


def test_the_curves_are_the_runs_numbers(tmp_path: Path) -> None:
    views = figures_of(page_of([VANILLA, SPARSER], tmp_path))["density"]
    assert len(views) == 3  # all blocks, and each of two
    whole, _, second = ([trace["y"] for trace in view[0]["data"]] for view in views)
    assert whole == [[0.5, 0.4, 0.3], [0.5, 0.3, 0.15]]
    assert second == [[0.55, 0.45, 0.35], [0.55, 0.35, 0.2]]
    assert views[0][0]["data"][1]["x"] == [0, 10, 20]


def test_the_points_of_training_against_inference_are_the_runs_numbers(tmp_path: Path) -> None:
    ((figure,),) = figures_of(page_of([VANILLA, SPARSER], tmp_path))["gap"]
    diagonal, vanilla, sparser = figure["data"]
    assert diagonal["x"] == diagonal["y"]
    assert (vanilla["x"], vanilla["y"]) == ([0.2], [0.4])
    assert (sparser["x"], sparser["y"]) == ([0.1], [pytest.approx(0.95 / 3, rel=1e-5)])


def test_the_ratio_is_taken_apart_with_bands(tmp_path: Path) -> None:
    views = figures_of(page_of([VANILLA], tmp_path))["ratio"]
    assert len(views) == 2
    af, norm, gradient, quotient = views[1]
    assert af["data"][1]["y"] == [pytest.approx(2.0 * d) for d in (0.55, 0.45, 0.35)]
    # The band goes there and back.
    assert af["data"][0]["y"] == [pytest.approx(y) for y in (1.11, 0.91, 0.71, 0.69, 0.89, 1.09)]
    assert norm["data"][1]["y"] == [4.0] * 3
    assert norm["data"][0]["y"] == [4.25] * 3 + [3.75] * 3
    assert [trace["y"] for trace in gradient["data"]] == [[0.5] * 3]  # no error known, no band
    assert [trace["y"] for trace in quotient["data"]] == [[0.55, 0.45, 0.35]] * 2
    for panel in (af, norm, gradient):
        assert panel["layout"]["yaxis"]["type"] == "log"


def test_without_gradients_in_training_the_ratio_is_that_of_held_out_data(tmp_path: Path) -> None:
    dense = [report(0.3, 0.4, AF_up=NAN, active_gain=NAN)]
    mixed = dataclasses.replace(VANILLA, steps=[0], training=dense)
    views = figures_of(page_of([mixed], tmp_path))["ratio"]
    assert views[0][3]["data"][0]["x"] == [100]
    assert views[0][3]["data"][0]["y"] == [0.15]


def test_the_heat_maps_share_one_scale_and_hold_block_by_step(tmp_path: Path) -> None:
    ((one, other),) = figures_of(page_of([VANILLA, SPARSER], tmp_path))["layers"]
    assert one["data"][0]["z"] == [[0.45, 0.35, 0.25], [0.55, 0.45, 0.35]]
    assert {figure["data"][0]["zmax"] for figure in (one, other)} == {0.55}


def test_the_other_charts_are_the_runs_numbers(tmp_path: Path) -> None:
    logs = [{"step": 5, "loss": 2.0}, {"step": 9, "loss": NAN}, {"step": 10, "eval_loss": 1.5}]
    figures = figures_of(page_of([dataclasses.replace(VANILLA, logs=logs)], tmp_path))
    ((frequency,),) = figures["frequency"]
    assert frequency["data"][0]["y"][0] == 1 / 8
    assert frequency["data"][0]["y"][-1] == 7 / 8
    ((loss, eval_loss),) = figures["quality"]
    assert (loss["data"][0]["x"], loss["data"][0]["y"]) == ([5], [2.0])
    assert (eval_loss["data"][0]["x"], eval_loss["data"][0]["y"]) == ([10], [1.5])
    ((scatter,),) = figures["derivative"]
    assert scatter["data"][1]["x"] == [0.45, 0.55, 0.35, 0.45, 0.25, 0.35]
    ((inference, training),) = figures["flops"]
    assert [trace["x"] for trace in inference["data"]] == [[0.5, 0.5], [0.5, 0.1]]  # up, down
    # Mean training density 0.4: one dense product and five sparse ones.
    total = sum(trace["x"][1] for trace in training["data"])
    assert total == pytest.approx((1 + 5 * 0.4) / 6, rel=1e-5)


def test_plotly_accepts_every_figure() -> None:
    gated = dataclasses.replace(
        VANILLA, name="gated", training=[report(0.1, 0.2, AF_gate=1.0, gated=True)] * 3
    )
    logs = [{"step": 5, "loss": 2.0, "eval_loss": 1.0, "eval_accuracy": 0.5}]
    runs = [dataclasses.replace(VANILLA, logs=logs), SPARSER, gated]
    figures = [p.figure for c in charts_of(runs) for view in c.views for p in view.panels]
    assert len(figures) > 10
    for figure in figures:
        plain_figure = dict(figure["layout"])
        assert go.Figure({"data": figure["data"], "layout": plain_figure}).data
    with pytest.raises(ValueError, match="colour"):
        go.Figure({"data": [{"type": "scatter", "colour": "red"}]})


def test_a_long_run_is_thinned_and_says_so(tmp_path: Path) -> None:
    long = run("long", [0.5 - 0.3 * k / 1999 for k in range(2000)], None)
    page = page_of([long], tmp_path)
    trace = figures_of(page)["density"][0][0]["data"][0]
    assert (trace["x"][0], trace["x"][-1], len(trace["x"])) == (0, 19990, 300)
    assert "300 of up to 2,000 measured steps" in Outline(page).words


@pytest.mark.parametrize(("count", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (1999, 300)])
def test_what_is_picked_is_spread_evenly(count: int, most: int) -> None:
    picked = pick(count, most)
    assert len(picked) == min(count, most)
    assert picked == sorted(set(picked))
    assert not picked or (picked[0], picked[-1]) == (0, count - 1)
    gaps = {b - a for a, b in pairwise(picked)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_sparser_run_reads_as_fewer_and_a_denser_one_as_more() -> None:
    fewer = plain(read_inference([VANILLA, SPARSER]))
    assert "sparser has 10.0 % active hidden units, 50 % fewer than vanilla (20.0 %)" in fewer
    more = plain(read_inference([VANILLA, DENSER]))
    assert "denser has 40.0 % active hidden units, 100 % more than vanilla (20.0 %)" in more
    assert "fewer" not in more
    same = read_inference([VANILLA, dataclasses.replace(VANILLA, name="again")])
    assert "as many as vanilla" in same
    three = plain(read_inference([DENSER, SPARSER, VANILLA]))  # vanilla is the baseline anywhere
    assert "50 % fewer than vanilla (20.0 %); denser 40.0 %, 100 % more" in three


def test_the_end_of_training_is_compared_with_its_start_where_there_is_one_run() -> None:
    assert "50 % fewer than in the first tenth (40.0 %)" in plain(
        read_density([run("a", [0.4, 0.2], None)])
    )
    assert "50 % more than in the first tenth (20.0 %)" in plain(
        read_density([run("a", [0.2, 0.3], None)])
    )
    assert read_density([NOTHING]) == "No training step was measured."


@pytest.mark.parametrize(
    ("new", "old", "words"),
    [(0.5, 1.0, "50 % fewer"), (1.5, 1.0, "50 % more"), (1.004, 1.0, "as many"), (1, 0.0, "")],
)
def test_a_change_in_words(new: float, old: float, words: str) -> None:
    assert plain(against(new, old)) == words


def test_the_gap_says_how_many_runs_are_sparser_at_inference() -> None:
    reversed_run = run("reversed", [0.2], 0.7)
    text = plain(read_gap([VANILLA, reversed_run]))
    assert "in 1 of 2 runs; they differ most in reversed: 20.0 % in training, 70.0 %" in text
    assert "vanilla is sparser than in training" in read_gap([VANILLA])
    assert "reversed is not sparser than in training" in read_gap([reversed_run])
    assert read_gap([NOTHING]).startswith("No run has both")


def test_the_identity_is_claimed_only_where_it_holds() -> None:
    assert "The quotient is the measured derivative density" in read_identity([VANILLA], False)
    off = report(0.4, 0.4)
    off = dataclasses.replace(
        off, blocks=(off.blocks[0], dataclasses.replace(off.blocks[1], active_gain=4.0))
    )
    broken = dataclasses.replace(VANILLA, name="broken", training=[*VANILLA.training[:2], off])
    text = plain(read_identity([VANILLA, broken], False))
    assert "deviates" in text
    assert "by up to 50.0 % (broken, layer.1, step 20)" in text
    assert "needs a backward pass" in read_identity([NOTHING], False)


def test_the_terms_are_compared_between_first_and_last() -> None:
    changed = dataclasses.replace(
        VANILLA, steps=[0, 1], training=[report(0.4, 0.4), report(0.1, 0.1, gain=4.0)]
    )
    text = read_terms([changed], [0], 0, False)
    assert "vanilla: AF ×0.5, ‖x‖² ×1, gradient ×2" in text
    assert read_terms([run("short", [0.2], None)], [0], 0, False) == ""


def test_the_distance_of_the_two_densities_is_claimed_from_the_data() -> None:
    assert "equal in every measured block" in read_derivative([VANILLA], False)
    apart = dataclasses.replace(
        VANILLA, steps=[7], training=[report(0.9, 0.9, derivative_density=0.25)]
    )
    text = plain(read_derivative([VANILLA, apart], False))
    assert "differ most in vanilla, layer.0, step 7: 25.0 % against 90.0 %" in text


def test_the_sparsest_and_the_densest_block_are_named() -> None:
    assert "vanilla 15.0 % (layer.0) to 25.0 % (layer.1)" in plain(read_layers([VANILLA]))
    many = [run(f"r{k}", [0.5], 0.1 + 0.1 * k) for k in range(5)]
    text = plain(read_layers(many))
    assert "layer.0 of r0 (5.0 %)" in text
    assert "layer.1 of r4 (55.0 %)" in text


def test_dead_units_are_counted_over_all_blocks() -> None:
    assert "2 of 16 in vanilla (12.5 %)" in plain(read_frequency([VANILLA]))
    assert read_frequency([NOTHING]) == "No neuron was counted."


def test_quality_is_better_worse_the_same_or_only_higher() -> None:
    text = plain(read_quality([VANILLA, SPARSER, DENSER]))
    assert (
        "vanilla 90.0 %; sparser 95.0 %, 5.0 points better; denser 80.0 %, 10.0 points worse"
        in text
    )
    low, high = (run(n, [], None, quality={"loss": q}) for n, q in (("low", 1.0), ("high", 1.5)))
    assert "high 1.500, 0.5 worse" in read_quality([low, high])
    assert "low 1.000, 0.5 better" in read_quality([high, low])
    assert "low 1.000, the same" in read_quality([low, dataclasses.replace(low)])
    odd = [run(n, [], None, quality={"odd": q}) for n, q in (("a", 1.0), ("b", 2.0))]
    assert "b 2.000, 1 higher" in read_quality(odd)
    assert "No held-out quality" in read_quality([NOTHING])


def test_the_bound_on_the_speed_up_is_that_of_the_measured_densities() -> None:
    # 2 / 1.2 at the inference density 0.2, 6 / (1 + 5 · 0.4) at the training density 0.4.
    assert "vanilla 1.67× in inference and 2.00× in training" in read_flops([VANILLA])
    gated = dataclasses.replace(
        VANILLA,
        training=[report(0.4, 0.4, AF_gate=1.0, gated=True)] * 3,
        held_out=[report(0.2, 0.2, AF_gate=1.0, gated=True)],
    )
    # 3 / (1 + 2 · 0.2) and 9 / (1 + 8 · 0.4), also without a backward pass.
    assert "vanilla 2.14× in inference and 2.14× in training" in read_flops([gated])
    unknown = dataclasses.replace(
        gated,
        name="unknown",
        training=[],
        steps=[],
        held_out=[report(0.2, 0.2, AF_up=NAN, gated=True)],
    )
    assert "unknown 2.14× in inference." in read_flops([unknown])
    assert "No density" in read_flops([NOTHING])


@pytest.mark.parametrize(
    ("names", "baseline"),
    [
        (["a", "vanilla"], 1),
        (["a", "b"], 0),
        (["x/steppe/seed-0", "x/vanilla/seed-0"], 1),
        (["not-vanilla", "vanilla/seed-0", "vanilla"], 2),
        (["a", "not-vanilla"], 0),
    ],
)
def test_the_baseline_is_vanilla_or_the_first(names: list[str], baseline: int) -> None:
    assert baseline_of([dataclasses.replace(NOTHING, name=name) for name in names]) == baseline


def test_the_table_shows_densities_and_changes_of_either_sign() -> None:
    plugins = [{"plugin": "zeroth_bias", "max_tokens": 4}]
    table = summary_table([VANILLA, dataclasses.replace(SPARSER, plugins=plugins), DENSER])
    text = plain(Outline(table).words)
    assert "10.0 % −50 %" in text
    assert "40.0 % +100 %" in text
    assert "zeroth bias" in text
    assert "accuracy 90.0 %" in text
    assert "–" in Outline(summary_table([NOTHING])).words


def test_a_run_of_part_of_a_model_is_said_to_be_one() -> None:
    measured = [
        dataclasses.replace(one, coverage=0.25, not_covered=("mlp.experts: <tensors>",))
        for one in SPARSER.held_out
    ]
    table = summary_table([VANILLA, dataclasses.replace(SPARSER, held_out=measured)])
    said = "Of sparser 25.0 % of the MLP parameters were measured, without: mlp.experts: <tensors>."
    assert said in plain(Outline(table).words)
    assert "MLP parameters" not in Outline(summary_table([VANILLA, SPARSER])).words


SPEED = {
    **{"case": "training", "tokens": 512, "dtype": "float32", "threads": 2, "d": 64, "f": 256},
    **{"dense_ms": 12.34, "density": 0.103, "candidates": 0.207, "ratio": 3.456},
    **{"unscreened_ratio": 2.25, "bound": 3.96},
}


def test_the_speed_of_the_blocks_stands_in_a_table_where_it_was_timed() -> None:
    timed = run("timed <i>", [0.5], 0.25, speed=[SPEED])
    sheet = speed_sheet([run("untimed", [0.5], 0.25), timed])
    words = " ".join(plain(Outline(sheet).words).split())
    row = "timed <i>training, 512 tokens, d 64, 2 threads12.310.3 %20.7 %3.46×2.25×3.96×"
    assert row in words
    assert "untimed" not in words
    assert speed_sheet([run("untimed", [0.5], 0.25)]) == ""


def test_an_accelerated_run_stands_beside_the_dense_one_with_its_seconds() -> None:
    blocks = [
        {"name": "h.0", "calls": {"sparse": 5, "dense": 5}, "reasons": {"more than 35% <i>": 5}},
        {"name": "h.1", "calls": {"sparse": 10}, "reasons": {}},
    ]
    acceleration = {"kernels": "avx2", "blocks": blocks, "not_accelerated": {}}
    logs = [{"step": 1, "loss": 2.0}, {"step": 2, "train_runtime": 33.2}]
    ours = run("accelerated", [0.5], 0.25, acceleration=acceleration, logs=logs)
    dense = run("dense", [0.5], 0.25, logs=[{"step": 2, "train_runtime": 60.9}])
    words = " ".join(plain(Outline(acceleration_sheet([dense, ours])).words).split())
    assert "dense61none––" in words
    assert "accelerated33avx275 % sparse, 25 % dense25 % more than 35% <i>" in words
    assert acceleration_sheet([dense]) == ""


def test_settings_that_differ_are_marked_and_counted() -> None:
    one = dataclasses.replace(VANILLA, settings={"lr": 0.1, "seed": 1}, versions={"torch": "2.8"})
    other = dataclasses.replace(one, name="other", settings={"lr": 0.2, "seed": 1})
    page = settings_sheet([one, other])
    assert "1 of 6 differ" in page
    marked = [dict(attrs).get("class") for tag, attrs in Outline(page).tags if tag == "tr"]
    assert marked.count("differs") == 1
    assert page.index(">lr<") < page.index(">seed<")


HOSTILE = '</script><script>a()</script> <b>&amp;" $x$ %{y}'


def test_names_are_shown_as_they_are_and_run_nothing(tmp_path: Path) -> None:
    hostile = dataclasses.replace(
        VANILLA,
        name=HOSTILE,
        model=HOSTILE,
        activations=[HOSTILE],
        plugins=[{"plugin": HOSTILE, HOSTILE: HOSTILE}],
        settings={HOSTILE: HOSTILE},
        quality={HOSTILE: 1.0},
        training=[
            dataclasses.replace(
                r, blocks=tuple(dataclasses.replace(b, name=HOSTILE) for b in r.blocks)
            )
            for r in VANILLA.training
        ],
    )
    page = page_of([hostile, SPARSER], tmp_path)
    outline, harmless = Outline(page), Outline(page_of([VANILLA, SPARSER], tmp_path))
    assert HOSTILE in outline.words
    tags = [tag for tag, _ in outline.tags]
    assert tags.count("script") == [tag for tag, _ in harmless.tags].count("script") == 3
    assert "b" not in tags
    trace = figures_of(page)["density"][0][0]["data"][0]
    # Plotly reads a little HTML, and TeX between dollars.
    assert html.unescape(trace["name"]) == HOSTILE
    assert not set(trace["name"]) & set("<$")


def test_the_page_loads_nothing_and_has_one_plotly(tmp_path: Path) -> None:
    page = page_of([VANILLA, SPARSER], tmp_path)
    outline = Outline(page)
    addresses = [
        value
        for _, attrs in outline.tags
        for key, value in attrs.items()
        if key in ("src", "href", "action", "data") and value and not value.startswith("data:")
    ]
    assert addresses == []
    assert "default-src 'none'" in page
    assert page.count("* plotly.js v") == 1
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    assert not re.search(r"@import|url\(", style[1])


def test_the_page_can_be_read_without_eyes_and_with_a_keyboard(tmp_path: Path) -> None:
    page = page_of([VANILLA, SPARSER], tmp_path)
    outline = Outline(page)
    assert ("html", {"lang": "en"}) in outline.tags
    names = [attrs.get("name") for tag, attrs in outline.tags if tag == "meta"]
    assert "viewport" in names
    plots = [attrs for _, attrs in outline.tags if attrs.get("class") == "plot"]
    shown = [p for views in figures_of(page).values() if views for p in views[0]]
    assert len(plots) == len(shown)
    assert all(plot["aria-label"] for plot in plots)
    ids = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    labelled = [attrs["for"] for tag, attrs in outline.tags if tag == "label"]
    assert labelled == ["density-view", "ratio-view"]
    assert set(labelled) <= set(ids)


def test_missing_parts_are_notes_and_not_empty_charts(tmp_path: Path) -> None:
    page = page_of([NOTHING], tmp_path)
    assert all(views == [] for views in figures_of(page).values())
    words = Outline(page).words
    for note in ("No training step was measured", "needs a backward pass", "No neuron was counted"):
        assert note in words
    assert "plot" not in [attrs.get("class") for _, attrs in Outline(page).tags]
    both = Outline(page_of([VANILLA, NOTHING], tmp_path)).words
    assert "Not drawn, since no training step was measured: nothing." in both


def test_numbers_that_are_none_are_gaps(tmp_path: Path) -> None:
    bad = run("bad", [0.3, NAN, 0.2], NAN, quality={"loss": NAN}, logs=[{"step": 1, "loss": NAN}])
    figures = figures_of(page_of([bad, VANILLA], tmp_path))
    assert figures["density"][0][0]["data"][0]["y"] == [0.3, None, 0.2]


def test_runs_of_other_models_have_a_part_of_their_own(tmp_path: Path) -> None:
    small = [
        dataclasses.replace(VANILLA, name="a/vanilla/seed-0"),
        dataclasses.replace(SPARSER, name="a/steppe/seed-0"),
    ]
    other = dataclasses.replace(VANILLA, name="b", held_out=[report(0.1)], steps=[], training=[])
    other = dataclasses.replace(other, held_out=[shrink(other.held_out[0])], held_out_steps=[9])
    (title, first), (nothing, second) = groups_of([small[0], other, small[1]])
    assert (title, nothing) == ("a", "")
    assert [run.name for run in first] == ["vanilla", "steppe"]
    assert [run.name for run in second] == ["b"]
    page = page_of([small[0], other, small[1]], tmp_path)
    names = [attrs["id"] for _, attrs in Outline(page).tags if attrs.get("id")]
    assert len(names) == len(set(names))
    assert {"part-0-top", "part-1-top", "density-0", "part-1-density-title"} <= set(names)
    links = [attrs["href"] for tag, attrs in Outline(page).tags if tag == "a"]
    assert links == ["#part-0-top", "#part-1-top"]
    buttons = {attrs["data-run"] for _, attrs in Outline(page).tags if "data-run" in attrs}
    assert buttons == {"0", "1", "part-1-0"}
    figures = figures_of(page)
    assert [trace["y"][0] for trace in figures["density"][0][0]["data"]] == [0.5, 0.5]
    assert "part-1-frequency" in figures or "part-1-flops" in figures


def shrink(whole: Report) -> Report:
    """The report of a model with one block less."""
    return dataclasses.replace(whole, blocks=whole.blocks[:1])


def test_one_run_keeps_its_whole_name() -> None:
    ((title, (only,)),) = groups_of([dataclasses.replace(VANILLA, name="digits/vanilla")])
    assert (title, only.name) == ("", "digits/vanilla")


def test_a_run_without_reports_goes_with_its_model() -> None:
    groups = groups_of([VANILLA, dataclasses.replace(NOTHING, model=VANILLA.model)])
    assert len(groups) == 1


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(RunError, match="one report a step"):
        write_report([dataclasses.replace(VANILLA, steps=[1])], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_without_plotly_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'steppe\[report\]'"):
        write_report([VANILLA], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write to"):
        write_report([VANILLA], tmp_path / "nowhere" / "report.html")


def save(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_run(dataclasses.replace(VANILLA, name=name), folder / "steppe.json")
    return folder


def test_runs_are_found_in_files_folders_and_below(tmp_path: Path) -> None:
    for seed in (10, 2):
        save(tmp_path / f"demo/digits/vanilla/seed-{seed}", f"seed {seed}")
    save(tmp_path / "demo/digits/.half-written", "hidden")
    single = save(tmp_path / "single", "single")
    save(single / "inner", "inner")  # of the folder that is named, not another run
    measured = tmp_path / "measured.json"
    write_run(dataclasses.replace(VANILLA, name="measured"), measured)
    found = find_runs([single, measured, tmp_path / "demo", single / "steppe.json"])
    assert [run.name for run in found] == ["single", "measured", "seed 2", "seed 10"]
    assert found[1].steps == VANILLA.steps


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for place in ("a/seed-0", "a/seed-1", "b"):
        save(tmp_path / place, "vanilla")
    save(tmp_path / "c", "vanilla (b)")
    names = [run.name for run in find_runs([tmp_path])]
    assert names == ["vanilla (a/seed-0)", "vanilla (a/seed-1)", "vanilla (b)", "vanilla (b) #2"]


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RunError, match=r"empty: expected a folder with steppe\.json"):
        find_runs([empty])
    with pytest.raises(RunError, match="nowhere"):
        find_runs([tmp_path / "nowhere"])
    assert find_runs([]) == []


def test_numbers_in_names_sort_by_value() -> None:
    paths = [Path(name) for name in ("a/seed-10", "a/seed-2", "a/seed-2b", "a10", "b")]
    assert sorted(paths, key=_natural) == [paths[k] for k in (1, 2, 0, 3, 4)]
