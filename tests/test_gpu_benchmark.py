"""`benchmarks/gpu.py` without a GPU: the dry run, and what becomes of steps that fail."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_steps import kernels, small_pytest, union
from gpu_steps.step import Context
from steppe.ops import bitmask

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "benchmarks/gpu.py"

STEPS = {
    "fine": "def run(context):\n    context.keep(answer=42)",
    "raises": "def run(context):\n    context.keep(half=1)\n    raise ValueError('no such thing')",
    "partly": """
def run(context):
    context.attempt("one", lambda: 1 / 0)
    context.attempt("two", lambda: 2)
    context.attempt("three", lambda: 3, needs=1e6)
""",
    "crashes": """
import os, signal
def run(context):
    context.keep(half=1)
    os.kill(os.getpid(), signal.SIGSEGV)
""",
    "hangs": """
import subprocess, sys, time
def run(context):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    context.keep(child=child.pid)
    time.sleep(600)
""",
    "cannot_be_imported": "import nothing_of_this_name",
}


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The program; its name is that of a folder of tests."""
    spec = importlib.util.spec_from_file_location("gpu_program", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_program"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def steps_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for results; the modules of `STEPS` can be imported by new processes."""
    for name, source in STEPS.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_a_step_survives_the_failure_of_another(gpu: ModuleType, steps_on_path: Path) -> None:
    limits = dict.fromkeys(STEPS, 60.0) | {"hangs": 4.0}
    names = [*STEPS, "fine"]
    steps = [
        gpu.Step(f"{number}-{name}", name, limits[name], 1.0) for number, name in enumerate(names)
    ]
    whole = gpu.run_steps(steps, steps_on_path, 300.0, is_dry=True)
    found = {name.partition("-")[2]: row for name, row in whole["steps"].items()}
    assert found["fine"]["status"] == "ok"
    assert found["fine"]["answer"] == 42
    assert list(whole["steps"])[-1] == "6-fine"
    assert found["raises"]["status"] == "failed: ValueError: no such thing"
    assert found["raises"]["half"] == 1
    assert found["partly"]["status"] == "failed: one: ZeroDivisionError: division by zero"
    assert found["partly"]["two"] == 2
    assert found["partly"]["three"].startswith("left out")
    assert found["crashes"]["status"] == "failed: SIGSEGV"
    assert found["crashes"]["half"] == 1
    assert found["hangs"]["status"].startswith("failed: stopped after 4")
    wait_until(lambda: not is_alive(found["hangs"]["child"]))
    assert "nothing_of_this_name" in found["cannot_be_imported"]["status"]
    assert read(steps_on_path / "gpu.json") == whole
    for number, (name, row) in enumerate(whole["steps"].items()):
        assert read(steps_on_path / f"{number:02}-{name}.json") == row
    assert "no such thing" in (steps_on_path / "01-1-raises.log").read_text(encoding="utf-8")
    assert not list(steps_on_path.glob(".*"))  # nothing half written
    for row in found.values():
        assert row["status"] in gpu.summary(whole)


def test_a_late_step_is_skipped_and_said_so(gpu: ModuleType, steps_on_path: Path) -> None:
    steps = [
        gpu.Step("first", "fine", 60.0, 1.0),
        gpu.Step("late", "fine", 600.0, 500.0),
        gpu.Step("late in the background", "hangs", 600.0, 500.0, in_background=True),
        gpu.Step("last", "fine", 60.0, 1.0),
    ]
    whole = gpu.run_steps(steps, steps_on_path, 40.0, is_dry=True)
    late = "skipped: late"
    assert [row["status"] for row in whole["steps"].values()] == ["ok", late, late, "ok"]
    assert late in gpu.summary(whole)


def test_steps_of_one_kind_share_the_time_that_is_left(gpu: ModuleType) -> None:
    arms = [gpu.Step(str(number), "training", 60.0, 20.0) for number in range(4)]
    last = gpu.Step("last", "cpu", 30.0, 15.0)
    left = 180.0 + gpu.CLOSING
    limits = []
    for number in range(4):
        limits.append(gpu.time_for([*arms[number:], last], left))
        left -= limits[-1]
    assert limits == [41.25] * 4
    assert gpu.time_for([last], left) == 15.0
    assert gpu.time_for(arms, 1000.0) == 60.0
    assert gpu.time_for(arms, gpu.CLOSING + 10.0) < arms[0].least


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_the_results_and_no_process(
    steps_on_path: Path, sent: signal.Signals
) -> None:
    out = steps_on_path
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import gpu\n"
        "gpu.STEPS = tuple(gpu.Step(name, name, 60.0, 1.0) for name in ('fine', 'hangs', 'fine2'))"
        "\nsys.exit(gpu.main(['--dry-run', '--out', sys.argv[2]]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(PROGRAM.parent), str(out)],
        stdout=subprocess.PIPE,
        text=True,
    )
    log = out / "01-hangs.log"
    wait_until(lambda: log.exists() and "child: " in log.read_text(encoding="utf-8"))
    child = int(log.read_text(encoding="utf-8").partition("child: ")[2].split()[0])
    assert is_alive(child)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in output
    whole = read(out / "gpu.json")
    statuses = {name: row["status"] for name, row in whole["steps"].items()}
    assert statuses == {"fine": "ok", "hangs": "interrupted"}
    assert whole["steps"]["hangs"]["child"] == child
    wait_until(lambda: not is_alive(child))


