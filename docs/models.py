"""Check every architecture of the tests and render the table of docs/models.md.

python docs/models.py                  checks all (two minutes) and renders
python docs/models.py --only Llama     checks one again
python docs/models.py --render         renders the committed results
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from steppe.files import write_json
from steppe.runs import versions

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
RESULT = ROOT / "docs" / "results" / "models.json"
TYPES = ROOT / "benchmarks" / "results" / "model_types.json"
WRONG = "no: "  # the cell of a check that failed begins so
_COLUMNS = (
    *("wired", "norm", "plug-ins", "density", "gradients", "accelerated", "trained, saved"),
)


def result() -> dict[str, Any]:
    """The committed result."""
    return json.loads(RESULT.read_text(encoding="utf-8"))


def check(only: str) -> dict[str, Any]:
    """The results of the checks on the architectures of a name, or on all; the others as before."""
    sys.path.insert(0, str(ROOT / "tests"))  # whose tests import this file
    from architectures import ARCHITECTURES
    from checks import CHECKS, checks_of

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    before = {row["name"]: row for row in result()["rows"]} if only else {}
    rows = []
    for one in ARCHITECTURES:
        row = before.get(one.name)
        if row is None or one.name == only:
            row = {"name": one.name, "mlps": one.mlps, "covered": one.covered}
            row["checks"] = {name: outcome(CHECKS[name], one) for name in checks_of(one)}
            print(one.name, {name: said for name, said in row["checks"].items() if said})
        rows.append(row)
    known = {**versions(), "transformers": transformers.__version__}
    return {"command": "python docs/models.py", "versions": known, "rows": rows}


def outcome(run: Any, one: Any) -> str:
    """The result of one check, or the error that it raised."""
    try:
        return run(one)
    except Exception as error:  # the answer
        return f"{WRONG}{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each architecture, and below it the notes by number."""
    notes: dict[str, int] = {}

    def cell(said: str | None) -> str:
        if said is None:
            return "–"
        parts = said.split("; ") if said and not said.startswith(WRONG) else [said] if said else []
        numbers = [str(notes.setdefault(part, len(notes) + 1)) for part in parts]
        passed = "**no**" if said.startswith(WRONG) else "yes"
        return f"{passed} ({', '.join(numbers)})" if numbers else passed

    lines = ["| | MLPs found | " + " | ".join(_COLUMNS) + " |"]
    lines.append("|---" * (len(_COLUMNS) + 2) + "|")
    for row in rows:
        found = f"{row['covered']} of {row['mlps']}"
        if row["checks"]["found"]:
            found += f" ({notes.setdefault(row['checks']['found'], len(notes) + 1)})"
        cells = [cell(row["checks"].get(name)) for name in _COLUMNS]
        lines.append(f"| {row['name']} | {found} | {' | '.join(cells)} |")
    listed = "".join(f"{number}. {note}\n" for note, number in notes.items())
    return "\n".join(lines) + f"\n\n{listed}"


def bar(rows: list[dict[str, Any]]) -> str:
    """How many are found in full and right in every column."""
    right = [
        row
        for row in rows
        if row["covered"] == row["mlps"]
        and not any(said.startswith(WRONG) for said in row["checks"].values())
    ]
    return f"{len(right)} of {len(rows)}"


def types(measured: dict[str, Any]) -> str:
    """A table of all model types, by how much of their MLPs is found."""
    lines = [
        ("every MLP is found", "full"),
        ("a part is found, and a warning names the rest", "warned"),
        ("a part is found, and nothing is said of the rest", "silent"),
        ("a block is wired in another way than its pattern says", "wrong"),
        ("none is found, and the error shows them", "shown"),
        ("none is found, and the error does not show all", "hidden"),
    ]
    total = measured["with_mlps"]
    table = "| model types with MLPs | number | share |\n|---|---|---|\n"
    for line, key in lines:
        table += f"| {line} | {measured[key]} | {measured[key] / total:.0%} |\n"
    release = measured["versions"]["transformers"]
    return (
        f"{table}\nOf {len(measured['types'])} types of Transformers {release}, {total} have MLPs,"
        f" {measured['none']} have none, and {measured['unbuilt']} cannot be built from their"
        " default configs alone.\n"
    )


def render(page: str) -> str:
    """The page with each passage as the results say.

    Raises:
        SystemExit: a passage has no place, or two.
    """
    rows = result()["rows"]
    passages = {"table": f"\n{table(rows)}", "bar": bar(rows)}
    passages["types"] = f"\n{types(json.loads(TYPES.read_text(encoding='utf-8')))}"
    for name, passage in passages.items():
        place = rf"(<!-- {name} -->).*?(<!-- end -->)"
        page, found = re.subn(place, lambda m, t=passage: m[1] + t + m[2], page, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"models.md: expected one <!-- {name} -->, got {found}")
    return page


def main(
    only: Annotated[str, typer.Option(help="An architecture to check again.")] = "",
    just_render: Annotated[bool, typer.Option("--render", help="Check nothing.")] = False,
) -> None:
    """Check and render."""
    if not just_render:
        write_json(RESULT, check(only))
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
