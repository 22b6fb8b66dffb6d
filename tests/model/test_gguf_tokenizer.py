import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from mars.errors import ModelError
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


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = [*"▁abc,中"]


def sentencepiece_tokens(**changes: Any) -> GGUFTokens:
    """A small vocabulary of sentencepiece's kind: bytes, letters, and 40 unions of what came before."""
    chance, unions = random.Random(0), list(LETTERS)
    while len(unions) < len(LETTERS) + 40:
        union = chance.choice(unions) + chance.choice(unions)
        unions += [union] * (union not in unions)
    unions = unions[len(LETTERS) :]
    fields: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": ["<unk>", "<s>", "</s>", *BYTES, *unions, *LETTERS],
        "kinds": [2, 3, 3] + [6] * 256 + [1] * (len(unions) + len(LETTERS)),
        "merges": [],
        "scores": [0.0] * 259 + [-float(number) for number in range(len(unions) + len(LETTERS))],
    }
    return GGUFTokens(**(fields | changes))


def merged(text: str, tokens: GGUFTokens) -> list[int]:
    """Sentencepiece's BPE by its definition: the neighbours whose union scores highest are merged first."""
    ids = {token: number for number, token in enumerate(tokens.tokens)}
    scores = dict(zip(tokens.tokens[259:], tokens.scores[259:], strict=True))
    parts = list((" " * tokens.space_prefix + text).replace(" ", "▁"))
    while True:
        found = [scores.get(left + right, -1e9) for left, right in pairwise(parts)]
        if not found or max(found) == -1e9:
            break
        first = found.index(max(found))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    known = [[ids[part]] if part in scores else [ids[BYTES[byte]] for byte in part.encode()] for part in parts]
    return [number for numbers in known for number in numbers]


@pytest.fixture(scope="module", params=[True, False])
def sentencepiece(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokens = sentencepiece_tokens(space_prefix=request.param)
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.json"
    write_tokenizer(tokens, path=path, source="test")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokens, tokenizer


@given(text=st.text("abc, 中", min_size=1, max_size=40) | st.text(st.characters(exclude_characters="▁"), min_size=1))
@example("  two spaces  ")
@example("🤖 <s> 中\n\t")
@example(" ")
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(sentencepiece: Any, text: str) -> None:
    tokens, tokenizer = sentencepiece
    found = tokenizer.encode(text, add_special_tokens=False).ids
    assert found == merged(text, tokens)
    assert tokenizer.decode(found) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0]}, "must give a score per token .*, got 1 scores"),
        ({"normalized": True}, "leave text as it is, .* and a change of text"),
        ({"kinds": [3, 3, 3] + [6] * 256 + [1] * 46}, "got .* 0 unknown tokens"),
        ({"kinds": [2, 3, 3] + [5] * 256 + [1] * 46}, "must have a token per byte, got none for 0"),
        ({"model": "t5"}, "must be of kind 'gpt2' .* or 'llama' .*, got 't5'"),
    ],
)
def test_a_sentencepiece_tokenizer_that_we_cannot_write_is_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        write_tokenizer(sentencepiece_tokens(**changes), path=tmp_path / "tokenizer.json", source="test")
    assert "\n" not in str(caught.value)
