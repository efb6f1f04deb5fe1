"""Marks infeasible trials in optuna-dashboard's list of trials, where it calls them "Complete".

Owns the small script added to the dashboard's page and the address it reads.  Does not own the dashboard; see
``hpo.search.dashboard``.  The dashboard's own plots already show infeasible trials in grey.  If a future dashboard has
another list, the script finds nothing to change.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from hpo.study import is_feasible

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

ADDRESS, SCRIPT_ADDRESS = "/hpo/infeasible", "/hpo/marks.js"
TAG = f'<script defer src="{SCRIPT_ADDRESS}"></script>'  # no inline script: the page's policy forbids them
REFRESH_MS = 5000
SCRIPT = """(() => {
  let marked = new Set(), study = "";
  const mark = () => {
    const own = (location.pathname.match(/studies\\/(\\d+)/) || [])[1] || "";
    if (own !== study) { study = own; marked = new Set(); read(); }
    for (const chip of document.querySelectorAll(".MuiChip-label")) {
      const box = chip.parentElement.parentElement.parentElement;
      const found = box && box.textContent.match(/^Trial (\\d+)(?!\\d)/);
      if (found && marked.has(Number(found[1])) && chip.textContent === "Complete") {
        chip.firstChild.nodeValue = "Infeasible";
        chip.parentElement.style.cssText = "color: #757575; border-color: #757575";
      }
    }
  };
  const read = async () => {
    if (!study) return;
    const answer = await fetch("ADDRESS?study=" + study).catch(() => null);
    if (answer && answer.ok) { marked = new Set(await answer.json()); mark(); }
  };
  new MutationObserver(mark).observe(document.documentElement, {childList: true, subtree: true});
  setInterval(read, REFRESH);
})();
""".replace("ADDRESS", ADDRESS).replace("REFRESH", str(REFRESH_MS))

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def with_marks(app: Wsgi, storage: BaseStorage) -> Wsgi:
    """The dashboard's WSGI application with the script in its page and an address that lists infeasible trials."""

    def marked(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("PATH_INFO") == ADDRESS:
            return _answer(start_response, _infeasible(environ, storage), "application/json")
        if environ.get("PATH_INFO") == SCRIPT_ADDRESS:
            return _answer(start_response, SCRIPT, "text/javascript")
        said: list[Any] = []

        def held(status: str, headers: list[tuple[str, str]], info: Any = None) -> None:
            said[:] = [status, headers, info]

        if "dashboard" not in str(environ.get("PATH_INFO")):
            return app(environ, start_response)
        environ.pop("HTTP_IF_MODIFIED_SINCE", None)  # the page is not the file on disk
        environ.pop("HTTP_ACCEPT_ENCODING", None)
        body = b"".join(app(environ, held))
        status, headers, info = said
        kinds = {name.lower(): value for name, value in headers}
        if status.startswith("200") and kinds.get("content-type", "").startswith("text/html"):
            body = body.replace(b"</head>", TAG.encode() + b"</head>", 1)
            headers = [(k, v) for k, v in headers if k.lower() not in ("content-length", "last-modified")]
            headers += [("Content-Length", str(len(body))), ("Cache-Control", "no-store")]
        start_response(status, headers, info)
        return [body]

    return marked


def _infeasible(environ: dict[str, Any], storage: BaseStorage) -> str:
    asked = urllib.parse.parse_qs(str(environ.get("QUERY_STRING", ""))).get("study", [""])[0]
    try:
        trials = storage.get_all_trials(int(asked), deepcopy=False)
    except (KeyError, ValueError):
        trials = []
    return json.dumps([trial.number for trial in trials if not is_feasible(trial)])


def _answer(start_response: Callable[..., Any], text: str, kind: str) -> Iterable[bytes]:
    body = text.encode()
    start_response("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body)))])
    return [body]
