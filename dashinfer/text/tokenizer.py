"""`Tokenizer`: text to token ids and back.

Owns the reading of a `tokenizer.json` and the way a token becomes bytes. Knows nothing of chat templates, stop strings or
streams. Objects do not change after construction (but for a cache that any thread may fill) and are safe to share between
threads. Encoding releases the GIL: 100,000 characters take tens of milliseconds, so run long texts in a thread.

Decoding is done here, on bytes, and not by the library: a token's bytes do not depend on its neighbours, which makes decoding
incremental (see `dashinfer.text.detokenizer`) with the same result as decoding all at once.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import tokenizers

from dashinfer.errors import UnsupportedModel
from dashinfer.sources import ModelSource, TokenizerFiles

# How a vocabulary spells bytes: GPT-2's printable stand-ins, or SentencePiece's "▁" for a space and <0xNN> for a byte.
Spelling = Literal["byte_level", "sentencepiece"]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def byte_alphabet() -> dict[int, str]:
    """Byte to the printable character that stands for it in a byte-level vocabulary (GPT-2, "Language Models are Unsupervised
    Multitask Learners"): printable Latin-1 stands for itself, the rest is counted up from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


_BYTES_OF = {ord(character): byte for byte, character in byte_alphabet().items()}


def token_content(value: Any) -> str | None:
    """A special token's text from tokenizer_config.json: a string, or an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _spelling(decoder: Mapping[str, Any] | None) -> tuple[Spelling, bool] | None:
    """The vocabulary's spelling and whether a text's first space is dropped, from the decoder's description."""
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return "byte_level", False
    if "Metaspace" in kinds:
        return "sentencepiece", any(step.get("prepend_scheme") != "never" for step in steps if step["type"] == "Metaspace")
    if {"Replace", "Fuse"} <= kinds:
        return "sentencepiece", any(step["type"] == "Strip" and step.get("start", 0) > 0 for step in steps)
    return None


class Tokenizer:
    """Text to ids and back.

    Attributes:
        vocab_size: number of tokens. Ids may have gaps and logits may be padded, so the model's own size bounds ids.
        eos_token_ids: every id that ends a turn, sorted.
        special_ids: ids that `skip_special_tokens` leaves out.
        special_tokens: `bos_token`, `eos_token` and so on as text, for the chat template.
        drops_first_space: the first space of a decoded text belongs to the spelling, not to the text (SentencePiece).
    """

    def __init__(self, files: TokenizerFiles, *, eos_token_ids: Iterable[int] = ()) -> None:
        """Raises: UnsupportedModel where the tokeniser's file cannot be used.

        Args:
            files: from a `ModelSource`.
            eos_token_ids: ends of a turn that the model's configuration names, beside the tokeniser's own `eos_token`.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(files.tokenizer_json))
        except Exception as error:  # the library raises bare Exceptions
            raise UnsupportedModel(f"{files.tokenizer_json} is not a tokeniser this build can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

        decoder = self._tokenizer.decoder
        spelling = _spelling(None if decoder is None else json.loads(decoder.__getstate__()))
        if spelling is None:
            raise UnsupportedModel(
                f"{files.tokenizer_json} is neither a byte-level nor a SentencePiece vocabulary; others cannot be decoded"
            )
        self._spelling, self.drops_first_space = spelling

        config = files.tokenizer_config
        self._add_configured_tokens(config)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token: entry.content for token, entry in added.items()}
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.special_tokens = {name: text for name in _TOKEN_NAMES if (text := token_content(config.get(name))) is not None}

        ends = set(eos_token_ids)
        if "eos_token" in self.special_tokens:
            eos = self._tokenizer.token_to_id(self.special_tokens["eos_token"])
            ends |= {eos} - {None}
        self.eos_token_ids = tuple(sorted(ends))
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_source(cls, source: ModelSource) -> "Tokenizer":
        """With the ends of a turn that generation_config.json names, or else config.json. Raises: UnsupportedModel."""
        for config in (source.generation_config, source.files.config, source.files.config.get("text_config")):
            if isinstance(config, Mapping) and (value := config.get("eos_token_id")) is not None:
                ends = value if isinstance(value, list) else [value]
                return cls(source.tokenizer, eos_token_ids=[token for token in ends if type(token) is int])
        return cls(source.tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text. Special tokens written in it become their ids, as in transformers."""
        # The batch call is the one that releases the GIL, and it skips character offsets.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD, ids outside of the vocabulary nothing."""
        skipped = self.special_ids if skip_special_tokens else ()
        text = b"".join([self.token_bytes(token) for token in ids if token not in skipped]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.drops_first_space else text

    def to_json(self) -> str:
        """As a tokenizer.json, with the tokens that were added to the file's own."""
        return self._tokenizer.to_str()

    def marker_id(self, text: str) -> int | None:
        """The token that a text is by itself, among those added to the vocabulary: a marker, never spelled otherwise."""
        token = self._tokenizer.token_to_id(text)
        return token if token in self._added else None

    def token_text(self, token: int) -> tuple[str, list[int]]:
        """One token as OpenAI's logprobs show it: its text (U+FFFD for half a character) and its bytes."""
        raw = self.token_bytes(token)
        return raw.decode("utf-8", "replace"), list(raw)

    def token_piece(self, token: int) -> str:
        """A token as the vocabulary spells it; "" for an id outside of it."""
        piece = self._tokenizer.id_to_token(token) if 0 <= token < 2**32 else None
        return piece or ""

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text, before a first space is dropped; b"" for an id outside of the vocabulary."""
        raw = self._bytes.get(token)
        if raw is None:
            raw = self._bytes[token] = self._find_bytes(token)
        return raw

    def _find_bytes(self, token: int) -> bytes:
        piece = self._added.get(token)
        if piece is None:
            piece = self._tokenizer.id_to_token(token) if 0 <= token < 2**32 else None
            if piece is None:
                return b""
            if self._spelling == "byte_level":
                try:
                    return bytes([_BYTES_OF[ord(character)] for character in piece])
                except KeyError:  # a token that was never spelled in the byte alphabet
                    return piece.encode("utf-8", "replace")
        elif self._spelling == "byte_level":
            return piece.encode("utf-8", "replace")
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode("utf-8", "replace")

    def _add_configured_tokens(self, config: Mapping[str, Any]) -> None:
        """Older checkpoints name added tokens in tokenizer_config.json alone."""
        missing = []
        for entry in (config.get("added_tokens_decoder") or {}).values():
            if isinstance(entry, Mapping) and isinstance(entry.get("content"), str):
                flags = {name: bool(entry[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in entry}
                if self._tokenizer.token_to_id(entry["content"]) is None:
                    missing.append(tokenizers.AddedToken(entry["content"], special=bool(entry.get("special")), **flags))
        if missing:
            self._tokenizer.add_tokens(missing)
