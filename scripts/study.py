"""Trains a recipe over a grid, named variants or a search, each with several seeds, into one table and one plot.

    python scripts/study.py studies/lambda_lr.yaml
    python scripts/study.py studies/lambda_lr.yaml jobs=2 seeds=[0,1]    # keys of the study can be changed
    python scripts/study.py studies/lambda_lr.yaml --table               # table and plot from the stored results alone

Every run is one plain `llamafactory-cli train` with a folder of its own, outputs/studies/NAME/RUN. Its result goes to
studies/results/NAME/RUN.json, a small file to commit, and beside it table.json, table.md and plot.svg. The same command
goes on after an interruption; a finished run is not repeated while its recipe and command are the same; a failed one
is listed and tried again by the next command. docs/studies.md says what a study file holds. Own keys:

    jobs     runs at once (1); more than one gives each OMP_NUM_THREADS=1
    dry_run  true: only check the study and say how many runs it has and how long they take
    table    true, or --table: see above
"""

from __future__ import annotations

import sys

from llava_orpo.errors import UsageError
from llava_orpo.recipe import read_command, run

OWN_KEYS = {"jobs": 1, "table": False, "dry_run": False}


def main(argv: list[str]) -> int:
    argv = ["table=true" if word == "--table" else word for word in argv]
    command = read_command(__doc__, argv, OWN_KEYS, file="study.yaml", refuse=False)
    own = command.own
    if own["jobs"] < 1:
        raise UsageError("jobs must be 1 or more.")
    from llava_orpo.study import results, running, search, shown, spec

    study = spec.read(command.file, command.recipe)
    if own["table"]:
        return show_table(study)
    if study.search:
        search.refuse_without_optuna()
    runs = study.runs()
    settings = [setting for setting, _ in results.results_of(study)[0]]
    finished = running.done(study, study.runs(settings))
    total = study.trials * len(study.seeds) if study.search else len(runs)
    # Which trials of a search will be asked for again is known once Optuna asks.
    ended, seconds = 0 if study.search else len(finished), [one["seconds"] for one in finished]
    with shown.run_list(total, ended, seconds, study.seconds_per_run, own["jobs"]) as listed:
        print(plan(study, listed))
        if own["dry_run"]:
            return 0
        runner = running.Runner(study, own["jobs"], listed)
        try:
            with running.alone(study):
                search.search(study, runner) if study.search else runner.run_all(runs)
        except running.Stopped:
            stopped = True
        else:
            stopped = False
    if stopped:
        print(f"\nStopped at {listed.overall()}. The same command goes on.", file=sys.stderr)
        return 130
    show_table(study)
    return 1 if listed.failed else 0


def plan(study, listed) -> str:
    """How many runs there are and how long they will take."""
    from llava_orpo.study.shown import duration

    settings = f"{study.trials} trials" if study.search else f"{len(study.settings())} settings"
    left = listed.left()
    if listed.ended == listed.total:
        hours = "nothing is left to run"
    elif left is None:
        hours = "the time is known once one has finished (or by the study's seconds_per_run)"
    else:
        by = "the mean of the finished runs" if listed.seconds else "the study's estimate"
        hours = f"about {duration(left)} for the other {listed.total - listed.ended}, by {by}, {listed.jobs} at once"
    runs = f"{listed.total} runs ({settings} x {len(study.seeds)} seeds), {listed.ended} finished"
    return f"{study.name}: {runs}; {hours}."


def show_table(study) -> int:
    from llava_orpo.study import results

    page, other = results.write_table(study)
    print(f"\n{page}\n  {study.results}/table.md, table.json, plot.svg")
    if other:
        print(f"  left out: {len(other)} results of another recipe or command ({other[0].name}, …)")
    return 0


if __name__ == "__main__":
    run(main)
