"""Two small vocabularies, one of each spelling, trained here so that no test needs a network."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from dashinfer.sources import TokenizerFiles
from dashinfer.text.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog and the cat",
    "stop strings such as STOP or </s> begin and never finish",
    "ñandú café naïve 你好世界 здравствуй 👩‍👩‍👧 🙂 flags 🇫🇷",
    "numbers 1 22 333 4444 and   spaces\n\nand lines\n",
] * 20
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def save(tokenizer: tokenizers.Tokenizer, directory: Path) -> TokenizerFiles:
    tokenizer.save(str(directory / "tokenizer.json"))
    return TokenizerFiles(directory / "tokenizer.json", {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}})


@pytest.fixture(scope="session")
def byte_level_files(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFiles:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool_call>"])
    return save(tokenizer, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def sentencepiece_files(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFiles:
    words = ["▁", "▁the", "the", "▁cat", "cat", "▁S", "TOP", "STOP", "a", "b", "c", "▁▁", "é", "你"]
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return save(tokenizer, tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def byte_level(byte_level_files: TokenizerFiles) -> Tokenizer:
    return Tokenizer(byte_level_files)


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_files: TokenizerFiles) -> Tokenizer:
    return Tokenizer(sentencepiece_files)


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)
