import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from dashinfer.errors import UnsupportedModel
from dashinfer.sources import ModelSource, TokenizerFiles
from dashinfer.text.tokenizer import Tokenizer
from dashinfer.types import ModelFiles

TEXTS = [
    "",
    " ",
    "the cat",
    "  two  spaces ",
    "ñandú 你好 👩‍👩‍👧",
    "<|im_start|>user\nhi<|im_end|>",
    "a\r\n\tb\x00",
    "<tool_call>x",
]


def test_decodes_as_the_library_does(tokenizer: Tokenizer, byte_level_files: TokenizerFiles) -> None:
    oracle = tokenizer._tokenizer
    generator = random.Random(0)
    sequences = [tokenizer.encode(text) for text in TEXTS]
    # SentencePiece bytes that form no character are one U+FFFD a byte there, and by Unicode's rule here: no random ones.
    if not tokenizer.drops_first_space:
        sequences += [[generator.randrange(tokenizer.vocab_size) for _ in range(20)] for _ in range(300)]
    for ids in sequences:
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", [text for text in TEXTS if "<|" not in text and "<tool" not in text])
def test_round_trip_of_plain_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_special_tokens_in_text_are_special(byte_level: Tokenizer) -> None:
    (token,) = byte_level.encode("<|im_end|>")

    assert token in byte_level.special_ids
    assert byte_level.eos_token_ids == (token,)
    assert byte_level.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}


def test_added_tokens_are_not_special(byte_level: Tokenizer) -> None:
    (token,) = byte_level.encode("<tool_call>")

    assert token == byte_level.vocab_size - 1
    assert byte_level.decode([token]) == "<tool_call>"


def test_half_a_character(tokenizer: Tokenizer) -> None:
    first = next(token for token in tokenizer.encode("🙂") if tokenizer.token_bytes(token)[:1] == b"\xf0")

    assert tokenizer.token_text(first) == ("\ufffd", list(tokenizer.token_bytes(first)))
    assert tokenizer.decode([first]) == "\ufffd"


def test_ids_outside_of_the_vocabulary_are_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size, 10**6]) == ""
    assert tokenizer.token_text(10**6) == ("", [])


def test_token_text_keeps_the_space(sentencepiece: Tokenizer) -> None:
    (token,) = {sentencepiece._tokenizer.token_to_id("▁the")}

    assert sentencepiece.token_text(token) == (" the", list(b" the"))


def test_ends_come_from_generation_config_first(byte_level_files: TokenizerFiles, byte_level: Tokenizer) -> None:
    files = ModelFiles(name="m", format="safetensors", weights=(), config={"eos_token_id": 7})
    own = byte_level.eos_token_ids

    assert Tokenizer.from_source(ModelSource(files, byte_level_files, {"eos_token_id": [5, 6]})).eos_token_ids == (*own, 5, 6)
    assert Tokenizer.from_source(ModelSource(files, byte_level_files)).eos_token_ids == (*own, 7)


@pytest.mark.parametrize("value", [["</s>", None, [1], 5, True], 5])
def test_ends_of_a_turn_that_are_no_ids_are_left_out(byte_level_files: TokenizerFiles, value: object) -> None:
    files = ModelFiles(name="m", format="safetensors", weights=(), config={"eos_token_id": value, "text_config": "none"})
    own = Tokenizer(byte_level_files).eos_token_ids

    assert Tokenizer.from_source(ModelSource(files, byte_level_files)).eos_token_ids == (*own, 5)


def test_tokens_that_only_the_configuration_names(byte_level_files: TokenizerFiles) -> None:
    added = {"600": {"content": "<|eot|>", "special": True, "lstrip": False}}
    tokenizer = Tokenizer(
        TokenizerFiles(byte_level_files.tokenizer_json, {"added_tokens_decoder": added, "eos_token": "<|eot|>"})
    )

    assert tokenizer.encode("<|eot|>") == list(tokenizer.eos_token_ids)


def test_truncation_of_the_file_is_off(tmp_path: Path, byte_level_files: TokenizerFiles) -> None:
    content = json.loads(byte_level_files.tokenizer_json.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))

    assert len(Tokenizer(TokenizerFiles(tmp_path / "tokenizer.json")).encode("the cat " * 20)) > 4


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json is not a tokeniser"):
        Tokenizer(TokenizerFiles(tmp_path / "tokenizer.json"))


def test_an_unknown_decoder_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordPiece({"a": 0}))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="cannot be decoded"):
        Tokenizer(TokenizerFiles(tmp_path / "tokenizer.json"))


def test_threads_share_it(byte_level_files: TokenizerFiles) -> None:
    tokenizer = Tokenizer(byte_level_files)
    texts = [f"the cat {i} ñ " * 20 for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: tokenizer.decode(tokenizer.encode(text)), texts))

    assert found == texts
