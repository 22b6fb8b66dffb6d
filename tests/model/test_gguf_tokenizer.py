from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from mars.model.gguf_tokenizer import GGUFTokens, write_tokenizer


def pieces(path: Path, pre: str, text: str) -> list[str]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = GGUFTokens(model="gpt2", pre=pre, tokens=alphabet, kinds=[1] * 256, merges=[])
    write_tokenizer(tokens, path=path, source="test")
    tokenizer = Tokenizer.from_file(str(path))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    return [piece.replace("Ġ", " ") for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["It", "'s", " 12345", ".", "5", " x"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", ".", "5", " x"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", ".", "5", " x"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", ".", "5", " x"]),
    ],
)
def test_each_kind_splits_its_way(tmp_path: Path, pre: str, expected: list[str]) -> None:
    assert pieces(tmp_path / "tokenizer.json", pre, "It's 12345.5 x") == expected
