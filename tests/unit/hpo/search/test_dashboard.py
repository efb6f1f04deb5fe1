"""The dashboard's address: every way to write this machine, the study that is there, names that cannot act."""

from __future__ import annotations

import queue
import socket
import threading
import urllib.request
from pathlib import Path

import optuna
import pytest

from hpo.search.dashboard import is_loopback, serve
from hpo.study.folder import StudyFolder
from hpo.study.storage import create_study, open_storage
from trainer.errors import MachineError


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("example.org", False),
    ],
)
def test_which_hosts_are_this_machine_only(host: str, here: bool) -> None:
    assert is_loopback(host) == here


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here"))],
)
def test_the_address_that_is_said_shows_the_study(tmp_path: Path, host: str) -> None:
    folder = StudyFolder(tmp_path / "x\x1b[31m")
    folder.root.mkdir()
    first = create_study(folder, {})
    optuna.create_study(study_name="second", storage=first._storage)
    optuna.delete_study(study_name=first.study_name, storage=first._storage)
    said: queue.Queue[str] = queue.Queue()
    threading.Thread(target=serve, args=(folder, host, 0, said.put), daemon=True).start()
    text = said.get(timeout=60)
    assert "\x1b" not in text and text.startswith("dashboard of x[31m: http://")
    address = text.split()[3]
    assert address.endswith("/dashboard/studies/2")
    assert ("[::1]" in address) == (host == "::1")
    with urllib.request.urlopen(address.replace("/dashboard/studies/2", "/api/studies/2")) as answer:
        assert answer.status == 200


def test_the_warning_that_there_is_no_password_comes_before_anybody_can_come(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "x")
    folder.root.mkdir()
    open_storage(folder)
    said: list[str] = []
    with socket.create_server(("0.0.0.0", 0)) as server, pytest.raises(MachineError, match="cannot listen"):
        serve(folder, "0.0.0.0", server.getsockname()[1], said.append)
    assert len(said) == 1 and "no password" in said[0]


def test_the_dashboards_page_gets_the_script_that_marks_infeasible_trials(tmp_path: Path) -> None:
    """The list of the dashboard calls every told trial "Complete".  The script and its data come from this process."""
    from wsgiref.util import setup_testing_defaults

    import optuna_dashboard

    from hpo.search.marks import ADDRESS, SCRIPT_ADDRESS, with_marks
    from hpo.study.storage import open_storage
    from tests.recorded import recorded

    folder = recorded(tmp_path / "t", 5)
    storage = open_storage(folder)
    app = with_marks(optuna_dashboard.wsgi(storage), storage)

    def get(path: str, query: str = "") -> tuple[dict[str, str], str]:
        said: dict[str, str] = {}
        environ: dict[str, object] = {
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "HTTP_ACCEPT_ENCODING": "gzip",
        }
        setup_testing_defaults(environ)

        def start_response(status: str, headers: list[tuple[str, str]], info: object = None) -> None:
            said.update({"status": status, **dict(headers)})

        return said, b"".join(app(environ, start_response)).decode()

    said, page = get("/dashboard/studies/1")
    assert said["status"] == "200 OK" and f'<script defer src="{SCRIPT_ADDRESS}"></script></head>' in page
    assert (
        int(said["Content-Length"]) == len(page.encode())
        and "script-src 'self'" in said["Content-Security-Policy"]
    )
    assert ADDRESS in get(SCRIPT_ADDRESS)[1]
    assert get(ADDRESS, "study=1")[1] == "[3]"
    assert get(ADDRESS, "study=99")[1] == get(ADDRESS, "study=x")[1] == get(ADDRESS)[1] == "[]"
    assert '"study_name": "t"' in get("/api/studies")[1] or "t" in get("/api/studies")[1]
