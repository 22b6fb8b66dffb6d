"""`qwen.tiktoken`, the tokenizer of the first generation of Qwen, as a tokenizer.json.

The file has a line per token: its bytes in base64 and its rank, which is its id. Of two neighbours in a text those are
merged whose union has the lowest rank. A tokenizer.json lists pairs instead; each token has one, into which the tokens
of lower rank cut it. Control tokens follow, as in Qwen's published tokenization_qwen.py.

Characters that Unicode has added lately may be split otherwise than by tiktoken, whose tables are of another year.
"""

import base64
import binascii
from itertools import pairwise
from pathlib import Path

from mars.errors import ModelError
from mars.model.gguf_tokenizer import GGUFTokens, write_tokenizer

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
"""The control tokens, in the order of their ids."""
_NORMAL_KIND, _CONTROL_KIND = 1, 3  # llama.cpp's llama_token_type


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level tokenizer.json (GPT-2's table)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Rank of each token; ModelError unless ranks are 0, 1, 2, ... and every byte is a token."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ModelError(f"{path} must be readable, got: {error}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelError(f"{path}: line {number} must be a token and its rank, got: {error}; download it") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ModelError(f"{path} must rank its tokens 0, 1, 2, ... and hold all 256 bytes; the file is damaged")
    return ranks


def split_token(token: bytes, *, ranks: dict[bytes, int]) -> list[bytes]:
    """The tokens of lower rank into which byte-pair encoding cuts a token: two, if the ranks come from training."""
    parts, limit = [token[start : start + 1] for start in range(len(token))], ranks[token]
    while len(parts) > 2:
        unions = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        lowest = min(unions)
        if lowest >= limit:
            break
        first = unions.index(lowest)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


def convert_tiktoken(path: Path, *, tokenizer: Path) -> None:
    """Writes the tokenizer.json `tokenizer` for a `qwen.tiktoken`: the same ids for the same text.

    Raises ModelError when the file is damaged.
    """
    ranks, characters = read_ranks(path), byte_characters()
    names = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            parts = split_token(token, ranks=ranks)
            if len(parts) != 2:
                raise ModelError(f"{path}: token {token!r} must be a pair of tokens before it; the file is damaged")
            merges.append(f"{names[parts[0]]} {names[parts[1]]}")
    tokens = GGUFTokens(
        model="gpt2",
        pre="qwen2",
        tokens=[*(names[token] for token in sorted(ranks, key=ranks.__getitem__)), *CONTROL],
        kinds=[_NORMAL_KIND] * len(ranks) + [_CONTROL_KIND] * len(CONTROL),
        merges=merges,
    )
    write_tokenizer(tokens, path=tokenizer, source=str(path))
