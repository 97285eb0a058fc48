"""Converting a Hub model into a repository, without downloading it."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.method.locate import Emergence
from surgery.models.anatomy import depth_of
from surgery.outputs.hub import Pushed
from surgery.outputs.hub_copy import HubCopy
from surgery.outputs.manifest import Manifest
from surgery.outputs.operation import decide
from surgery.outputs.plan import RemotePlan
from surgery.patient.locating import stream_model
from surgery.patient.patient import Patient
from surgery.patient.quantised import method_of
from surgery.patient.remote import KeptRanges
from surgery.patient.source import resolve_light
from surgery.reporter import SILENT, Reporter
from surgery.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A conversion that was made on the Hub.

    Attributes:
        plan: what was done, or would be.
        pushed: where it went; None after a dry run.
        manifest: None after a dry run.
        bytes_read: what was fetched from the Hub; nothing of what was in its cache.
        bytes_sent: what was sent there.
        bytes_total: of the model's weights.
    """

    plan: RemotePlan
    pushed: Pushed | None
    manifest: Manifest | None
    bytes_read: int
    bytes_sent: int
    bytes_total: int


def publish(
    model: str,
    repo: str,
    *,
    rate: float = Settings.rate,
    scope: str = Settings.scope,
    fold: str = Settings.fold,
    select: str = Settings.select,
    strength: float = Settings.strength,
    layer: int | None = Settings.layer,
    layers: tuple[int, ...] | None = Settings.layers,
    revision: str | None = Settings.revision,
    seed: int = Settings.seed,
    calibration: str | None = Settings.calibration,
    calibration_tokens: int = Settings.calibration_tokens,
    check_tokens: int = Settings.check_tokens,
    fixed: bool = Settings.fixed,
    max_degradation: float = Settings.max_degradation,
    force: bool = Settings.force,
    device: str | None = Settings.device,
    dtype: str = Settings.dtype,
    stream: bool | None = Settings.stream,
    trust_remote_code: bool = Settings.trust_remote_code,
    undo_file: bool = Settings.undo_file,
    include: tuple[str, ...] = Settings.include,
    form: str = Settings.form,
    public: bool = False,
    dry_run: bool = False,
    reporter: Reporter = SILENT,
) -> Published:
    """Convert a Hub model into a repository, copying on the server what stays as it is.

    Args:
        model: a Hub id (`name@revision`).
        repo: the repository to write.
        public: whether it is created public.
        dry_run: plan and stop.
        reporter: whom to tell.

    The others are the fields of `Settings`. The quality gate, which needs the whole model, is left
    out.

    Raises:
        BadSettings: for what only the whole model can tell.
        CopyRefused: where the files cannot be copied there; nothing is committed then.
    """
    settings = replace(Settings.gathered(locals()), push_to_hub=repo, check=False)
    kind = HubCopy(repo)
    checkpoint = resolve_light(model, settings.revision, reporter.say, settings.include)
    kind.accept(checkpoint, settings)
    settings.check_layers(depth_of(checkpoint.config))
    copied = None
    with tempfile.TemporaryDirectory(prefix="surgery-") as temporary:
        # The file that changes holds layers that the analysis has read by then.
        remote = checkpoint.remote
        if remote is not None:
            checkpoint = replace(checkpoint, remote=KeptRanges(remote, Path(temporary)))
        patient = Patient(
            checkpoint,
            settings.loading,
            reporter,
            traced=not method_of(checkpoint.config),
            dequantise=False,
        )
        operation = decide(patient, settings, locate=_streamed)
        plan = kind.plan(operation)
        reporter.show(plan)
        if not dry_run:
            copied = kind.write(plan, operation, public=public)
    return Published(
        plan,
        copied.pushed if copied else None,
        copied.manifest if copied else None,
        getattr(remote, "bytes_read", 0),
        copied.bytes_sent if copied else 0,
        checkpoint.size,
    )


def _streamed(patient: Patient) -> Emergence:
    return stream_model(patient).emergence
