"""Who scores the points of a study: this process, or processes of this machine."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import IO

from surgery.errors import BadSettings, SurgeryError
from surgery.files.digests import file_sha256
from surgery.measure.tasks import TaskScorer
from surgery.patient.locating import find_emergence
from surgery.patient.patient import Patient
from surgery.settings import Settings
from surgery.sweeping.plan import SCORES, Plan
from surgery.sweeping.queue import Ended, Parameters, Progress, SharedStudy, database_errors

logger = logging.getLogger(__name__)

# Seconds between two looks at what other workers do.
_LOOK = 0.5

Watch = Callable[[Progress], None]


def finish(plan: Plan, patient: Patient, shared: SharedStudy, jobs: int) -> None:
    """Have points scored until all of a study have ended, here or elsewhere.

    Args:
        plan: the sweep.
        patient: whose settings are swept.
        shared: the study.
        jobs: worker processes; with 1, this process works itself.
    """
    with database_errors(shared.url):
        start = shared.look()
        if start.ended:
            patient.reporter.say(f"{len(start.ended)} points are known from before")
        if start.finished:
            return
        left = start.running + len(start.waiting)
        with patient.reporter.bar("Sweeping", left) as advance:
            watch = _counting(len(start.ended), advance)
            if jobs == 1:
                _work(plan, patient, shared, watch)
            else:
                _employ(plan, shared, jobs, watch)


def serve() -> None:
    """The life of a worker process: an order on stdin, then work until the study has ended."""
    import torch  # not for those who only read what a sweep found

    plan, url, name, jobs = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    try:
        patient = Patient.admit(plan.common.model, plan.common.loading)
        with database_errors(url):
            shared = SharedStudy(url, name, plan.space, plan.common.seed)
            _work(plan, patient, shared, lambda _progress: None)
    except SurgeryError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _counting(known: int, advance: Callable[[int], None]) -> Watch:
    """Turns how far a study is into how much further it is than at the last look."""

    def watch(progress: Progress) -> None:
        nonlocal known
        advance(len(progress.ended) - known)
        known = len(progress.ended)

    return watch


def _work(plan: Plan, patient: Patient, shared: SharedStudy, watch: Watch) -> None:
    from surgery.measure.scoring import Scorer, Touched  # imports torch

    layer = _emergence_layer(plan, patient, shared)
    scorer = Scorer(patient, layer, plan.common, plan.text, _task_scorer(plan, patient, shared))
    weights = _weights(patient)
    if shared.fact("sha256 of the weight files", weights) != weights:
        raise BadSettings(
            "The study was made with other weights than those of "
            f"{patient.checkpoint.origin.name} here; give another --output, or another --study."
        )

    def settings(parameters: Parameters) -> Settings:
        return plan.point(parameters).settings(plan.common)

    def score(parameters: Parameters) -> Ended:
        others = [settings(one) for one in _companions(progress, parameters)]
        try:
            figures = asdict(scorer.score(settings(parameters), others))
        except Touched:
            raise
        except SurgeryError as error:
            return Ended(parameters, None, error=str(error))
        found = float(figures[SCORES[plan.score].figure])
        if math.isnan(found):
            words = "the model's answers are not numbers at these settings"
            return Ended(parameters, None, error=words)
        return Ended(parameters, found, figures)

    last: Parameters = {}
    while not (progress := shared.look()).finished:
        watch(progress)
        if not progress.waiting:
            time.sleep(_LOOK)  # the points that are left are with other workers
            continue
        last = shared.work(progress, score, _mask_of(last))
    watch(progress)
    scorer.require_untouched()


def _mask_of(parameters: Parameters) -> Parameters:
    return {name: value for name, value in parameters.items() if name != "fold"}


def _companions(progress: Progress, parameters: Parameters) -> list[Parameters]:
    """Points that are scored together with this one, those of the same mask first.

    All that wait; those of the same mask where other workers want the rest; none after a worker
    has died, as it must be seen which point kills them.
    """
    if progress.deaths:
        return []
    waiting = [one for one in progress.waiting if one and one != parameters]
    near = [one for one in waiting if _mask_of(one) == _mask_of(parameters)]
    return near if progress.running else [*near, *(one for one in waiting if one not in near)]


def _weights(patient: Patient) -> str:
    """sha256 over the weight files, which other workers must have too."""
    checkpoint, digest = patient.checkpoint, hashlib.sha256()
    for name in sorted(checkpoint.weight_files):
        digest.update(file_sha256(checkpoint.folder / name).encode())
    return digest.hexdigest()


def _emergence_layer(plan: Plan, patient: Patient, shared: SharedStudy) -> int:
    layer = plan.common.layer if plan.common.layer is not None else shared.fact("emergence layer")
    if layer is None:
        emergence = find_emergence(patient)
        patient.reporter.show(emergence)
        layer = shared.fact("emergence layer", emergence.require())
    return int(layer)


def _task_scorer(plan: Plan, patient: Patient, shared: SharedStudy) -> TaskScorer | None:
    if plan.tasks is None:
        return None
    patient.reporter.say("Running the tasks on the model as it is")
    tasks = TaskScorer(plan.tasks, patient)
    if shared.fact("sha256 of the documents", tasks.documents) != tasks.documents:
        raise BadSettings("The study was made with other documents of the same tasks.")
    return tasks


def _employ(plan: Plan, shared: SharedStudy, jobs: int, watch: Watch) -> None:
    """Processes of this machine work on the study until all points have ended."""
    with tempfile.TemporaryFile("w+") as errors, _workers(plan, shared, jobs, errors) as workers:
        while not (progress := shared.look()).finished:
            watch(progress)
            if all(worker.poll() is not None for worker in workers):
                break
            time.sleep(_LOOK)
        else:
            watch(progress)
        codes = [worker.wait() for worker in workers]
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if line.strip()]
    if not shared.look().finished:
        reason = said[-1] if said else f"exit codes {', '.join(str(code) for code in codes)}"
        raise SurgeryError(f"All workers of the sweep stopped before its end: {reason}")


@contextmanager
def _workers(
    plan: Plan, shared: SharedStudy, jobs: int, errors: IO[str]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Worker processes, which end with this block, and with this process whatever ends it."""
    found: list[subprocess.Popen[bytes]] = []
    program = f"from {__name__} import serve; serve()"
    try:
        for number in range(jobs):
            common = replace(plan.common, device=_device(plan.common.device, number))
            order = (replace(plan, common=common), shared.url, shared.name, jobs)
            worker = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            found.append(worker)
            logger.info("worker %d is process %d", number, worker.pid)
            assert worker.stdin is not None
            # By the pipe, not by the command line: a storage's URL may hold a password.
            worker.stdin.write(pickle.dumps(order))
            worker.stdin.flush()
        yield found
    finally:
        for worker in found:
            worker.terminate()
            worker.wait()


def _device(given: str | None, number: int) -> str | None:
    """The device of a worker: the given one, else one each as far as there are several."""
    import torch  # not for those who only read what a sweep found

    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if given is None and count > 1 else given


def _end_with_parent() -> None:
    """The pipe closes when the parent ends, however it ends.

    It is read past Python's buffer, whose lock the interpreter wants when this process ends.
    """
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)
