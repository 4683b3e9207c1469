from tests.text.conftest import byte_level, byte_level_files, sentencepiece, sentencepiece_files, tokenizer

__all__ = ["byte_level", "byte_level_files", "sentencepiece", "sentencepiece_files", "tokenizer"]
