"""The page of results: numbers that are known by hand, and whatever rows there are."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from steppe.study.compare import best_groups, front_of, groups_of
from steppe.study.page import results_page, study_markdown
from steppe.study.plot import plot_study
from steppe.study.table import study_table
from steppe.study.terms import PARTS, TERMS
from study.fake_work import row_of


def row(arm: str, seed: int, density: float, loss: float = 2.0, rate: float | None = None) -> dict:
    setting = {} if rate is None else {"learning_rate": rate}
    own = {"id": f"r/{arm}/{rate}/seed-{seed}", "arm": arm, "baseline": "base"}
    numbers = {"density": density, "quality": {"loss": loss}}
    return {**row_of(seed), **own, **numbers, "setting": setting}


ROWS = [
    *(row("base", seed, density) for seed, density in enumerate((0.2, 0.4, 0.3))),
    *(row("half", seed, density, 2.5) for seed, density in enumerate((0.1, 0.2, 0.15))),
    row("noise", 0, 0.3),
    row("noise", 1, 0.2),
    row("alone", 2, 0.6),
]


def line_of(page: str, arm: str) -> str:
    (line,) = [line for line in page.splitlines() if f"`{arm}` |" in line]
    return line


def test_a_row_has_its_seeds_its_means_and_its_paired_change() -> None:
    page = study_markdown("s", ROWS)
    assert "9 runs from 3 seeds, 0 to 2," in page
    assert "torch 2.8.0" in page
    assert "| 3 | loss 2.0000 ± 0.0000 | 30.00 ± 24.84 |" in line_of(page, "base")
    half = line_of(page, "half")
    assert "| 3 | loss 2.5000 ± 0.0000 (**+0.5000 ± 0.0000**) |" in half
    assert "15.00 ± 12.42 (**-50 % [-50, -50]**)" in half
    noise = line_of(page, "noise")
    assert "| 2 |" in noise
    assert "(-13 % [" in noise
    assert "**-13" not in noise
    assert "| 60.00 (+100 %) |" in line_of(page, "alone")


def test_a_better_setting_is_found_and_both_tables_are_there() -> None:
    rows = [
        *(row("base", seed, 0.2, 2.0, 0.1) for seed in (0, 1)),
        *(row("base", seed, 0.4, 1.0, 0.2) for seed in (0, 1)),
        row("base", 0, 0.4, 0.5, 0.3),
        *(row("half", seed, 0.1, 1.5, 0.1) for seed in (0, 1)),
    ]
    best = best_groups(groups_of(rows))
    assert [(one.arm, one.setting) for one in best] == [
        ("base", "learning_rate=0.2"),
        ("half", "learning_rate=0.1"),
    ]
    page = study_markdown("s", rows)
    first, _, second = page.partition("All settings")
    assert "(**-75 % [-75, -75]**)" in line_of(first, "half"), "against the best baseline"
    assert "(**-50 % [-50, -50]**)" in line_of(second, "half"), "against the same setting"


def test_accuracy_is_better_when_it_is_higher() -> None:
    rows = [row("base", 0, 0.2, rate=rate) for rate in (0.1, 0.2)]
    for one, share in zip(rows, (0.9, 0.8), strict=True):
        one["quality"] = {"loss": 1.0, "top1": share}
    (best,) = best_groups(groups_of(rows))
    assert best.setting == "learning_rate=0.1"
    assert "top1 90.00" in study_markdown("s", rows)


def test_the_page_renders_whatever_rows_there_are() -> None:
    empty = results_page({}, {}, {})
    assert "No study has been run in full yet." in empty
    assert results_page({"s": []}, {}, {}) == empty
    odd = row("dead", 0, 0.0)
    odd |= {"derivative_density": None, "dead_units": None, "quality": {"loss": None}}
    studies = {"s": [*ROWS, odd], "t": ROWS[:1]}
    page = results_page(studies, {"s": "results/studies/s.png"}, {"s": "Is it so?"})
    assert "## s\n\nIs it so?\n\n" in page
    assert "## s" in page
    assert "## t" in page
    assert "](results/studies/s.png)" in page
    assert "| 1 | – | 0.00 |" in line_of(page, "dead")


def test_a_quick_look_says_that_it_is_one() -> None:
    assert "mean nothing" in study_markdown("s", [{**ROWS[0], "is_quick": True}])
    assert "mean nothing" not in study_markdown("s", ROWS)


def test_the_table_of_the_terminal_has_the_same_numbers() -> None:
    console = Console(width=160, file=io.StringIO())
    console.print(study_table([{**one, "is_quick": True} for one in ROWS]))
    shown = console.file.getvalue()
    assert "mean nothing" in shown
    for text in ("30.00 ± 24.84", "15.00 ± 12.42", "-50 % [-50, -50] *", "+0.5000 ± 0.0000 *"):
        assert text in shown
    assert "-13 % [" in shown


def test_seconds_of_a_resumed_run_do_not_count() -> None:
    rows = [ROWS[0], {**ROWS[1], "seconds": 100.0, "resumed_from": "checkpoint-3"}]
    assert line_of(study_markdown("s", rows), "base").endswith("| 1 |")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    path = plot_study(ROWS, tmp_path / "s.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_factors_multiply_to_the_change_of_the_density() -> None:
    def terms(density: float, af: float, norm: float, gradient: float) -> dict[str, list[float]]:
        values = (density, af, norm, gradient)
        return {term: [value] * PARTS for term, value in zip(TERMS, values, strict=True)}

    rows = [
        *({**row("base", seed, 0.2), "terms": terms(0.2, 0.4, 2.0, 1.0)} for seed in (0, 1)),
        *({**row("half", seed, 0.1), "terms": terms(0.1, 0.6, 3.0, 2.0)} for seed in (0, 1)),
        row("without", 0, 0.1),
    ]
    page = study_markdown("s", rows)
    why = page.partition("What moves the density")[2].partition("in the course of training")[0]
    factors = ("0.50", "1.50", "0.67", "0.50")
    cells = " | ".join(f"×{one} → **×{one} [{one}, {one}]**" for one in factors)
    assert line_of(why, "half") == f"| `r` | `half` | {cells} |"
    assert "without" not in why
    (_, _, changed, *_) = rows
    changed["terms"]["derivative_density"] = [0.4, *[0.2] * (PARTS - 2), 0.1]
    _, _, course = study_markdown("s", rows).partition("in the course of training")
    assert line_of(course, "half").startswith("| `r` | `half` | 20.0 | 14.1 | 14.1 |")
    assert line_of(course, "half").endswith("| ×0.50 [0.00, 3341.33] |")
    assert line_of(course, "base").endswith("| ×1.00 [1.00, 1.00] |")
    assert "What moves" not in study_markdown("s", ROWS)


def test_the_front_has_what_no_other_beats() -> None:
    points = {"dense": (0.4, 1.0), "good": (0.2, 1.1), "bad": (0.3, 1.2), "sparse": (0.1, 1.3)}
    rows = [row(arm, seed, *point) for arm, point in points.items() for seed in (0, 1)]
    rows.append(row("lucky", 0, 0.01, 0.01))
    assert [group.arm for group in front_of(groups_of(rows))] == ["dense", "good", "sparse"]
    equal = [row(arm, seed, 0.2, 1.0) for arm in ("a", "b") for seed in (0, 1)]
    assert [group.arm for group in front_of(groups_of(equal))] == ["a", "b"]
    assert "The front" not in study_markdown("s", rows)
    many = [row(str(k), seed, 0.5, 3.0, k / 10) for k in range(10) for seed in (0, 1)]
    _, _, front = study_markdown("s", rows + many).partition("The front")
    assert "`sparse` |" in front
    assert "`bad`" not in front


def test_the_papers_claim_holds_fails_or_is_open() -> None:
    def both(recipe: str, *shares: float) -> list[dict]:
        base = [
            {**row("base", seed, 0.4), "recipe": recipe, "settings": {"arm": "vanilla"}}
            for seed in range(len(shares))
        ]
        numbers = {"recipe": recipe, "training_density": 0.3, "settings": {"arm": "steppe"}}
        three = [
            {**row("three", seed, 0.4 * share, 2.1), **numbers} for seed, share in enumerate(shares)
        ]
        return base + three

    rows = [
        *both("holding", 0.50, 0.52, 0.51),
        *both("failing", 0.80, 0.82, 0.81),
        *both("open", 0.50, 0.80, 0.60),
        *both("single", 0.1),
    ]
    claim = study_markdown("s", rows).partition("The paper's claim")[2].partition("A fifth of")[0]
    lines = {line.split("`")[1]: line for line in claim.splitlines() if line.startswith("| `")}
    for recipe, told in (("holding", "holds"), ("failing", "fails"), ("open", "open")):
        cells = lines[recipe].split(" | ")
        assert cells[1].startswith(f"*{told}*: -")
        assert cells[2].startswith("*fails*: -40 %")
        assert cells[3].startswith("*worse*: loss +0.1000 ± 0.0000")
    assert "single" not in lines
    assert "The paper's claim" not in study_markdown("s", ROWS)
    for one in rows:
        one["settings"] |= {"rising_threshold": True}
    assert "The paper's claim" not in study_markdown("s", rows)


def test_a_fifth_of_the_best_dense_arm_is_reached_missed_or_open() -> None:
    def arms(recipe: str, *shares: float, loss: float = 2.0) -> list[dict]:
        parts = (
            ("vanilla", {"arm": "vanilla"}, 2.2, [1.5] * len(shares)),
            ("control", {"arm": "control"}, 2.0, [1.0] * len(shares)),
            ("sparse", {"arm": "threshold"}, loss, shares),
            ("beaten", {"arm": "threshold"}, loss + 0.1, [0.9] * len(shares)),
        )
        return [
            {**row(name, seed, 0.4 * share, quality), "recipe": recipe, "settings": settings}
            for name, settings, quality, densities in parts
            for seed, share in enumerate(densities)
        ]

    rows = [
        *arms("reached", 0.17, 0.18, 0.17),
        *arms("missed", 0.32, 0.33, 0.31),
        *arms("open", 0.10, 0.30, 0.20),
        *arms("worse", 0.17, 0.18, 0.17, loss=2.05),
        *arms("single", 0.1),
    ]
    _, _, aim = study_markdown("s", rows).partition("A fifth of the best dense")
    lines = {line.split("`")[1]: line for line in aim.splitlines() if line.startswith("| `")}
    assert list(lines) == ["reached", "missed", "open", "worse"], "the front, more than one seed"
    for recipe in ("reached", "missed", "open"):
        assert lines[recipe].endswith(
            f"| *no difference shown*: loss +0.0000 ± 0.0000 | *{recipe}* |"
        )
        assert "| `control` | `sparse` | 0." in lines[recipe]
    assert "| 0.17 [0.16, 0.19] |" in lines["reached"]
    assert lines["worse"].endswith("| *worse*: loss +0.0500 ± 0.0000 | *missed* |")
    assert "A fifth of" not in study_markdown("s", ROWS)
    for one in rows:
        one["density"] = max(one["density"], 0.995)
    assert "A fifth of" not in study_markdown("s", rows), "no dense arm of ReLU"


def test_the_papers_claim_is_not_held_against_models_without_zeros() -> None:
    rows = [
        {**row(name, seed, density), "settings": {"arm": arm}}
        for name, arm, density in (("base", "vanilla", 1.0), ("three", "steppe", 0.2))
        for seed in (0, 1)
    ]
    assert "The paper's claim" not in study_markdown("s", rows)
    for one in rows[:2]:
        one["density"] = 0.4
    assert "The paper's claim" in study_markdown("s", rows)


def test_the_papers_claim_on_accuracy() -> None:
    def arm(name: str, setting: str, *shares: float) -> list[dict]:
        own = {"settings": {"arm": setting}}
        return [
            {**row(name, seed, 0.4), **own, "quality": {"loss": 1.0, "top1": share}}
            for seed, share in enumerate(shares)
        ]

    vanilla = arm("base", "vanilla", 0.90, 0.92)
    for shares, told in (
        ((0.91, 0.93), "*better*: top1 +1.00 ± 0.00"),
        ((0.89, 0.91), "*worse*: top1 -1.00 ± 0.00"),
        ((0.93, 0.91), "*no difference shown*: top1 +1.00 ±"),
    ):
        assert told in study_markdown("s", vanilla + arm("three", "steppe", *shares))


def test_values_of_a_factor_are_never_compared() -> None:
    rows = [
        {**row(arm, seed, density, loss), "setting": {"size": size}, "factors": ["size"]}
        for seed in (0, 1)
        for arm, size, density, loss in (
            *(("base", "small", 0.4, 3.0), ("half", "small", 0.2, 3.0)),
            *(("base", "large", 0.2, 2.0), ("half", "large", 0.05, 2.0)),
        )
    ]
    groups = groups_of(rows)
    assert [one.recipe for one in groups] == ["r,size=small"] * 2 + ["r,size=large"] * 2
    assert best_groups(groups) == groups
    page = study_markdown("s", rows)
    assert "All settings" not in page
    small, large = (line for line in page.splitlines() if "`half`" in line)
    assert small.startswith("| `r` `size=small` | `half` |")
    assert "(**-50 % [-50, -50]**)" in small
    assert "(**-75 % [-75, -75]**)" in large
