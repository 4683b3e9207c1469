"""The documentation page: Swagger UI, shipped with the package, so that it works with no internet.

Owns the list of static files (nothing else under `static/` can be asked for) and the headers of the page. Addresses are
relative, so the page works below a prefix too.
"""

from dashinfer.serving.static_files import StaticFile

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

FILES = {name: StaticFile.named(name) for name in ("swagger-ui-bundle.js", "swagger-ui.css", "start.js", "favicon.png")}

FILE_HEADERS = {"cache-control": "max-age=3600", "x-content-type-options": "nosniff"}
OPEN_PATHS = ("/docs", *(f"/docs/{name}" for name in FILES))
