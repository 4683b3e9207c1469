"""The chat page: static files alone, which talk to the API as any other client does.

Owns the list of its files and the headers of the page. Addresses are relative, so the page works below a prefix too.
"""

from dashinfer.serving.static_files import StaticFile

PAGE = StaticFile.named("chat.html")
FILES = {name: StaticFile.named(name) for name in ("chat.css", "chat.js", "sse.js")}

# Trusted Types: no text of a model can become markup or script, even by a mistake in ours.
PAGE_HEADERS = {
    "content-type": PAGE.content_type,
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

FILE_HEADERS = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}  # page and script are of one version
OPEN_PATHS = ("/", *(f"/chat/{name}" for name in FILES))
