"""The documentation page: Swagger UI, shipped with the package, so that it works with no internet.

Owns the list of static files (nothing else under `static/` can be asked for) and the headers of the page. Addresses are
relative, so the page works below a prefix too.
"""

from dataclasses import dataclass
from pathlib import Path

_STATIC = Path(__file__).parent / "static"

PAGE = b"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>DashInfer API</title>
<link rel="icon" type="image/png" href="docs/favicon.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""

# Swagger UI sets style attributes while it runs and draws its icons from data: addresses; everything else comes from us.
PAGE_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


@dataclass(frozen=True)
class StaticFile:
    path: Path
    content_type: str


FILES = {
    "swagger-ui-bundle.js": StaticFile(_STATIC / "swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
    "swagger-ui.css": StaticFile(_STATIC / "swagger-ui.css", "text/css; charset=utf-8"),
    "start.js": StaticFile(_STATIC / "start.js", "text/javascript; charset=utf-8"),
    "favicon.png": StaticFile(_STATIC / "favicon.png", "image/png"),
}

FILE_HEADERS = {"cache-control": "max-age=3600", "x-content-type-options": "nosniff"}
OPEN_PATHS = ("/docs", *(f"/docs/{name}" for name in FILES))
