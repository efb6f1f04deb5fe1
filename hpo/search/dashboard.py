"""optuna-dashboard: the sample grid and note of each trial, and the server.

Owns uploads, notes and the dashboard server for a study's database.  Does not compute the values it shows.

A trial has exactly one artifact, its grid: with SQLite the dashboard lists artifacts in random order, and its
gallery compares the same index over all trials.  Finished trials are read-only, so the grid is uploaded
before the result is reported to Optuna.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hpo.search.marks import with_marks
from hpo.study import (
    StudyFolder,
    TrialFolder,
    begun_study,
    database_errors,
    open_storage,
    set_system_attribute,
)
from hpo.terminal import beside_lines
from trainer.errors import MachineError
from trainer.text import clean_text

if TYPE_CHECKING:
    import optuna

    from hpo.study import Result

_MARKDOWN = frozenset("\\`*_{}[]<>|#!&$~@")
LEGACY_CONSTRAINTS = (
    "constraints"  # optuna-dashboard 0.21 reads only this; Optuna 5 itself uses set_constraint
)


def artifact_store(folder: StudyFolder) -> optuna.artifacts.FileSystemArtifactStore:
    """The artifact store of the study.  Creates its folder: an upload marks the trial before it writes the file."""
    from optuna.artifacts import FileSystemArtifactStore

    folder.artifacts.mkdir(parents=True, exist_ok=True)
    return FileSystemArtifactStore(str(folder.artifacts))


def upload_grid(trial: optuna.Trial, study_folder: StudyFolder, folder: TrialFolder) -> str | None:
    """Upload the trial's grid as its only artifact, once.  Returns the artifact id, or None without a grid."""
    from optuna.artifacts import get_all_artifact_meta, upload_artifact

    store = artifact_store(study_folder)
    for known in get_all_artifact_meta(trial):
        if (study_folder.artifacts / known.artifact_id).is_file():
            return known.artifact_id
    if not folder.grid.is_file():
        return None
    return upload_artifact(
        artifact_store=store, file_path=str(folder.grid), study_or_trial=trial, mimetype="image/png"
    )


def note_text(result: Result, settings: Mapping[str, Any], grid_path: str | None) -> str:
    """A trial's note in Markdown."""
    lines = [f"![samples]({grid_path})", ""] if grid_path else []
    if result.state == "complete":
        lines.append(f"**score {result.value:.4f} ± {result.se:.4f}** ({result.n_images} images)")
        if result.objective is not None and result.objective < 0:
            lines += ["", f"objective {result.objective:.4f}: what the sampler is told where the score is 0"]
        lines.append("")
        lines.append(
            f"prompt following {result.prompt_following:.3f}, likeness {result.likeness:.3f} "
            f"(CLIP text {result.clip_t:.4f}, image {result.clip_i:.4f})"
        )
        lines += _safety(result)
        for line in beside_lines(result.beside):
            lines += ["", f"extra metrics: {_plain(line)}"]
    else:
        reason = _plain(result.reason.replace("_", " "))
        lines.append(f"**{result.state}: {reason}** – {_plain(result.message)}")
        if result.state == "infeasible":
            lines += [
                "",
                "The value is not a score. It tells the sampler that this trial is worse than all others.",
            ]
    if result.remedy:
        lines += ["", f"ran with {result.remedy} to fit into memory; this does not change the result"]
    return "\n".join([*lines, *_settings_table(settings)])


def _safety(result: Result) -> list[str]:
    """Copy rate, diversity, class prior and strangeness, where they were measured."""
    figures = {
        "copy rate": result.copy_rate,
        "diversity": result.diversity,
        "prior": result.prior,
        "strangeness": result.strangeness,
    }
    known = [f"{name} {value:.3f}" for name, value in figures.items() if value is not None]
    return ["", ", ".join(known)] if known else []


