"""Vocabularies go into GGUF metadata as llama.cpp's converter writes them, and must come out as the same tokeniser."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from dashinfer.sources import TokenizerFiles
from dashinfer.sources.gguf_tokenizer import adds_bos, tokenizer_json
from dashinfer.text.tokenizer import Tokenizer

CORPUS = Path(__file__).read_text("utf-8").splitlines()
ALPHABET = "ab '1 23\n\té你👩.!?<|>A_🙂٣½sS'tTHELLO Ünïcode e\u0301 \r\n"
SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>"]

# The patterns as their models' own tokenizer.json files have them.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), byte_level])


def texts() -> list[str]:
    generator = random.Random(1)
    made = ["".join(generator.choices(ALPHABET, k=generator.randint(0, 40))) for _ in range(300)]
    return [*CORPUS, *made, "<|im_start|>user\nhi<|im_end|>", "I'LL we'Re", "12345 6", "a  b   1"]


def ours(metadata: dict[str, Any], directory: Path) -> Tokenizer:
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json(metadata)))
    return Tokenizer(TokenizerFiles(directory / "tokenizer.json"))


@pytest.mark.parametrize(
    ("name", "pre_tokenizer", "normalizer", "whole_words"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False), None, False),
        (
            "smollm",
            pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            None,
            False,
        ),
        ("llama-bpe", split(LLAMA3), None, True),
        ("qwen2", split(QWEN2), normalizers.NFC(), False),
        ("tekken", split(TEKKEN), None, True),
    ],
)
def test_byte_level(
    tmp_path: Path,
    name: str,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None,
    whole_words: bool,
) -> None:
    oracle = tokenizers.Tokenizer(models.BPE(ignore_merges=whole_words))
    oracle.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        oracle.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    oracle.train_from_iterator(CORPUS, trainer)
    oracle.add_tokens(["<tool_call>"])
    pieces = sorted(oracle.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(oracle.to_str())["model"]["merges"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [piece for piece, _ in pieces],
        "tokenizer.ggml.token_type": [3 if piece in SPECIAL else 4 if piece == "<tool_call>" else 1 for piece, _ in pieces],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }
    tokenizer = ours(metadata, tmp_path)

    for text in [*texts(), "a <tool_call> b"]:
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False).ids, text
    assert tokenizer.special_ids == {0, 1, 2}


def sentencepiece(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's own rule: again and again join the neighbours whose union scores best, the leftmost of equals."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not joins:
            break
        _, i = min(joins)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    found = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def test_sentencepiece(tmp_path: Path) -> None:
    words = {"▁" + word[:end] for line in CORPUS for word in line.split() for end in range(1, len(word) + 1)}
    learnt = sorted((words | {word[1:] for word in words} | {"▁▁", "▁▁▁"}) - {""}, key=lambda word: (len(word), word))[:900]
    characters = sorted({character for word in learnt for character in word})
    longer = [word for word in learnt if len(word) > 1]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *longer, *characters]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(longer) + len(characters))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(longer) + len(characters))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = ours(metadata, tmp_path)

    for text in texts():
        if text and not any(special in text for special in pieces[:3]):
            assert tokenizer.encode(text) == sentencepiece(text, pieces, scores), text
            assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")
    assert tokenizer.encode("a", add_special_tokens=True)[0] == 1
    assert tokenizer.encode("</s>") == [2]


def test_begin_and_end_around_plain_text(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["<s>", "</s>", "a"], "tokenizer.ggml.token_type": [3, 3, 1],
        "tokenizer.ggml.merges": [], "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True,
    }  # fmt: skip

    assert ours(metadata, tmp_path).encode("a", add_special_tokens=True) == [0, 2, 1]
    assert ours(metadata, tmp_path).encode("a") == [2]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"tokenizer.ggml.model": "llama"}, True),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": False}, False),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}, False),
        ({"tokenizer.ggml.model": "gpt2"}, False),
    ],
)
def test_custom_of_the_begin_token(metadata: dict[str, Any], expected: bool) -> None:
    assert adds_bos(metadata) is expected


def test_unused_tokens_are_no_text(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "[PAD1]", "b"],
        "tokenizer.ggml.token_type": [1, 5, 1],
        "tokenizer.ggml.merges": [],
    }
    tokenizer = ours(metadata, tmp_path)

    assert tokenizer.decode([0, 1, 2]) == "ab"