def test_without_a_device_one_line_says_so(gpu: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert f"no CUDA device (torch {torch.__version__}: " in done.stderr
    assert "--dry-run" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_step_is_refused_by_name(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--steps", "facts,fact"])
    assert "expected some of facts, tests" in capsys.readouterr().err


@pytest.mark.slow  # half a minute; make test-gpu-offline runs the kernels
def test_the_dry_run_runs_every_step(gpu: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--dry-run", "--out", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "--seconds", "400"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = read(tmp_path / "gpu.json")["steps"]
    assert {name: row["status"] for name, row in steps.items()} == {
        step.name: "ok" for step in gpu.STEPS
    }
    assert steps["tests"]["passed"] == 1
    assert steps["packed"]["gpt"]["packed"]["ran"] == ["packed"]
    blocks = {name: row for name, row in steps["packed"].items() if name.startswith("block_")}
    assert len(blocks) == 2
    for row in blocks.values():
        assert row["packed"]["ran"] == ["packed"]
        assert 0.0 < row["packed"]["mean_density"] < 0.3
    densities = []
    for name in ("vanilla", "steppe", "threshold", "both"):
        row = steps[f"training-{name}"]
        assert row["steps"] == row["planned_steps"] == 6
        assert row["tokens"] == 6 * 2 * 32
        assert 5.0 < row["held_out"]["loss"] < 5.6  # log 256 = 5.545
        densities.append(row["held_out"]["density"])
    assert densities[2] < densities[0]  # the threshold has risen
    assert densities[3] < densities[1]
    # The model of the step before is what the union is measured on, plug-ins and all.
    for name in ("vanilla", "threshold"):
        per_block = steps["union"][name]
        mean = sum(row["density"] for row in per_block) / len(per_block)
        assert abs(mean - steps[f"training-{name}"]["held_out"]["density"]) < 0.05
    assert "training-both" in done.stdout
    assert (tmp_path / "summary.txt").read_text(encoding="utf-8").strip() in done.stdout


def test_the_union_of_a_tile_is_what_any_of_its_tokens_has() -> None:
    active = torch.zeros(256, 8, dtype=torch.bool)
    active[::2, 0] = True  # of every second token
    active[1::2, 1] = True
    active[:, 2] = True
    in_sequence = union.shares(active, torch.arange(256))
    assert in_sequence["density"] == 2 / 8
    assert in_sequence["in_sequence"] == dict.fromkeys(union.TILES, 3 / 8)
    order = torch.cat([torch.arange(0, 256, 2), torch.arange(1, 256, 2)])
    assert union.shares(active, order)["sorted"] == dict.fromkeys(union.TILES, 2 / 8)
    assert in_sequence["independent"][16] == (1 + 2 * (1 - 0.5**16)) / 8


def test_tokens_alike_in_their_components_are_sorted_together() -> None:
    torch.manual_seed(0)
    kinds = torch.randint(4, (512,))
    centres = torch.tensor([[9.0, 5.0], [9.0, -5.0], [-9.0, 5.0], [-9.0, -5.0]])
    x = torch.cat([centres[kinds], torch.zeros(512, 14)], 1) + 0.1 * torch.randn(512, 16)
    order = union.by_signs(x[:256], x[256:])
    assert torch.equal(order.sort().values, torch.arange(256))
    changes = (kinds[256:][order].diff() != 0).sum()
    assert changes == 3


def dry_context() -> Context:
    return Context(Path(os.devnull), Path(os.devnull), 60.0, "", is_dry=True)


def test_the_checks_of_kernels_pass_on_their_definitions() -> None:
    for part in itertools.chain(*kernels.CHECKS.values()):
        part(dry_context())


@pytest.mark.parametrize(
    ("part", "factors"),
    [
        (kernels.one_against_float64, (1.02, 1.02, 1.02)),
        (kernels.one_against_float64, (1.0, 1.0, 1.02)),
        (kernels.few_against_float64, (1.02, 1.02, 1.02)),
        (kernels.few_against_float64, (1.0, 1.0, 1.02)),
        (kernels.one_hard_to_screen, (1.0, 1.0, 1.02)),
        (kernels.few_hard_to_screen, (1.0, 1.02, 1.0)),
    ],
)
def test_the_checks_of_decoding_can_fail(
    part: Any, factors: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernels.decode_tokens

    def wrong(*arguments: Any) -> list[Tensor]:
        return [z * factor for z, factor in zip(right(*arguments), factors, strict=True)]

    monkeypatch.setattr(kernels, "decode_tokens", wrong)
    with pytest.raises(AssertionError):
        part(dry_context())


def inaccurate(p: Tensor, coefficients: Tensor, capacity: int) -> tuple[Tensor, Any]:
    a, packed = bitmask.act_pack(p, coefficients, capacity)
    return a * 1.02, packed


def without_zeros(p: Tensor, coefficients: Tensor, capacity: int) -> tuple[Tensor, Any]:
    a, packed = bitmask.act_pack(p, coefficients, capacity)
    return a + 1e-30, packed


def nan_is_zero(p: Tensor, coefficients: Tensor, capacity: int) -> tuple[Tensor, Any]:
    return bitmask.act_pack(p.nan_to_num(nan=0.0, posinf=torch.inf), coefficients, capacity)


def nothing_recomputed(*arguments: Any) -> None:
    pass


def random_bits(p: Tensor, coefficients: Tensor, capacity: int) -> tuple[Tensor, Any]:
    a, packed = bitmask.act_pack(p, coefficients, capacity)
    return a + a * 0.01 * torch.rand_like(a), packed


@pytest.mark.parametrize(
    ("part", "name", "wrong"),
    [
        (kernels.against_float64, "act_pack", inaccurate),
        (kernels.against_float64, "act_pack", without_zeros),
        (kernels.odd_values, "act_pack", nan_is_zero),
        (kernels.same_bits, "act_pack", random_bits),
        (kernels.recomputed, "recompute_lost_", nothing_recomputed),
    ],
)
def test_the_checks_of_kernels_can_fail(
    part: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("act_pack", "unpack_grad", "recompute_lost_")
    right = {name: getattr(bitmask, name) for name in names}
    broken = SimpleNamespace(**{**right, name: wrong})
    monkeypatch.setattr(kernels, "pack_module", lambda context: broken)
    with pytest.raises(AssertionError):
        part(dry_context())


TESTS = """
import pytest, torch

def test_passes(device, tmp_path):
    assert device == "cpu" and tmp_path.is_dir()

@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("one, two", [(1, 1), (1, 2)])
@pytest.mark.parametrize("kind", ["a", "b"])
def test_case(one, two, kind):
    assert one == two

def test_skips():
    pytest.skip("not today")

def test_wants_a_package():
    pytest.importorskip("nothing_of_this_name")

def test_raises():
    with pytest.raises(ValueError, match="^no"):
        raise ValueError("no")

def test_raises_nothing():
    with pytest.raises(ValueError):
        pass

def test_raises_another():
    with pytest.raises(ValueError, match="yes"):
        raise ValueError("no")
"""


def test_the_small_runner_knows_passed_from_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "pytest", pytest)  # put back afterwards
    outcomes: dict[str, str] = {}
    assert small_pytest.run_file(file, "cpu", "[a-1-1]", outcomes.__setitem__) == 0
    assert outcomes == {"test_case[a-1-1]": "passed"}
    code = small_pytest.run_file(file, "cpu", "", outcomes.__setitem__)
    assert code == 1
    words = {name: text.partition(":")[0] for name, text in outcomes.items()}
    assert words == {
        "test_passes": "passed",
        "test_case[a-1-1]": "passed",
        "test_case[a-1-2]": "failed",
        "test_case[b-1-1]": "passed",
        "test_case[b-1-2]": "failed",
        "test_skips": "skipped",
        "test_wants_a_package": "skipped",
        "test_raises": "passed",
        "test_raises_nothing": "failed",
        "test_raises_another": "failed",
    }


@pytest.mark.parametrize("name", ["gpu-h200", "gpu-h200-again"])
def test_the_table_of_a_real_run_can_be_made(name: str, gpu: ModuleType) -> None:
    """The second has steps that were stopped half way."""
    path = ROOT / f"benchmarks/results/{name}.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    text = gpu.summary(whole)
    assert all(step in text for step in whole["steps"])
