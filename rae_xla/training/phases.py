"""Phases of a run: what a step does may change at fixed steps; all programs are compiled before the first of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rae_xla.recipe import TrainingRecipe
from rae_xla.runtime import Runtime
from rae_xla.training.diagnosis import make_diagnosis
from rae_xla.training.update import Loss, StepFunction, make_update


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps of one kind, from the one after ``begins_after`` until the next phase."""

    name: str | None = None
    """The task's if there is but one."""
    begins_after: int = 0
    update: StepFunction
    diagnosis: StepFunction
    """See `rae_xla.training.diagnosis`."""
    diagnosed: Callable[[dict[str, Any]], dict[str, Any]] = lambda state: {"parameters": state["parameters"]}
    """From the state to what the diagnosis looks at, besides what is frozen."""
    untouched: tuple[str, ...] = ()
    """Parts of the state that the update neither reads nor changes."""

    def touched(self, state: dict[str, Any]) -> dict[str, Any]:
        """The parts of the state that the update is given."""
        return {part: value for part, value in state.items() if part not in self.untouched}


def plain_phase(
    module: nn.Module, loss: Loss, recipe: TrainingRecipe, steps_per_epoch: float, runtime: Runtime
) -> Phase:
    """That of a model trained on one loss, from the first step to the last.

    Raises:
        UserError: see `make_update`.
    """
    return Phase(
        update=make_update(module, loss, recipe.train, recipe.compute, steps_per_epoch, runtime),
        diagnosis=make_diagnosis(module, loss, recipe.compute, runtime),
    )


class Programs:
    """The compiled updates of a run's phases; called with a step's number, that of its phase."""

    def __init__(self, phases: tuple[Phase, ...], name: str, runtime: Runtime) -> None:
        self._phases = phases
        self._compiled = [runtime.compile(phase.update, phase.name or name) for phase in phases]

    def at(self, step: int) -> Phase:
        """The phase of this step, counted from one."""
        return self._phases[self._number(step)]

    def prepare(
        self, step: int, state: dict[str, Any], frozen: Any, batch: Any, after_each: Callable[[], None]
    ) -> None:
        """Compile this step's phase and all later ones, so that none fails for the first time after days."""
        for number in range(self._number(step), len(self._phases)):
            self._compiled[number].prepare(self._phases[number].touched(state), frozen, batch)
            after_each()

    def __call__(self, step: int, state: dict[str, Any], frozen: Any, batch: Any) -> tuple[dict[str, Any], Any]:
        """The state, which is consumed, after this step, and the step's metrics, on the devices."""
        number = self._number(step)
        changed, metrics = self._compiled[number](self._phases[number].touched(state), frozen, batch)
        return {**state, **changed}, metrics

    @property
    def wait_seconds(self) -> float:
        """What all calls have spent waiting for earlier steps so far."""
        return sum(program.wait_seconds for program in self._compiled)

    @property
    def compile_seconds(self) -> float | None:
        """Of all programs together; none if nothing was compiled."""
        seconds = [program.compile_seconds for program in self._compiled if program.compile_seconds is not None]
        return sum(seconds) if seconds else None

    def _number(self, step: int) -> int:
        return max(number for number, phase in enumerate(self._phases) if phase.begins_after < step)
