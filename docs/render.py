"""Render the committed results into the README, and the plot of the demo.

python docs/render.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from steppe.report import demo_markdown, plot_training_density

ROOT = Path(__file__).parents[1]
DEMO = "docs/results/demo.json"
MONITOR_COST = "benchmarks/results/monitor_cost.json"


def render(readme: str) -> str:
    """The README with each marked passage as its result file says.

    Raises:
        SystemExit: a passage is missing, or there twice.
    """
    passages = {
        f"table: {DEMO}": "\n" + demo_markdown(_read(DEMO)),
        f"sampled step: {MONITOR_COST}": f"{_cost('sampled step'):.2f}×",
        f"run: {MONITOR_COST}": f"{100 * (_cost('run measured every 50 steps') - 1):+.1f} %",
    }
    for name, passage in passages.items():
        pattern = rf"(<!-- {re.escape(name)} -->).*?(<!-- end -->)"
        readme, found = re.subn(
            pattern,
            lambda match, passage=passage: match[1] + passage + match[2],
            readme,
            flags=re.DOTALL,
        )
        if found != 1:
            raise SystemExit(f"README.md: expected one passage <!-- {name} -->, got {found}")
    return readme


def main() -> None:
    """Rewrite the README and the plot."""
    plot_training_density(_read(DEMO), ROOT / "docs/results/demo.png")
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text(encoding="utf-8")), encoding="utf-8")


def _read(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def _cost(what: str) -> float:
    """Ratio to the same without measuring, of the ViT-S blocks."""
    rows = _read(MONITOR_COST)["rows"]
    return next(row["ratio"] for row in rows if (row["case"], row["what"]) == ("vit-s", what))


if __name__ == "__main__":
    main()
