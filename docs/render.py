"""Render the committed results into the README and the pages of docs, and the plot of the demo.

python docs/render.py
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from steppe.report import draw_training_density, plot_training_density
from steppe.study.compare import Group, change_of, groups_of
from steppe.study.markdown import table_lines
from steppe.study.page import results_page
from steppe.study.plot import plot_study
from steppe.study.rows import read_rows
from steppe.study.study_file import list_studies
from steppe.study.verdict import quality_verdict

ROOT = Path(__file__).parents[1]
DEMO = "docs/results/demo.json"
SPEED = "benchmarks/results/mlp_cpu.json"
MONITOR_COST = "benchmarks/results/monitor_cost.json"
MODELS = "benchmarks/results/models_cpu.json"
LOSSES = "benchmarks/results/same_losses.json"
VERSIONS = "docs/results/versions.json"
TRAINING = "benchmarks/results/training_cpu.json"
# The same two on a processor with AMX, those rows that were measured there.
MODELS_AMX = "benchmarks/results/models_cpu_amx.json"
TRAINING_AMX = "benchmarks/results/training_cpu_amx.json"
# Arms of the study `effect`, and what the README calls them.
_README_ARMS = {
    "vanilla": "vanilla",
    "control": "control",
    "three": "the paper's three",
    "threshold+three": "`best`",
}
STUDIES = ROOT / "docs/results/studies"
EFFECT = "docs/results/studies/effect.jsonl"
RESULTS = ROOT / "docs/results.md"
PAGES = ("README.md", "docs/guides/train.md", "docs/kernels.md", "docs/screening.md")


def render(page: str) -> str:
    """A page with each marked passage as its result file says.

    Raises:
        SystemExit: the page marks a passage that there is not, or none.
    """
    passages = {
        f"effect: {EFFECT}": lambda: "\n" + effect_markdown(read_rows(ROOT / EFFECT)),
        f"speed: {SPEED}": lambda: "\n" + speed_markdown(_read(SPEED)),
        f"screening: {SPEED}": lambda: "\n" + screening_markdown(_read(SPEED)),
        f"models: {MODELS}": lambda: (
            "\n" + models_markdown(_read(MODELS))
            if (ROOT / MODELS).is_file()
            else "\nNot measured yet.\n"
        ),
        f"models: {MODELS_AMX}": lambda: "\n" + models_markdown(_read(MODELS_AMX)),
        f"training runs: {TRAINING_AMX}": lambda: "\n" + training_markdown(_read(TRAINING_AMX)),
        f"sampled step: {MONITOR_COST}": lambda: f"{_cost('sampled step'):.2f}×",
        f"run: {MONITOR_COST}": lambda: (
            f"{100 * _cost('run measured every 50 steps') - 100:+.1f} %"
        ),
        f"training runs: {TRAINING}": lambda: "\n" + training_markdown(_read(TRAINING)),
        f"losses: {LOSSES}": lambda: "\n" + losses_markdown(_read(LOSSES)),
        f"versions: {VERSIONS}": lambda: versions_sentence(_read(VERSIONS)),
        f"fullgraph setting: {VERSIONS}": lambda: versions_with_setting(_read(VERSIONS)),
    }

    def passage(match: re.Match[str]) -> str:
        if match[2] not in passages:
            raise SystemExit(f"no such passage: <!-- {match[2]} -->")
        return match[1] + passages[match[2]]() + match[3]

    page, found = re.subn(
        r"(<!-- ([a-z ]+: [\w/.]+\.jsonl?) -->).*?(<!-- end -->)", passage, page, flags=re.DOTALL
    )
    if not found:
        raise SystemExit("a page without passages")
    return page


def effect_markdown(rows: list[dict[str, Any]]) -> str:
    """Inference density of the arms that the README names, by recipe, and the quality of `best`."""
    groups = groups_of(rows)
    table = []
    for recipe in dict.fromkeys(group.recipe for group in groups):
        arms = {group.arm: group for group in groups if group.recipe == recipe}
        vanilla, best = arms["vanilla"], arms["threshold+three"]
        cells = [_density_cell(arms[arm], vanilla) for arm in _README_ARMS]
        seeds = len(best.rows)
        table.append([f"`{recipe}`", str(seeds), *cells, quality_verdict(best, vanilla).shown])
    names = ["recipe", "seeds", *_README_ARMS.values(), "quality of `best` against vanilla"]
    return "\n".join(table_lines(names, table)) + "\n"


def _density_cell(group: Group, baseline: Group) -> str:
    """The mean density in percent, and its change against the baseline."""
    densities = group.values(_density)
    mean = f"{100 * sum(densities) / len(densities):.1f}"
    if group is baseline:
        return mean
    found = change_of(group, baseline, _density)
    if found is None:
        return mean
    change, low, high = found
    told = f"{100 * change:+.0f} %"
    return f"{mean} ({told})" if math.isnan(low) or low <= 0 <= high else f"{mean} (**{told}**)"


def _density(row: dict[str, Any]) -> float:
    return row["density"]


def speed_markdown(result: dict[str, Any]) -> str:
    """How much faster a block is, by case and density, for one thread and for two."""
    densities = (0.5, 0.1, 0.05, 0.03, 0.01)
    kinds = [
        ("training step, 1024 tokens", "training", "float32"),
        ("prefill, 1024 tokens", "prefill", "float32"),
        ("prefill in bfloat16", "prefill", "bfloat16"),
        ("decode, 1 token, cold weights", "decode", "float32"),
    ]
    lines = [
        "| d 768, F 3072; 1 and 2 threads | " + " | ".join(f"ρ = {d}" for d in densities) + " |",
        "|---|" + "---|" * len(densities),
    ]
    for name, case, dtype in kinds:
        cells = []
        for density in densities:
            found = [
                f"{row['ratio']:.2f}×"
                for row in result["rows"]
                if (row["case"], row["dtype"], row["d"], row["active_sets"])
                == (case, dtype, 768, "random")
                and row["tokens"] in (1, 1024)
                and abs(row["density"] / density - 1) < 0.1
            ]
            cells.append(", ".join(found))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + _trained_speed(result["rows"]) + "\n"


def training_markdown(result: dict[str, Any]) -> str:
    """Whole training runs: as many steps, and as many seconds where measured, for each arm."""
    runs, budgets = result["runs"], result.get("time", {})
    steps = next(iter(runs.values()))["steps"]
    lines = [
        f"| {steps:,} steps | ms a step | at the end | faster | held-out loss | density |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in runs.items():
        lines.append(
            f"| {name} | {row['ms_a_step']:.0f} | {row['ms_a_step_at_the_end']:.0f} |"
            f" {row['speedup']:.2f}× | {row['loss']:.3f} | {row['density']:.3f} |"
        )
    if budgets:
        lines += ["", "| as many seconds | " + " | ".join(budgets) + " | parameters | memory |"]
        lines.append("|---|" + "---|" * (len(budgets) + 2))
    for name in next(iter(budgets.values()), ()):
        rows = [rows[name] for rows in budgets.values()]
        cells = [f"{row['loss']:.3f} ({row['steps']:,} steps)" for row in rows]
        size = (
            f"{rows[0]['parameters'] / 1e6:.1f} M | {rows[0]['bytes_of_training'] / 2**20:.0f} MB"
        )
        lines.append(f"| {name} | {' | '.join(cells)} | {size} |")
    lines += ["", "| a step, accelerated | time of one / the other | density |", "|---|---|---|"]
    for name, row in result["steps"].items():
        quartiles = f"{row['lower_quartile']:.2f} to {row['upper_quartile']:.2f}"
        lines.append(f"| {name} | {row['ratio']:.2f} ({quartiles}) | {row['density']:.3f} |")
    return "\n".join(lines) + "\n"


def models_markdown(result: dict[str, Any]) -> str:
    """How much faster whole models are, by case and density, for one thread and for two."""
    rows = result["models"]
    densities = list(dict.fromkeys(row["wanted_density"] for row in rows))
    lines = [
        "| dense time / time, 1 and 2 threads | dtype | "
        + " | ".join(f"ρ = {density}" for density in densities)
        + " |",
        "|---|---|" + "---|" * len(densities),
    ]
    for model, case in dict.fromkeys((row["model"], row["case"]) for row in rows):
        own = [row for row in rows if (row["model"], row["case"]) == (model, case)]
        cells = (
            ", ".join(f"{row['ratio']:.2f}×" for row in own if row["wanted_density"] == density)
            for density in densities
        )
        lines.append(f"| {model}: {case} | {own[0]['dtype']} | {' | '.join(cells)} |")
    furthest = max(row["difference"] for row in rows)
    return (
        "\n".join(lines)
        + "\n\nTrue shapes, random weights, the whole model with attention, embeddings and head;"
        f" `make bench`, {result['cpu']}, medians of pairs. All tokens are those of the dense"
        f" model; logits, states and gradients differ by at most {furthest:.0e} of their norm.\n"
    )


def screening_markdown(result: dict[str, Any]) -> str:
    """What screening gains, by case and density, with the share of candidates."""
    densities = (0.5, 0.2, 0.1, 0.05, 0.03, 0.01)
    lines = [
        "| dense time / time, 1 and 2 threads | "
        + " | ".join(f"ρ = {d}" for d in densities)
        + " |",
        "|---|" + "---|" * len(densities),
    ]
    for case in ("training", "prefill", "decode"):
        curve = [
            [row for row in _main_rows(result, case) if abs(row["density"] / density - 1) < 0.1]
            for density in densities
        ]
        shares = " | ".join(f"{100 * rows[0]['candidates']:.1f} %" for rows in curve)
        lines.append(f"| {case}: candidates | {shares} |")
        for name, key in (("screened", "ratio"), ("unscreened", "unscreened_ratio")):
            cells = (", ".join(f"{row[key]:.2f}×" for row in rows) for rows in curve)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    least = min(
        (row for row in result["rows"] if row["active_sets"] != "trained"),
        key=lambda row: row["gain"],
    )
    return (
        "\n".join(lines)
        + "\n\nd 768, F 3072, float32, 1024 tokens and 1, through the public module with autograd;"
        f" `make bench`, {result['cpu']}. The least ratio of unscreened to screened time of all"
        f" {len(result['rows'])} rows of that file is {least['gain']:.3f} ({least['case']},"
        f" d {least['d']}, {least['tokens']} tokens, {least['dtype']}, density"
        f" {least['density']:.2f}, {least['threads']} threads).\n"
    )


def _main_rows(result: dict[str, Any], case: str) -> list[dict[str, Any]]:
    """The float32 rows of a case at d 768 on random active sets."""
    return [
        row
        for row in result["rows"]
        if (row["case"], row["dtype"], row["d"], row["active_sets"])
        == (case, "float32", 768, "random")
        and row["tokens"] == (1 if case == "decode" else 1024)
    ]


def _trained_speed(rows: list[dict[str, Any]]) -> str:
    """The same in a sentence, of blocks with the active sets of a trained model."""
    trained = [row for row in rows if row["active_sets"] == "trained"]
    ratios = {
        case: " and ".join(f"{row['ratio']:.2f}×" for row in trained if row["case"] == case)
        for case in ("training", "prefill")
    }
    first = trained[0]
    return (
        f"With real active sets (a small GPT-2 with the plug-ins, d {first['d']}, F {first['f']},"
        f" ρ = {first['density']:.2f}, {first['tokens']} tokens): training step"
        f" {ratios['training']}, prefill {ratios['prefill']}."
    )


def losses_markdown(result: dict[str, Any]) -> str:
    """How far the losses of runs that should be the same part."""
    lines = [
        "| GPT-2, d, F | computed | last loss | largest distance to dense | to float64"
        " | steps to dense ± 10⁻⁵ |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        to_dense, to_float64 = row["to_dense"], row["to_float64"]
        cells = [f"{row['last_loss']:.4f}"]
        cells += [f"{distance['largest']:.1e}" for distance in (to_dense, to_float64)]
        cells.append(str(to_dense["steps_to_1e-5"]))
        lines.append(f"| {row['d']}, {row['f']} | {row['how']} | {' | '.join(cells)} |")
    return (
        "\n".join(lines)
        + f"\n\nRelative distances over {result['steps']} steps with AdamW on the pydoc texts, two"
        " layers, one seed; `make losses`.\n"
    )


def versions_sentence(result: dict[str, Any]) -> str:
    """The oldest Python and torch, and all of those with which every verb is in order."""
    good = [
        row
        for row in result["rows"]
        if all(outcome.startswith("ok") for outcome in row["verbs"].values())
    ]
    pythons, torches = (_sorted({row[key] for row in good}) for key in ("python", "torch"))
    floor = ".".join(torches[0].split(".")[:2])
    return (
        f"Python ≥ {pythons[0]}, PyTorch ≥ {floor}: every verb is run on Python"
        f" {_and(pythons)} with PyTorch {_and(torches)}"
    )


def versions_with_setting(result: dict[str, Any]) -> str:
    """The versions of torch in which `torch.compile(fullgraph=True)` needs a setting."""
    verb = "torch.compile(fullgraph=True), accelerated"
    found = {row["torch"] for row in result["rows"] if "with" in row["verbs"].get(verb, "")}
    return _and(_sorted(found))


def _sorted(versions: set[str]) -> list[str]:
    return sorted(versions, key=lambda version: [int(number) for number in version.split(".")])


def _and(words: list[str]) -> str:
    return " and ".join([*filter(None, [", ".join(words[:-1])]), words[-1]])


def plot_headline(demo: dict[str, Any], budgets: dict[str, Any], path: Path) -> None:
    """Draw the README's picture: density over training, and the loss against seconds.

    Args:
        demo: of ``steppe demo``.
        budgets: of ``benchmarks/training_cpu.py``.
        path: of the PNG.
    """
    from matplotlib.figure import Figure  # part of the extra `demo`

    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_training_density(left, "sparser: pydoc", demo["data_sets"]["pydoc"])
    draw_time(right, budgets)
    right.set_title("faster: a small GPT on one core, all time counted", fontsize=9)
    figure.savefig(path, dpi=150)


def plot_time(budgets: dict[str, Any], path: Path) -> None:
    """Draw the held-out loss of each arm against the seconds of its run.

    Args:
        budgets: of ``benchmarks/training_cpu.py``.
        path: of the PNG.
    """
    from matplotlib.figure import Figure  # part of the extra `demo`

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    draw_time(figure.subplots(), budgets)
    figure.savefig(path, dpi=150)


def draw_time(panel: Any, budgets: dict[str, Any]) -> None:
    """Draw the held-out loss of each arm against the seconds of its run.

    Args:
        panel: axes of matplotlib.
        budgets: of ``benchmarks/training_cpu.py``.
    """
    for name in next(iter(budgets.values())):
        rows = [rows[name] for rows in budgets.values()]
        seconds, losses = ([row[key] for row in rows] for key in ("seconds", "loss"))
        panel.plot(seconds, losses, marker="o", label=name)
    panel.set(xlabel="processor seconds of the run", ylabel="held-out loss, nats a byte")
    panel.legend()
    panel.grid(alpha=0.3)


def results() -> str:
    """The page of the studies, from the committed rows."""
    studies = {path.stem: read_rows(path) for path in sorted(STUDIES.glob("*.jsonl"))}
    quick = [name for name, rows in studies.items() if any(row["is_quick"] for row in rows)]
    if quick:
        raise SystemExit(f"{quick[0]}: a quick look is no result")
    plots = {path.stem: f"results/studies/{path.name}" for path in STUDIES.glob("*.png")}
    return results_page(studies, plots, list_studies())


def main() -> None:
    """Rewrite the pages and the plots."""
    for path in STUDIES.glob("*.jsonl"):
        if rows := read_rows(path):
            plot_study(rows, path.with_suffix(".png"))
    RESULTS.write_text(results(), encoding="utf-8")
    plot_training_density(_read(DEMO), ROOT / "docs/results/demo.png")
    plot_time(_read(TRAINING)["time"], ROOT / "docs/results/time.png")
    plot_headline(_read(DEMO), _read(TRAINING)["time"], ROOT / "docs/results/headline.png")
    for name in PAGES:
        page = ROOT / name
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")


def _read(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def _cost(what: str) -> float:
    """Ratio to the same without measuring, of the ViT-S blocks."""
    rows = _read(MONITOR_COST)["rows"]
    return next(row["ratio"] for row in rows if (row["case"], row["what"]) == ("vit-s", what))


if __name__ == "__main__":
    main()
