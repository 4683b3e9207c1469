"""Files of the pages that are shipped with the package: only what is listed by name can be asked for."""

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "static"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
}


@dataclass(frozen=True)
class StaticFile:
    path: Path
    content_type: str

    @classmethod
    def named(cls, name: str) -> "StaticFile":
        """The one of that name under `static/`. Its suffix has to be one of those known here."""
        path = _FOLDER / name
        return cls(path, _TYPES[path.suffix])
