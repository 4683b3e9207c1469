"""`data:` URIs (RFC 2397): the bytes that they hold. The media type is not read: it may lie."""

import binascii
import re
from urllib.parse import unquote_to_bytes

from dashinfer.errors import MediaError

_MAX_HEAD = 1024  # characters before the comma
_MAX_ESCAPED = 2**20  # characters of a percent-encoded URI
_PIECE = 256 * 1024  # characters decoded at a time: other threads run between two pieces
_BASE64 = re.compile(r".*;\s*base64\s*", re.IGNORECASE | re.DOTALL)
_SPACE = " \t\n\f\r"


def decode_data_uri(uri: str, max_bytes: int) -> bytes:
    """The bytes of a `data:` URI, base64 (padding may be missing, white space is skipped) or percent-encoded.

    Raises:
        MediaError: not such a URI, or more than `max_bytes` bytes.
    """
    if not uri.isascii():
        raise MediaError("its data: URI has a character that is not ASCII; percent-encode it")
    comma = uri.find(",", 0, _MAX_HEAD)
    if comma < 0:
        raise MediaError("its data: URI has no comma before the data")
    in_base64 = _BASE64.fullmatch(uri, 0, comma) is not None
    if in_base64 and uri.find("%", comma) < 0:
        return _decode_base64(uri, comma + 1, max_bytes)
    if len(uri) > _MAX_ESCAPED:  # un-escaping is slow, and takes many times its length in memory
        raise MediaError(f"its data: URI is percent-encoded and longer than {_MAX_ESCAPED} characters; use base64")
    content = unquote_to_bytes(uri[comma + 1 :])
    if in_base64:
        return _decode_base64(content.decode("latin-1"), 0, max_bytes)
    if len(content) > max_bytes:
        raise _too_large(max_bytes)
    return content


def _decode_base64(text: str, start: int, max_bytes: int) -> bytes:
    end = len(text)
    padding = 0
    while end > start and text[end - 1] in _SPACE + "=":
        end -= 1
        padding += text[end] == "="
    if padding > 2:
        raise _not_base64()
    content = bytearray()
    rest = ""  # digits that make no whole group of four yet
    try:
        for place in range(start, end, _PIECE):
            digits = rest + "".join(text[place : min(place + _PIECE, end)].split())
            whole = len(digits) // 4 * 4
            piece = binascii.a2b_base64(digits[:whole], strict_mode=True)
            if len(piece) != whole // 4 * 3:  # padding, and text after it
                raise _not_base64()
            content += piece
            rest = digits[whole:]
            if len(content) > max_bytes:
                raise _too_large(max_bytes)
        content += binascii.a2b_base64(rest + "=" * (-len(rest) % 4), strict_mode=True)
    except ValueError:  # binascii.Error, and what is not ASCII once decoded
        raise _not_base64() from None
    if len(content) > max_bytes:
        raise _too_large(max_bytes)
    return bytes(content)


def _not_base64() -> MediaError:
    return MediaError("its data: URI is not valid base64")


def _too_large(max_bytes: int) -> MediaError:
    return MediaError(f"it is larger than {max_bytes} bytes")
