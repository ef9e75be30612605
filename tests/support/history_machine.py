"""Hypothesis draws histories: record, kill, resume, go back, fork, read, attribute, import, lose power, as it likes."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from support.failing_files import FOR_GOOD, HOWS, KINDS, Fault
from support.histories import World
from support.history_model import Violation

#: The most calls of one kind before the one that goes wrong.
_CALLS = 60


#: None, or what goes wrong. What is drawn never depends on what came of it: threads make that differ from time to time.
FAULTS = st.one_of(
    st.none(),
    *[
        st.builds(
            Fault,
            kind=st.sampled_from(KINDS),
            at=at,
            how=st.sampled_from(HOWS),
            times=st.sampled_from([1, 1, 3, FOR_GOOD]),
        )
        for at in (st.integers(0, 12), st.integers(0, _CALLS))
    ],
)
_SOME = st.integers(0, 11)


def _of(fault, *, local):
    """The fault as it can be there."""
    if fault is None or (local and fault.kind != "read"):
        return fault
    how = {"full": "fail", "cut": "fail", "cut and kill": "kill"}.get(fault.how, fault.how)
    return replace(fault, kind=fault.kind if local else "storage", how=how)


class Histories(RuleBasedStateMachine):
    """One history. A violation is raised; where ``found`` is a list it is kept there, and the history is over."""

    found = None
    driven, injected, calls = 0, Counter(), Counter()

    def __init__(self):
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._folder = tempfile.TemporaryDirectory(prefix="explaind-histories-")
        self.world, self._over, self._asked = World(self._folder.name, self._patch), False, 0

    def _do(self, act, *args, **kwargs):
        if self._over:
            return
        started = time.monotonic()
        try:
            act(*args, **kwargs)
        except Violation as violation:
            self._over = True
            if type(self).found is None:
                raise
            type(self).found.append(violation)
        finally:
            type(self).calls[act.__name__] += 1
            type(self).calls[f"{act.__name__}: ms"] += int(1000 * (time.monotonic() - started))

    def _place(self, which, live=None):
        """One of the runs that were begun, or None; ``live`` where it should be recorded just now, or not be."""
        begun = [p for p in self.world.places if p.began]
        some = [p for p in begun if live is None or (p.live is not None) == live]
        return some[which % len(some)] if some else None

    @initialize(
        local=st.sampled_from([True, True, False]),
        durable=st.sampled_from(["steps", "snapshots", "close"]),
        behind=st.sampled_from([0, 0, 2]),
        fault=st.none() | FAULTS,
        count=st.integers(0, 5),
    )
    def begin(self, local, durable, behind, fault, count):
        self._do(self.world.begin, local=local, durable=durable, behind=behind, fault=_of(fault, local=local))
        place = self._place(0, live=True)
        if place is not None and count:
            self._do(self.world.record, place, count, flush=False)

    @rule(fault=FAULTS, which=_SOME, count=st.integers(1, 4), flush=st.booleans())
    def record(self, fault, which, count, flush):
        """Steps of a run that is being recorded; where there is none, one is resumed, or begun again."""
        place = self._place(which, live=True)
        if place is not None:
            self._do(self.world.record, place, count, flush=flush, fault=_of(fault, local=place.local))
        else:
            self._go_on(which, 0, 0.1, fault)

    @rule(which=_SOME, count=st.integers(1, 4))
    def record_well(self, which, count):
        self.record(None, which, count, True)

    def _go_on(self, which, back, lr, fault):
        place = self._place(which, live=False)
        unbegun = [p for p in self.world.places if not p.began]
        if unbegun:
            self._do(self.world.begin_again, unbegun[0], _of(fault, local=unbegun[0].local))
        elif place is not None:
            self._do(self.world.resume, place, back, lr, _of(fault, local=place.local))
        else:
            self.record(None, which, 2, True)

    @rule(fault=FAULTS, which=_SOME, back=st.sampled_from([0, 0, 1, 2, 9]), lr=st.sampled_from([0.1, 0.05]))
    def resume(self, fault, which, back, lr):
        if self._place(which, live=False) is not None:
            self._go_on(which, back, lr, fault)
        else:
            self.end("stop" if lr == 0.1 else "close", fault, which)

    @rule(which=_SOME, back=st.sampled_from([0, 0, 1, 2]))
    def resume_well(self, which, back):
        self.resume(None, which, back, 0.05)

    @rule(how=st.sampled_from(["close", "stop"]), fault=FAULTS, which=_SOME)
    def end(self, how, fault, which):
        place = self._place(which, live=True)
        if place is not None:
            self._do(self.world.end, place, how, _of(fault, local=place.local))

    @rule()
    def kill(self):
        self._do(self.world.kill)

    @rule(drawn=st.integers(0, 2**32))
    def power(self, drawn):
        self._do(self.world.power, random.Random(drawn).randrange)

    @rule(which=_SOME)
    def fork(self, which):
        idle = [p for p in self.world.places if p.began and p.local and p.live is None]
        if idle and len(self.world.places) < 3:
            self._do(self.world.fork, idle[which % len(idle)])

    @rule(fault=FAULTS, which=_SOME)
    def read(self, fault, which):
        place = self._place(which)
        if place is not None:
            self._do(self.world.read, place, _of(fault, local=place.local))

    @rule(fault=FAULTS, which=_SOME, s=st.integers(0, 9), opened=st.booleans())
    def read_on(self, fault, which, s, opened):
        """By a reader that stays open; or another one is opened."""
        place, readers = self._place(which), self.world.readers
        if readers and not (opened and len(readers) < 3):
            number = which % len(readers)
            self._do(self.world.read_on, number, s, _of(fault, local=readers[number][0].local))
        elif place is not None:
            self._do(self.world.open_reader, place)

    @rule(fault=FAULTS, which=_SOME)
    def attribute(self, fault, which):
        some = [p for p in self.world.places if p.floor]
        if some and self._asked < 2 and which % 3 == 0:  # the one that takes long
            self._asked += 1
            self._do(self.world.attribute, some[which % len(some)], _of(fault, local=True))  # results lie here

    @rule(fault=FAULTS, number=st.integers(0, 3), local=st.booleans())
    def import_checkpoints(self, fault, number, local):
        unfinished = [entry for entry in self.world.imports if not entry[2]]
        if unfinished or len(self.world.imports) < 2:
            here = local if not unfinished else "://" not in unfinished[0][0]
            self._do(self.world.import_checkpoints, number, local=local, fault=_of(fault, local=here))

    def _last_look(self):
        """Whatever happened: all that was begun goes on, and all that was promised is there."""
        world = self.world
        for place in world.places:
            if place.live is not None:
                world.end(place, "stop")
            if not place.began:
                world.begin_again(place)
                if place.live is not None:
                    world.end(place, "close")
            world.read(place)
            world.read_results(place)
            world.resume(place, 0, 0.1)
            world.record(place, 1, flush=True)
            world.end(place, "close")
            world.read(place)
        for entry in world.imports:
            world.check_import(*entry)
        if not all(entry[2] for entry in world.imports):
            world.import_checkpoints(0, local=True)

    def teardown(self):
        try:
            self._do(self._last_look)
        finally:
            type(self).driven += 1
            type(self).injected.update(self.world.faults.injected)
            self.world.close()
            self._patch.undo()
            self._folder.cleanup()
