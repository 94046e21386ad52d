"""What a supervisor does next: a function of where a job stands and what is seen of it, and of nothing else.

A decision is a new state, and what to ask Cloud for. The state is written first; what was not asked for because the
supervisor died is seen to be missing and asked for by the next. Nothing is counted twice: a count rises together with
the generation or the attempt that it is about.
"""

from __future__ import annotations

from dataclasses import dataclass

from rae_xla.cloud.gcloud import Kind, kind_of
from rae_xla.cloud.job import Event, JobSpec, Outcome, State
from rae_xla.cloud.watching import Machine, Seen, Slice
from rae_xla.errors import PreemptedError, StoppedError, UserError

# In Cloud's words.
GONE = ("SUSPENDING", "SUSPENDED")
LEAVING = "DELETING"
EVENTS_KEPT = 200
# A command line that its tool refuses.
USER_ERROR = UserError.exit_code
TOLD_TO_END = PreemptedError.exit_code
EXIT_CODES = {"succeeded": 0, "failed": StoppedError.exit_code, "stopped": TOLD_TO_END}


@dataclass(frozen=True)
class Decision:
    """``create``: ask for the state's generation. ``delete``: generations to give back. ``done``: nothing is left."""

    state: State
    create: bool = False
    delete: tuple[int, ...] = ()
    done: bool = False


def decide(spec: JobSpec, state: State, seen: Seen) -> Decision:
    """The next step."""
    if seen.stop and state.outcome is None:
        state = _end(spec, state, seen, "stopped", "asked to stop")
    if state.outcome is None:
        # Told by machines, whether or not they are still there.
        state = _finished(spec, state, seen)
    if state.outcome is not None:
        return _wind_up(spec, state, seen)
    old = tuple(one.generation for one in seen.slices if one.generation != state.generation and one.state != LEAVING)
    present = seen.slice(state.generation)
    if present is None:
        return _without_slice(spec, state, seen, old)
    if present.state in GONE:
        return Decision(_preempted(spec, state, seen, f"the slice is {present.state}"), delete=old)
    if present.state == "FAILED":
        return Decision(_not_given(spec, state, seen, present), delete=old)
    if present.state != "ACTIVE":
        return Decision(state, delete=old)
    if state.seen_active is None:
        there = state.model_copy(update={"seen_active": seen.now, "began": seen.now})
        state = _with_event(there, seen, "the slice is there")
    return Decision(_running(spec, state, seen), delete=old)


def _wind_up(spec: JobSpec, state: State, seen: Seen) -> Decision:
    """Machines save themselves and end; then all is given back."""
    assert state.ended is not None
    present = seen.slice(state.generation)
    if present is not None and present.state == "ACTIVE" and state.outcome == "stopped":
        all_ended = all(machine.ended for machine in seen.machines if machine.heard is not None)
        if not all_ended and seen.now - state.ended < 60 * spec.limits.save_minutes:
            return Decision(state)
    left = tuple(one.generation for one in seen.slices if one.state != LEAVING)
    return Decision(state, delete=left, done=not seen.slices)


def _without_slice(spec: JobSpec, state: State, seen: Seen, old: tuple[int, ...]) -> Decision:
    if state.seen_active is not None:
        # Somebody else deleted it, or Cloud did.
        return Decision(_preempted(spec, state, seen, "the slice was deleted"), delete=old)
    # What is not quite deleted still counts against the quota.
    return Decision(state, create=not seen.slices and seen.now >= state.not_before, delete=old)


def _preempted(spec: JobSpec, state: State, seen: Seen, why: str) -> State:
    count = state.preemptions + 1
    if count > spec.limits.max_preemptions:
        return _end(spec, state, seen, "failed", f"{why}, {count} times now")
    return _next_slice(spec, state, seen, f"{why}; another is asked for").model_copy(update={"preemptions": count})


def _not_given(spec: JobSpec, state: State, seen: Seen, failed: Slice) -> State:
    """A request that failed: for want of capacity it is made again later, otherwise somebody has to mend something."""
    if kind_of(failed.said) in ("quota", "refused"):
        return _end(spec, state, seen, "failed", f"Cloud refuses the slice: {failed.said}", USER_ERROR)
    state = _next_slice(spec, state, seen, f"no slice ({failed.said or 'no reason is given'}); asked for again later")
    return state.model_copy(update={"not_before": seen.now + 60 * spec.limits.no_capacity_minutes})


def _finished(spec: JobSpec, state: State, seen: Seen) -> State:
    ended = [machine.ended for machine in seen.machines if machine.ended is not None]
    refused = next((one for one in ended if one.code == USER_ERROR), None)
    if refused is not None:
        return _end(spec, state, seen, "failed", refused.said, USER_ERROR)
    if ended and len(ended) == len(seen.machines) and all(one.code == 0 for one in ended):
        return _end(spec, state, seen, "succeeded", "every machine is done")
    return state


