"""What other programs leave in a folder of images: hidden files, thumbnails, recycle bins, previews.

One rule for every command that reads a folder. It names what is never an image of the user's; conflict copies of
Dropbox or Syncthing are images, and stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.data.captions import shown
from trainer.data.images import IMAGE_EXTENSIONS

# Names in lower case. NAS: Synology (@eaDir, #recycle, #snapshot), QNAP (@Recycle, @Recently-Snapshot); archives made
# on macOS (__MACOSX); Windows ($RECYCLE.BIN, RECYCLER, System Volume Information); Linux (lost+found).
_NAMES = frozenset({
    "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "__macosx", "__pycache__",
    "$recycle.bin", "recycler", "system volume information", "lost+found", "network trash folder", "temporary items",
    "thumbs.db", "ehthumbs.db", "desktop.ini",
})  # fmt: skip
NAMED = 12  # names in the note
_THUMBNAIL = re.compile(r"(syno(photo|file)_thumb_.*|.*\.thumb(nail)?\.\w+)", re.IGNORECASE)


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is another program's: hidden (``._0.png``, ``.DS_Store``), a thumbnail, a
    recycle bin, an owner file of Office (``~$…``)."""
    return name.startswith((".", "~$")) or name.lower() in _NAMES or _THUMBNAIL.fullmatch(name) is not None


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, without litter, sorted by name."""
    return sorted(path for path in folder.iterdir() if not is_litter(path.name))


def litter_notes(folders: Iterable[Path]) -> list[str]:
    """One line that names the litter in these folders which looks like images or folders of images; none if there
    is none."""
    names = sorted({path.name for folder in folders for path in _looks_used(folder)})
    if not names:
        return []
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [f"left out, hidden or made by other programs: {', '.join(map(shown, names[:NAMED]))}{more}"]


def _looks_used(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if is_litter(path.name) and (path.suffix.lower() in IMAGE_EXTENSIONS or _has_images(path)):
            yield path


def _has_images(folder: Path) -> bool:
    """Whether a folder of litter has anything that could be taken for an image, not deeper than two folders."""
    if not folder.is_dir():
        return False
    endings = (f"*{ending}" for ending in ("", "/*"))
    try:
        return any(p.suffix.lower() in IMAGE_EXTENSIONS for pattern in endings for p in folder.glob(pattern))
    except OSError:
        return False
