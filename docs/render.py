"""Render docs/results/demo.json into the README's table and docs/results/demo.png."""

from __future__ import annotations

import json
import re
from pathlib import Path

from steppe.report import demo_markdown, plot_training_density

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Rewrite the README and the plot."""
    summary = json.loads((ROOT / "docs/results/demo.json").read_text(encoding="utf-8"))
    plot_training_density(summary, ROOT / "docs/results/demo.png")
    readme = ROOT / "README.md"
    text, tables = re.subn(
        r"(<!-- table: docs/results/demo.json -->\n).*?(<!-- end of table -->)",
        lambda match: match[1] + demo_markdown(summary) + match[2],
        readme.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if tables != 1:
        raise SystemExit(f"README.md: expected one table of docs/results/demo.json, got {tables}")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