def _running(spec: JobSpec, state: State, seen: Seen) -> State:
    limits = spec.limits
    unable = next((machine for machine in seen.machines if machine.setup_failed is not None), None)
    if unable is not None:
        return _crashed(spec, state, seen, f"{unable.name}: {unable.setup_failed}", slice_too=True)
    ended = [machine.ended for machine in seen.machines if machine.ended is not None]
    if ended:
        # The others follow, or the slice turns out to be taken away, soon.
        first = min(one.time for one in ended)
        if len(ended) < len(seen.machines) and seen.now - first <= 60 * limits.settle_minutes:
            return state
        return _ended_early(spec, state, seen, first)
    lost = next((machine for machine in seen.machines if _is_lost(machine, spec, state, seen.now)), None)
    if lost is not None:
        return _crashed(spec, state, seen, f"{lost.name} is not heard of", slice_too=True)
    written = max((machine.last_output or state.began for machine in seen.machines), default=seen.now)
    if seen.now - written > 60 * limits.silent_minutes:
        # A process that cannot be killed holds the chips; another slice has none.
        why = f"nothing was written for {limits.silent_minutes:g} minutes"
        return _crashed(spec, state, seen, why, slice_too=state.crashes > 0)
    return state


def _ended_early(spec: JobSpec, state: State, seen: Seen, first: float) -> State:
    crashed = next((machine for machine in seen.machines if _has_crashed(machine)), None)
    if crashed is not None:
        assert crashed.ended is not None
        why = f"{crashed.name} ended with {crashed.ended.code}: {crashed.ended.said}"
        return _crashed(spec, state, seen, why, slice_too=False)
    if any(machine.ended is not None and machine.ended.code == 0 for machine in seen.machines):
        return _crashed(spec, state, seen, "some machines are done and others are not", slice_too=False)
    if seen.now - first <= 60 * spec.limits.settle_minutes:
        return state
    return _preempted_in_place(spec, state, seen)


def _has_crashed(machine: Machine) -> bool:
    return machine.ended is not None and machine.ended.code not in (0, TOLD_TO_END, None)


def _is_lost(machine: Machine, spec: JobSpec, state: State, now: float) -> bool:
    assert state.seen_active is not None
    if machine.heard is None or machine.heard < state.seen_active:
        return now - state.seen_active > 60 * spec.limits.start_minutes
    return now - machine.heard > 60 * max(
        spec.limits.lost_minutes, 0 if machine.last_output is not None else spec.limits.start_minutes
    )


def _preempted_in_place(spec: JobSpec, state: State, seen: Seen) -> State:
    """Machines were told to end or restarted, and the slice is still there: maintenance."""
    count = state.preemptions + 1
    if count > spec.limits.max_preemptions:
        return _end(spec, state, seen, "failed", f"told to end, {count} times now")
    started = state.model_copy(update={"attempt": state.attempt + 1, "began": seen.now, "preemptions": count})
    return _with_event(started, seen, f"told to end, and the slice is there: attempt {started.attempt}")


def _crashed(spec: JobSpec, state: State, seen: Seen, why: str, *, slice_too: bool) -> State:
    count = 1 if seen.progress != state.progress else state.crashes + 1
    if count > spec.limits.max_crashes:
        return _end(spec, state, seen, "failed", f"{why}; that was crash {count} without a new checkpoint")
    counted = state.model_copy(update={"crashes": count, "progress": seen.progress})
    if slice_too:
        return _next_slice(spec, counted, seen, f"{why}; another slice is asked for")
    again = counted.model_copy(update={"attempt": state.attempt + 1, "began": seen.now})
    return _with_event(again, seen, f"{why}; attempt {again.attempt}")


def _next_slice(spec: JobSpec, state: State, seen: Seen, why: str) -> State:
    update = {
        "generation": state.generation + 1,
        "attempt": state.attempt + (state.seen_active is not None),
        "seen_active": None,
        "chip_hours": chip_hours(spec, state, seen.now),
    }
    return _with_event(state.model_copy(update=update), seen, why)


def _end(spec: JobSpec, state: State, seen: Seen, outcome: Outcome, why: str, code: int | None = None) -> State:
    update = {
        "outcome": outcome,
        "reason": why,
        "exit_code": EXIT_CODES[outcome] if code is None else code,
        "ended": seen.now,
        "seen_active": None,
        "chip_hours": chip_hours(spec, state, seen.now),
    }
    return _with_event(state.model_copy(update=update), seen, f"{outcome}: {why}")


def refused_slice(spec: JobSpec, state: State, now: float, kind: Kind, said: str) -> State:
    """What becomes of a job whose request Cloud refused at once."""
    seen = Seen(now=now)
    if kind == "capacity":
        later = state.model_copy(update={"not_before": now + 60 * spec.limits.no_capacity_minutes})
        return _with_event(later, seen, f"no slice ({said}); asked for again later")
    return _end(spec, state, seen, "failed", said, USER_ERROR)


def going_on(state: State, now: float) -> State:
    """A job that was stopped or failed, begun again on another slice."""
    update = {
        "generation": state.generation + 1,
        "attempt": state.attempt + 1,
        "crashes": 0,
        "not_before": 0.0,
        **dict.fromkeys(("outcome", "reason", "exit_code", "ended", "seen_active")),
    }
    return _with_event(state.model_copy(update=update), Seen(now=now), "begun again")


def chip_hours(spec: JobSpec, state: State, now: float) -> float:
    """Of all slices so far, from when each was first seen ready."""
    held = 0.0 if state.seen_active is None else (now - state.seen_active) / 3600
    return state.chip_hours + held * spec.topology.num_chips


def _with_event(state: State, seen: Seen, text: str) -> State:
    return state.model_copy(update={"events": (*state.events, Event(time=seen.now, text=text))[-EVENTS_KEPT:]})
