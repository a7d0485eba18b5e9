"""A study's search: Optuna chooses the values, the runner trains them with every seed."""

from __future__ import annotations

from importlib.util import find_spec
from statistics import fmean
from typing import Any

from ..errors import UserError
from .results import is_finished
from .running import Runner, done
from .spec import Setting, Study

SEED = 0  # of Optuna's sampler
INSTALL = "search needs Optuna, which is not installed: pip install --no-deps -r requirements/study.txt"


def refuse_without_optuna() -> None:
    """Raises UserError if Optuna is not installed."""
    if find_spec("optuna") is None:
        raise UserError(INSTALL)


def search(study: Study, runner: Runner) -> list[Setting]:
    """Runs the trials one after the other and returns them.

    A trial's value is the mean of the study's metric over the seeds; a trial with a failed run has none. The sampler
    (TPE) has a fixed seed and is asked again from the first trial, so a search that was interrupted goes on with the
    trials that it would have had: those with stored results are not trained again.
    """
    refuse_without_optuna()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searched = optuna.create_study(direction=study.direction, sampler=optuna.samplers.TPESampler(seed=SEED))
    settings = []
    for number in range(study.trials):
        trial = searched.ask()
        one = study.trial(number, {key: _suggest(trial, key, space) for key, space in study.search.items()})
        settings.append(one)
        runs = study.runs([one])
        runner.shown.reused(len(done(study, runs)))
        found = runner.run_all(runs)
        if all(map(is_finished, found)):
            searched.tell(trial, fmean(result["metrics"][study.metric] for result in found))
        else:
            searched.tell(trial, state=optuna.trial.TrialState.FAIL)
    return settings


def _suggest(trial, key: str, space: dict[str, Any]) -> Any:
    if "choices" in space:
        # Optuna stores numbers and words alone, so a list or a mapping is chosen by its place.
        return space["choices"][trial.suggest_categorical(key, list(range(len(space["choices"]))))]
    low, high, log = space["low"], space["high"], bool(space.get("log"))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, log=log)
    return float(f"{trial.suggest_float(key, low, high, log=log):.6g}")  # as it is written in a command
