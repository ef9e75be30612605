"""Histories of runs under faults, against a plain model of what must be there.

A :class:`World` holds runs, copies of them, readers that stay open, results and imports. Everything done to them may be
given a :class:`~support.failing_files.Fault`. What must be there afterwards is known from a dict of step -> what was
trained (:class:`~support.history_model.Place`), never from the library. Four things must not be
(:class:`~support.history_model.Violation`): what was promised is lost, what is read is wrong, an error is none of the
library's, a call does not return.
"""

from __future__ import annotations

import contextlib
import shutil
import traceback
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import torch

import explaind_core as explaind
from explaind_core.checkpoints.checkpoint_store import CheckpointStore, StoredCheckpoint
from explaind_core.errors import ExplaindError
from explaind_core.store import locate, remote_files, write_queue, writing_lock
from support.failing_files import FailingFiles, Faults, Killed
from support.history_model import SECONDS, SNAPSHOT_EVERY, TESTS, Hang, Place, Training, Violation, plain, within
from support.unreliable_storage import Unreliable


class World:
    """All runs of a history.

    Args:
        top: a folder.
        patch: pytest's MonkeyPatch.
    """

    def __init__(self, top, patch):
        self.top, self.faults, self.log = Path(top), Faults(), []
        self.files = FailingFiles(self.top, self.faults)
        self._held = contextlib.ExitStack()
        self._held.enter_context(self.files.installed(patch))
        patch.setattr(Unreliable, "faults", self.faults)
        patch.setattr(remote_files, "PAUSES", (0.0, 0.0, 0.0))
        patch.setattr(write_queue, "SMALL", 0)  # small files go through the thread, too
        self._locks, made = [], writing_lock.WritingLock.__init__

        def init(lock, *args, **kwargs):
            self._locks.append(lock)
            made(lock, *args, **kwargs)

        patch.setattr(writing_lock.WritingLock, "__init__", init)
        self.places, self.readers, self.imports, self.seed, self.hit = [], [], [], 0, False

    def close(self):
        self.faults.arm(None)
        self._dead()
        self._held.close()

    # ------------------------------------------------------------------ one call under a fault
    def attempt(self, what, call, fault=None, *, expected=()):
        """What a call does: ``(result, None)`` or ``(None, error)``; nothing else may come of it."""
        self.log.append(f"{what}{'' if fault is None else f' under {fault}'}")
        self.faults.arm(fault)
        try:
            with within(SECONDS):
                return call(), None
        except Killed as error:
            self.log.append("  killed")
            return None, error
        except Hang:
            raise self.violation("hang", what) from None
        except ExplaindError as error:
            self.log.append(f"  {type(error).__name__}: {error.what}")
            if not (self.faults.hit or any(words in error.what for words in expected)):
                raise self.violation("lost", f"{what}: {error}") from error
            return None, error
        except Violation:
            raise
        except Exception as error:
            if self.faults.dead:  # what a kill in another thread came to in this one
                return None, Killed()
            where = "".join(traceback.format_tb(error.__traceback__)[-6:])
            raise self.violation("raw", f"{what}: {type(error).__name__}: {error}\n{where}") from error
        finally:
            self.hit = self.faults.hit
            self.faults.arm(None)

    def violation(self, kind, what):
        return Violation(kind, what + "\n" + "\n".join(self.log))

    def _dead(self):
        """Whatever belonged to the process is gone; nothing is tidied up."""
        self.faults.dead = True
        for place in self.places:
            if place.live is not None:
                _, recorder = place.live
                recorder._detach()
                recorder._writer.queue._thread.shutdown()
                place.live = None
        for lock in self._locks:
            if lock._lock.is_locked:
                lock._lock.release(force=True)
        self._locks.clear()
        self.readers.clear()
        self.faults.dead = False

    def _over(self, place, error):
        """A recording that met an error."""
        if isinstance(error, Killed):
            self._dead()
        elif place.live is not None:
            _, recorder = place.live
            place.live = None
            self.attempt("stop", recorder.stop)

    # ------------------------------------------------------------------ recording
    def begin(self, *, local, durable, behind, fault=None):
        name = uuid4().hex
        path = str(self.top / "runs" / name / "run") if local else f"unreliable://{name}/run"
        place = Place(path, durable, behind)
        self.places.append(place)
        self.begin_again(place, fault)

    def _recorder(self, place, training, **options):
        return explaind.Recorder(
            place.path, training.model, training.optimizer, training.loss, snapshot_every=SNAPSHOT_EVERY,
            durable=place.durable, write_behind=place.behind, **options,
        )  # fmt: skip

    def begin_again(self, place, fault=None):
        training = Training()
        place.steps = {0: replace(training.stands(), ids=(), lr=0.0)}
        call = lambda: self._recorder(place, training)  # noqa: E731
        recorder, error = self.attempt(f"begin {self._short(place)}", call, fault, expected=["at this path already"])
        if error is None:
            place.live, place.began = (training, recorder), True
        elif isinstance(error, Killed):
            self._dead()
        elif not self.hit:  # it had begun when its end was not seen
            place.began = True

    def _short(self, place):
        where = "here" if place.local else "elsewhere"
        return f"run {self.places.index(place)} ({where}, {place.durable!r}, {place.behind})"

    def record(self, place, count, *, flush, fault=None):
        training, recorder = place.live
        first = recorder.steps
        done = []

        def call():
            for s in range(first + 1, first + count + 1):
                ids, inputs = training.step(s, self.seed, recorder)
                try:
                    training.optimizer.step()
                finally:  # it may have been written, whatever it says
                    place.steps[s] = training.stands(ids.tolist(), plain(inputs))
                done.append(s)
                recorder.log(seed=float(self.seed), number=float(s))
            if flush:
                recorder.flush()
                done.append("flushed")

        _, error = self.attempt(f"{count} steps of {self._short(place)}, seed {self.seed}", call, fault)
        if error is not None:
            for s in [s for s in place.steps if s > first + len(done) + 1]:
                del place.steps[s]
        flushed = bool(done) and done[-1] == "flushed"
        last = first + len([s for s in done if s != "flushed"])
        sure = last if flushed or not place.behind else max(0, last - place.behind - 1)
        place.floor = max(place.floor, sure)
        every = {"steps": 1, "snapshots": SNAPSHOT_EVERY}.get(place.durable)
        if every is not None:
            place.promised = max(place.promised, sure // every * every)
        if error is not None:
            self._over(place, error)

    def end(self, place, how, fault=None):
        """``close`` or ``stop``."""
        _, recorder = place.live
        _, error = self.attempt(f"{how} {self._short(place)}", getattr(recorder, how), fault)
        if error is None:
            place.live = None
            failed = recorder._writer.queue._error
            if how == "close" or failed is None:
                place.floor = max(place.steps)
            if how == "close":
                place.promised = place.floor
        else:
            self._over(place, error)

    def resume(self, place, back, lr, fault=None):
        """As an unattended loop does; ``back`` steps are taken back."""
        training, state = Training(), {}

        def call():
            until = "intact" if place.torn or back else None
            run = explaind.open_run(place.path, model=training.model, until=until)
            found = len(run.steps)
            self.check_length(place, found, run)
            state["from"] = k = max(0, found - back)
            run.restore(training.model, training.optimizer, k)
            self.same(place, training.stands().theta, place.steps[k].theta, f"theta restored to {k}")
            self.same(place, training.stands().momentum, place.steps[k].momentum, f"momentum restored to {k}")
            training.optimizer.param_groups[0]["lr"] = lr
            state["taken"] = True
            place.epoch += 1  # from here on steps may go
            place.floor, place.promised = min(place.floor, k), min(place.promised, k)
            return self._recorder(place, training, resume=k if until else True)

        what = f"resume {self._short(place)}{f', {back} back' if back else ''}"
        recorder, error = self.attempt(what, call, fault)
        if error is None:
            k = state["from"]
            place.steps = {s: step for s, step in place.steps.items() if s <= k}
            place.floor = place.promised = k
            place.live, place.torn = (training, recorder), False
            self.seed += 1
        elif isinstance(error, Killed):
            self._dead()

    # ------------------------------------------------------------------ what happens to it
    def kill(self):
        self.log.append("kill")
        self._dead()

    def power(self, draw):
        """Kills, and loses of all that is here and was not synced what is drawn."""
        self._dead()
        with self.files.off():
            changed = self.files.disk.fail(draw)
        self.log.append(f"power lost: {changed} files differ")
        self.faults.injected["power: lost"] += 1
        self.faults.injected["power: files not as written"] += changed
        for place in self.places:
            if place.local:
                place.floor, place.torn, place.epoch = place.promised, True, place.epoch + 1

    def fork(self, place):
        """A copy of the folder, which is waited for; it goes on apart."""
        self.log.append(f"fork {self._short(place)}")
        copy = replace(place, path=str(self.top / "runs" / uuid4().hex / "run"), steps=dict(place.steps), results=[])
        with self.files.off():
            Path(copy.path).parent.mkdir(parents=True)
            shutil.copytree(place.path, copy.path)
            self.files.disk.everything(Path(copy.path).parent)
        copy.promised = copy.floor
        self.places.append(copy)

    # ------------------------------------------------------------------ reading
    def same(self, place, found, expected, what):
        if found != expected:
            raise self.violation("wrong", f"{what} of {self._short(place)}: {found} for {expected}")

    def check_length(self, place, found, run=None):
        if found not in place.allowed():
            kind = "lost" if found < place.floor else "wrong"
            why = getattr(run, "first_damage", None)
            raise self.violation(kind, f"{found} steps of {self._short(place)}, for {place.allowed()}; {why}")

    def check_run(self, place, run, steps, only=None):
        """Whatever is read of the steps is what was trained."""
        for s in [0, *run.steps] if only is None else only:
            self.same(place, plain(run.theta(s)["weight"]), steps[s].theta, f"theta({s})")
            if s:
                batch = run.batch(s)
                self.same(place, tuple(batch.ids.tolist()), steps[s].ids, f"ids of step {s}")
                self.same(place, plain(batch.inputs), steps[s].inputs, f"inputs of step {s}")
                self.same(place, run.hyper(s)[0]["lr"], steps[s].lr, f"lr of step {s}")

    def check_metrics(self, place, run):
        found = run.metrics
        if "number" in found:
            numbers, steps = found.number.values.tolist(), found.step.values.tolist()
            self.same(place, numbers, [float(s) for s in steps], "logged numbers")

    def read(self, place, fault=None):
        """Open it and read everything."""

        def call():
            until = "intact" if place.torn else None
            run = explaind.open_run(place.path, until=until)
            self.check_length(place, len(run.steps), run)
            self.check_run(place, run, place.steps)
            if not place.torn:
                self.check_metrics(place, run)
            return run

        _, error = self.attempt(f"read {self._short(place)}", call, fault)
        if isinstance(error, Killed):
            self._dead()

    def open_reader(self, place):
        def call():
            run = explaind.open_run(place.path, until="intact" if place.torn else None)
            self.check_length(place, len(run.steps), run)
            return run

        run, _ = self.attempt(f"open a reader of {self._short(place)}", call)
        self.readers.append((place, run, dict(place.steps), place.epoch))

    def read_on(self, number, s, fault=None):
        """A reader that stayed open: what it saw when it was opened, or, where steps were taken back, an error."""
        place, run, steps, epoch = self.readers[number]
        s = min(s, len(run.steps))
        told = ["another continuation", "is missing", "cannot be read"] if epoch != place.epoch else []
        call = lambda: self.check_run(place, run, steps, [s])  # noqa: E731
        _, error = self.attempt(f"reader {number} reads step {s}", call, fault, expected=told)
        if isinstance(error, Killed):
            self._dead()

    # ------------------------------------------------------------------ results and imports
    def attribute(self, place, fault=None):
        """Ask into out=; what is there already goes on, and is in the end what it would have been without."""
        model = Training().model
        keep = ("step", "test")
        with self.files.off():
            run, error = self.attempt("open it", lambda: explaind.open_run(place.path, model=model, until=place.floor))
            if not run.steps:
                return
            expected = explaind.attribute(run, TESTS, keep=keep, progress=False).load()
        same = [entry for entry in place.results if entry[1].identical(expected)]
        out = same[0][0] if same else str(self.top / "results" / f"{uuid4().hex}.zarr")
        ask = lambda: explaind.attribute(run, TESTS, keep=keep, out=out, progress=False)  # noqa: E731
        found, error = self.attempt(f"attribute {self._short(place)}, {len(run.steps)} steps, out=", ask, fault)
        place.results = [entry for entry in place.results if entry[0] != out]
        finished = error is None or (bool(same) and same[0][2])
        place.results.append((out, expected, finished))
        if isinstance(error, Killed):
            self._dead()
        elif error is None:
            self.same(place, found.load().identical(expected), True, "result")

    def read_results(self, place):
        for out, expected, finished in place.results:
            if finished:
                found, _ = self.attempt("open a result", lambda out=out: explaind.open_result(out).load())
                self.same(place, found.identical(expected), True, "result as stored")

    def import_checkpoints(self, seed, *, local, fault=None):
        """Anew, or the one that was not finished."""
        unfinished = [entry for entry in self.imports if not entry[2]]
        if unfinished:
            path, states, _ = unfinished[0]
            self.imports.remove(unfinished[0])
        else:
            name = uuid4().hex
            path = str(self.top / "imports" / name) if local else f"unreliable://{name}/import"
            generator = torch.Generator().manual_seed(seed)
            states = [{"weight": torch.randn(1, 3, generator=generator, dtype=torch.float64)} for _ in range(3)]
        call = lambda: explaind.import_checkpoints(path, states, Training().model, progress=False)  # noqa: E731
        _, error = self.attempt("import checkpoints", call, fault, expected=["at this path already"])
        self.imports.append((path, states, error is None))
        if isinstance(error, Killed):
            self._dead()
        self.check_import(*self.imports[-1])

    def check_import(self, path, states, finished):
        def call():
            store = CheckpointStore(locate(path))
            labels = store.labels()
            return labels, [plain(StoredCheckpoint(store, i).read()["weight"]) for i in range(len(labels or ()))]

        half = [] if finished else ["half an import", "cannot be gone on with", "damaged"]
        found, _ = self.attempt("read an import", call, expected=half)
        if found is not None and (finished or found[0] is not None):
            expected = [0, 1, 2], [plain(state["weight"]) for state in states]
            if found != expected:
                raise self.violation("lost" if not found[1] else "wrong", f"import: {found} for {expected}")
