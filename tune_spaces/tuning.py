"""The three hooks of Ray Tune, each a line to the `Keeper`; Tune pickles them, the keeper stays behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

if TYPE_CHECKING:
    from tune_spaces.sweep import Keeper


class _Hook:
    def __init__(self, keeper: Keeper):
        super().__init__()
        self._keeper = keeper

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Proposer(_Hook, Searcher):
    """Hands Tune one trial after another."""

    def suggest(self, trial_id: str) -> Any:
        return self._keeper.propose(trial_id) or Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """`Caller` is told more."""

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing: sweep.json has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class Stop(_Hook, Stopper):
    """Ends everything where the keeper wants that."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._keeper.wants_stop()


class Caller(_Hook, Callback):
    """Tells the keeper how trials end."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._keeper.completed(trial.trial_id, trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        lines = [line for line in ((trial.error_file and _read(trial.error_file)) or "").splitlines() if line.strip()]
        self._keeper.errored(trial.trial_id, lines[-1][:300] if lines else "its process has ended")

    def get_state(self) -> dict | None:
        return None


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