def _settings_table(settings: Mapping[str, Any]) -> list[str]:
    rows = [f"| {_plain(name)} | {_plain(_short(value))} |" for name, value in settings.items()]
    return ["", "| setting | value |", "|---|---|", *rows]


def _plain(text: str) -> str:
    """Escape text for Markdown: nothing in it becomes an element, a link or a formula."""
    escaped = "".join("\\" + c if c in _MARKDOWN else c for c in clean_text(text))
    return escaped.replace("://", "\\://").replace("www.", "www\\.")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def publish(
    trial: optuna.Trial,
    study_folder: StudyFolder,
    result: Result,
    settings: Mapping[str, Any],
    warn: Callable[[str], None],
) -> None:
    """Upload grid and note of a trial, before its result is reported to Optuna.  An OSError only causes a warning."""
    import optuna_dashboard
    from optuna_dashboard.artifact import get_artifact_path

    try:
        artifact = upload_grid(trial, study_folder, study_folder.trial(result.number))
        path = get_artifact_path(trial, artifact) if artifact else None
        optuna_dashboard.save_note(trial, note_text(result, settings, path))
    except OSError as error:
        warn(f"the dashboard will not show trial {result.number}: {error.strerror}")


def publish_failure(
    trial: optuna.Trial, reason: str, settings: Mapping[str, Any], warn: Callable[[str], None]
) -> None:
    """Write the note of a trial that failed before it ran.  An OSError only causes a warning."""
    import optuna_dashboard

    try:
        lines = [f"**failed** – {_plain(reason)}", *_settings_table(settings)]
        optuna_dashboard.save_note(trial, "\n".join(lines))
    except OSError as error:
        warn(f"the dashboard will not show trial {trial.number}: {error.strerror}")


def mark_infeasible(trial: optuna.Trial, amounts: Mapping[str, float]) -> None:
    """Store constraints in both forms, for Optuna 5 and for the dashboard.  Above 0 means violated."""
    known = trial.constraints
    for key, amount in amounts.items():
        if key not in known:
            trial.set_constraint(key, amount)
    set_system_attribute(trial, LEGACY_CONSTRAINTS, list(amounts.values()))


def study_note(study: optuna.Study, text: str) -> None:
    import optuna_dashboard

    optuna_dashboard.save_note(study, text)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def serve(folder: StudyFolder, host: str, port: int, say: Callable[[str], None]) -> None:
    """Run the dashboard until Ctrl-C.  Works while a search runs: it has its own database connection."""
    import socket
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

    import optuna
    import optuna_dashboard

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = begun_study(folder)  # a server has the studies of other folders, too
    storage = open_storage(folder)
    with database_errors(folder):
        number = None if study is None else storage.get_study_id_from_name(study.study_name)
    app = with_marks(optuna_dashboard.wsgi(storage, artifact_store=artifact_store(folder)), storage)

    class Server(ThreadingMixIn, WSGIServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    class Quiet(WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    if not is_loopback(host):
        say(
            f"warning: {clean_text(host)} is reachable from other machines, and the dashboard has no password: "
            "anyone who can reach it can finish and delete trials"
        )
    try:
        server = make_server(host, port, app, server_class=Server, handler_class=Quiet)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MachineError(
            f"cannot listen on {host}:{port}: {reason}", "use another --port or --host"
        ) from None
    place = f"[{host}]" if ":" in host else host
    address = f"http://{place}:{server.server_port}/dashboard"
    if number is not None:
        address += f"/studies/{number}"
    say(f"dashboard of {clean_text(folder.name)}: {address}  (press Ctrl-C to stop)")
    try:
        server.serve_forever()
    finally:
        server.server_close()


def constraint_amounts(reason: str, reasons: tuple[str, ...]) -> dict[str, float]:
    """A constraint for every reason: 1 for the one that occurred, −1 for the others.  Feasible trials get
    all of them, too."""
    return {key: 1.0 if key == reason else -1.0 for key in reasons}
