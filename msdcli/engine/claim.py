"""Who a run directory belongs to: its recipe, data and teacher, written down last and never under those at work."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

from msdcli import records
from msdcli.data.base import Dataset
from msdcli.engine.tracking.events import Report
from msdcli.engine.tracking.presence import Presence, attending
from msdcli.engine.train import precision
from msdcli.errors import LockedError
from msdcli.foreign import versions
from msdcli.recipe import Recipe
from msdcli.recipe.changes import differences
from msdcli.rundir import RunDir, begun_otherwise, discard, holder_of, lock, sweep_temporaries, write_json


@dataclass(frozen=True)
class Claim:
    """A command's hold on a run directory: begun before work is done for it, settled when all is known to fit.

    A run that was there before is not changed until then, and its recipe never while others are at work by it.
    """

    run: RunDir
    recipe: Recipe
    presence: Presence
    command: dict[str, Any]  # what run.json is to say of it; empty where it says so already

    @classmethod
    def begin(
        cls,
        run: RunDir,
        recipe: Recipe,
        data: Dataset,
        report: Report,
        stack: contextlib.ExitStack,
        *,
        student: int | None,
        same_data: bool = True,
    ) -> Claim:
        """Take a free directory for the recipe, or check that a run may go on by it. UserError where it may not.

        A run that has made nothing yet is begun anew where recipe or data are others now.
        """
        run.check(recipe)  # before even a lock is written there
        if student is not None and (holder := holder_of(run.student(student))):
            raise LockedError(f"student {student} is being worked on by {holder}", hint="`msd status RUN` shows it")
        described = {
            "versions": versions("msdcli", "torch"),
            "class_names": [] if recipe.has_prompts else data.class_names,
            "shape": list(data.shape),
        }
        with lock(run.root, "the run directory", wait=report):
            claim = cls(run, recipe, stack.enter_context(attending(run)), described)
            for folder in (run.root, *run.folders()):
                sweep_temporaries(folder)
            if run.recipe_file.exists() and not claim.takes_over(same_data):
                claim.may_change()
                return claim
            run.adopt(recipe)
            claim.note({})
            return replace(claim, command={})

    def takes_over(self, same_data: bool) -> bool:
        """Whether the run had made nothing by another recipe or data, as one that failed early: it is removed.
        UserError where somebody is at work on it.
        """
        run = self.run
        changed = not same_data or differences(run.recipe().dump(), self.recipe.dump())
        if not changed or run.begun():
            return False
        if not self.presence.alone():
            raise LockedError(
                f"{run.root} is being worked on by {run.who_is_at_work()}, by another recipe: nothing was changed",
                hint="wait for it, or give the run another name (name=...)",
            )
        for made in (run.teacher, run.classifier, run.prompts, run.record_file):
            discard(made)
        self._forget_what_was_decided()
        return True

    def _forget_what_was_decided(self) -> None:
        """Remove what was divided, searched, counted and told of a teacher before students began."""
        run = self.run
        found = run.searched(), *run.root.glob("student-*.json")  # of all students, or of those of each size
        for made in (run.partition, *found, run.flops_file, run.metrics / "teacher", run.samples / "teacher.png"):
            discard(made)

    def may_change(self) -> bool:
        """Whether the run's recipe is to be written anew. UserError where others are at work by the one that is there.

        What training does not depend on waits for another time.
        """
        self.run.check(self.recipe)
        old, new = self.run.recipe().dump(), self.recipe.dump()
        if old == new or self.presence.alone():
            return old != new
        if old["stages"] != new["stages"]:
            raise LockedError(
                f"{self.run.root} is being worked on by {self.run.who_is_at_work()}, with other stages: "
                "nothing was changed",
                hint="wait for it, or stop it; then the same command goes on",
            )
        return False

    def settle(self, made_from: dict[str, str], version: int) -> None:
        """Note in run.json what the run is made from, by fingerprints of a version. UserError where it was begun with
        something else.
        """
        with lock(self.run.root, "the run directory", wait=lambda _: None):
            known = records.run(self.run.record_file) if self.run.record_file.exists() else {}
            for what, sha256 in made_from.items():
                if known.get(what, sha256) == sha256:
                    continue
                if what == "data" or self.run.begun() or not self.presence.alone():
                    raise begun_otherwise(self.run, what)
                self._forget_what_was_decided()  # by a teacher in whose place a better one was put
                write_json(self.run.record_file, {k: v for k, v in known.items() if k != precision.KEY})
            if self.may_change():
                self.run.adopt(self.recipe)
            self.note(made_from | {"fingerprints": version})

    def note(self, made_from: dict[str, Any]) -> None:
        """Write this command and what the run is made from into run.json; hold the run's lock."""
        known = records.run(self.run.record_file) if self.run.record_file.exists() else {"commands": []}
        if self.command:
            known["commands"].append({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "line": sys.argv})
        write_json(self.run.record_file, known | self.command | made_from)
