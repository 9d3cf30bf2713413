"""Run a study, for ``steppe study``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steppe.files import prepare_file, writing_to
from steppe.study.alone import alone_in
from steppe.study.plan import check_runs, model_folder, plan_runs, run_folder, words_of
from steppe.study.planned import PLACES, PlannedRun
from steppe.study.rows import append_row, read_rows
from steppe.study.running import Work, run_in_processes
from steppe.study.study_file import Study
from steppe.study.worker import train

OnProgress = Callable[[float, int], None]
"""Called with the runs done, those in progress as shares, and the runs in all."""
OnRow = Callable[[dict[str, Any]], None]
OnFailure = Callable[[str, list[str]], None]
"""Called with a run's id and its last lines."""


@dataclass(frozen=True)
class Listener:
    """Whom a study tells of its way; None for nobody.

    Attributes:
        on_progress: called often.
        on_row: called with the row of each run as it ends.
        on_failure: called with each run that fails.
    """

    on_progress: OnProgress | None
    on_row: OnRow | None
    on_failure: OnFailure | None


@dataclass(frozen=True)
class StudyOutcome:
    """What became of a study.

    Attributes:
        file: the JSON lines.
        rows: of all runs of the plan that are done, those of earlier calls included.
        failed: ids of the runs that have failed.
    """

    file: Path
    rows: list[dict[str, Any]]
    failed: list[str]


def run_study(
    study: Study,
    folder: Path,
    jobs: int,
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    data: Mapping[str, str] | None = None,
    on_progress: OnProgress | None = None,
    on_row: OnRow | None = None,
    on_failure: OnFailure | None = None,
    work: Work = train,
) -> StudyOutcome:
    """Do all runs of a study that are not done yet, in parallel processes.

    A run is done if the file has a row of its id and of its settings' hash. A row is written when
    its run has ended, in one piece; a run that was stopped goes on from its last checkpoint, if its
    recipe writes some, or begins again. A run that is done is done again if another one starts from
    its model, which is not there any more.

    Args:
        study: as `read_study` gives it.
        folder: for NAME.jsonl and the runs' folders.
        jobs: number of processes at a time.
        quick: a few steps, two seeds and the first of the values that vary.
        only: names of recipes and arms; others of that kind are left out.
        data: folders of data by recipe.
        on_progress: called often.
        on_row: called with the row of each run as it ends.
        on_failure: called with each run that fails; the others go on.
        work: done for each run.

    Raises:
        StudyError: a key or value of the study is wrong, or another process runs a study in the
            folder; then nothing was run.
        OutputError: the folder cannot be written.
    """
    runs = plan_runs(study, quick=quick, only=only, data=data)
    file = folder / f"{study.name}.jsonl"
    with writing_to(file, "out"):  # its name may be too long for a file
        done = {(row["id"], row["hash"]) for row in read_rows(file)}
    todo = _to_do(runs, done, folder)
    check_runs(study, todo, folder)
    prepare_file(file, "out")
    tell = Listener(on_progress, on_row, on_failure)
    with alone_in(folder):
        places = {run.key: index for index, run in enumerate(todo)}
        tasks = [_task(study, run, folder, quick, places) for run in todo]
        failed = _do_all(tasks, file, jobs, work, tell, len(runs))
    wanted = {run.key for run in runs}
    rows = [row for row in read_rows(file) if (row["id"], row["hash"]) in wanted]
    return StudyOutcome(file, rows, failed)


def _to_do(
    runs: Sequence[PlannedRun], done: set[tuple[str, str]], folder: Path
) -> list[PlannedRun]:
    """The runs without a row, and those whose model one of these starts from and does not find."""
    todo, lacking = [], set[tuple[str, str]]()
    for run in reversed(runs):  # each stands behind the one that it starts from
        if run.key in done and run.key not in lacking:
            continue
        todo.append(run)
        if run.after is not None and not model_folder(run.after, folder).is_dir():
            lacking.add(run.after.key)
    return todo[::-1]


def _do_all(
    tasks: Sequence[dict[str, Any]], file: Path, jobs: int, work: Work, tell: Listener, total: int
) -> list[str]:
    """Do tasks in processes, and write their rows; gives the ids of those that have failed."""
    shares: dict[int, float] = {}
    before = total - len(tasks)
    failed = []
    with closing(run_in_processes(work, tasks, jobs)) as messages:
        for message in messages:
            task, values = tasks[message.task], message.values
            if "steps" in values:
                shares[message.task] = values["step"] / max(1, values["steps"])
            elif "row" in values:
                append_row(file, values["row"])
                _forget_checkpoints(Path(task["folder"]))
                if tell.on_row is not None:
                    tell.on_row(values["row"])
            else:
                shares[message.task] = 1.0
                if message.failure is not None:
                    failed.append(task["row"]["id"])
                    if tell.on_failure is not None:
                        tell.on_failure(task["row"]["id"], message.failure)
            if tell.on_progress is not None:
                tell.on_progress(before + sum(shares.values()), total)
    return failed


def _task(
    study: Study,
    run: PlannedRun,
    folder: Path,
    quick: bool,
    places: Mapping[tuple[str, str], int],
) -> dict[str, Any]:
    """What a process needs to do a run; places are those of the tasks, by their runs' keys."""
    row = {
        "study": study.name,
        "id": run.id,
        "hash": run.hash,
        "recipe": run.recipe_name,
        "arm": run.arm,
        "baseline": study.baseline,
        "setting": dict(run.setting),
        "factors": study.factors,
        "seed": run.seed,
        **({} if run.after is None else {"after": run.after.arm}),
        "is_quick": quick,
        "settings": {key: value for key, value in run.settings.items() if key not in PLACES},
    }
    return {
        "recipe": run.recipe,
        "flags": words_of(run, folder),
        "folder": str(run_folder(run, folder)),
        "row": row,
        "after": None if run.after is None else places.get(run.after.key),
    }


def _forget_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a run that is done: they are ten times as large as the rest."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
