"""A `tokenizer.json` from the vocabulary in a .gguf file's metadata.

Owns the pre-tokenisers by their names in GGUF and how SentencePiece scores become merges. Knows nothing of files or caches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dashinfer.errors import UnsupportedModel

# Token types (ggml's `llama_token_type`).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level vocabulary wants text split before merging."""

    pattern: str | None = None  # None: GPT-2's
    single_digits: bool = False
    normalizer: str | None = None
    whole_words_first: bool = False  # a word that is a token is taken without merging
    add_bos: bool = False  # where the metadata does not say


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(single_digits=True)
_LLAMA3 = PreTokenizer(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", whole_words_first=True, add_bos=True)
_QWEN2_PATTERN = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
_TEKKEN = PreTokenizer(
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words_first=True,
    add_bos=True,
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "olmo": _GPT2,
    "phi-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "minerva-7b": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": PreTokenizer(_QWEN2_PATTERN, normalizer="NFC"),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2_PATTERN),
    "tekken": _TEKKEN,
}


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer.json.

    Raises:
        UnsupportedModel: no vocabulary, or one of a kind or with a pre-tokeniser that is not known here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UnsupportedModel("the GGUF file has no vocabulary")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise UnsupportedModel("the GGUF file is damaged: its tokens and token types differ in number")
    if kind == "gpt2":
        return _byte_level(metadata, tokens, types)
    if kind == "llama":
        return _sentencepiece(metadata, tokens, types)
    raise UnsupportedModel(f"the GGUF file has a tokeniser of the kind {kind!r}; gpt2 (byte-level BPE) and llama are supported")


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a plain text begins with the begin token: what the file says, or else the custom of its kind."""
    said = metadata.get("tokenizer.ggml.add_bos_token")
    if said is not None:
        return bool(said)
    if metadata.get("tokenizer.ggml.model") == "llama":
        return True
    pre = PRE_TOKENIZERS.get(metadata.get("tokenizer.ggml.pre") or "default")
    return pre is not None and pre.add_bos


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre") or "default"
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise UnsupportedModel(
            f"the GGUF file splits text by {name!r}, which is not known; known are {', '.join(PRE_TOKENIZERS)}"
        )
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise UnsupportedModel("the GGUF file has no merges for its byte-level vocabulary")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre.pattern is None}
    steps: list[dict[str, Any]] = [byte_level]
    if pre.pattern is not None:
        steps.insert(0, {"type": "Split", "pattern": {"Regex": pre.pattern}, "behavior": "Isolated", "invert": False})
    if pre.single_digits:
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    return _document(
        metadata,
        normalizer=pre.normalizer and {"type": pre.normalizer},
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder=byte_level,
        added_tokens=_added_tokens(tokens, types),
        model=_bpe(tokens, types, merges, ignore_merges=pre.whole_words_first),
    )


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UnsupportedModel("the GGUF file has no scores for its SentencePiece vocabulary")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix") is not False
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", types.index(UNKNOWN) if UNKNOWN in types else None)
    return _document(
        metadata,
        normalizer={"type": "Sequence", "normalizers": [*([{"type": "Prepend", "prepend": "▁"}] if prefix else []), spaces]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        # In a vocabulary a space is "▁"; added tokens are looked for in the text as it was typed.
        added_tokens=_added_tokens([token.replace("▁", " ") for token in tokens], types),
        model=_bpe(
            tokens,
            types,
            _merges_by_score(tokens, types, scores),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else tokens[unknown],
        ),
    )


def _merges_by_score(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best; as a list of merges, that is all pairs by score.

    Pairs that give the same token keep the order of their parts' ids.
    """
    ids = {token: i for i, token in enumerate(tokens) if types[i] in (NORMAL, USER_DEFINED)}
    ranked = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], i, left, right))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": tokens[i], **flags, "special": kind != USER_DEFINED}
        for i, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) and tokens[i]
    ]


def _bpe(tokens: Sequence[str], types: Sequence[int], merges: Sequence[Any], **options: Any) -> dict[str, Any]:
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    return {"type": "BPE", "dropout": None, "unk_token": None, **options, "vocab": vocabulary, "merges": merges}


def _document(metadata: Mapping[str, Any], **parts: Any) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    begin = metadata.get("tokenizer.ggml.bos_token_id") if adds_bos(metadata) else None
    end = metadata.get("tokenizer.ggml.eos_token_id") if metadata.get("tokenizer.ggml.add_eos_token") else None
    text = {"Sequence": {"id": "A", "type_id": 0}}
    around = {
        token: {"id": tokens[token], "ids": [token], "tokens": [tokens[token]]} for token in (begin, end) if token is not None
    }
    single = [
        *([{"SpecialToken": {"id": tokens[begin], "type_id": 0}}] if begin is not None else []),
        text,
        *([{"SpecialToken": {"id": tokens[end], "type_id": 0}}] if end is not None else []),
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        **parts,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {entry["id"]: entry for entry in around.values()},
        },
    }
