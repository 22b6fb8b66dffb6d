"""The tokenizer inside a GGUF file, as a tokenizer.json."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from mars.errors import ModelError

# Kinds of tokens, from llama.cpp's llama_token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPACE = "▁"
"""How sentencepiece writes a space."""

# Both from the models' own tokenizer.json; they differ in how many digits make one piece.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class GGUFTokens:
    """What a GGUF file says about its tokenizer."""

    model: str
    """`tokenizer.ggml.model`: byte-level BPE is `gpt2`, sentencepiece's BPE is `llama`."""
    pre: str
    """`tokenizer.ggml.pre`: how text is split before merging."""
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    """Pairs, as `left right`; of `gpt2`."""
    scores: list[float] = field(default_factory=list)
    """Of `llama`: neighbours are merged whose union has the highest score."""
    space_prefix: bool = True
    """Of `llama`: whether a text gets a space in front, which decoding removes."""
    normalized: bool = False
    """Of `llama`: whether text is changed before it is cut, which we cannot do."""


def _gpt2(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _split(tokenizer: Tokenizer, digits: str) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT % digits), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _llama3(tokenizer: Tokenizer) -> None:
    _split(tokenizer, "{1,3}")


def _qwen2(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    _split(tokenizer, "")


_PRE: dict[str, Callable[[Tokenizer], None]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "qwen2": _qwen2,
}


def write_tokenizer(tokens: GGUFTokens, *, path: Path, source: str) -> None:
    """Writes the tokenizer.json at `path`; ModelError for a kind whose exact rules we do not know."""
    if tokens.model not in ("gpt2", "llama"):
        raise ModelError(
            f"{source}: the tokenizer must be of kind 'gpt2' (byte-level BPE) or 'llama' (sentencepiece's BPE), "
            f"got {tokens.model!r}; use another model"
        )
    if len(tokens.kinds) != len(tokens.tokens):
        raise ModelError(
            f"{source}: every token must have a type, got {len(tokens.tokens)} and {len(tokens.kinds)}; "
            "the file is damaged"
        )
    tokenizer = (_byte_level if tokens.model == "gpt2" else _sentencepiece)(tokens, source)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens.tokens, tokens.kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    tokenizer.save(str(path))


def _vocabulary(tokens: GGUFTokens) -> dict[str, int]:
    kinds = zip(tokens.tokens, tokens.kinds, strict=True)
    return {token: number for number, (token, kind) in enumerate(kinds) if kind != _UNUSED}


def _byte_level(tokens: GGUFTokens, source: str) -> Tokenizer:
    if tokens.pre not in _PRE:
        raise ModelError(f"{source}: tokenizer.ggml.pre must be one of {', '.join(_PRE)}, got {tokens.pre!r}")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in tokens.merges)]
    try:
        ignore = tokens.pre in ("llama-bpe", "llama3")
        tokenizer = Tokenizer(BPE(_vocabulary(tokens), merges, ignore_merges=ignore))
    except Exception as error:  # what `tokenizers` raises has no class of its own
        raise ModelError(f"{source}: tokens and merges do not fit together ({error}); the file is damaged") from error
    _PRE[tokens.pre](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: GGUFTokens, source: str) -> Tokenizer:
    """Sentencepiece's BPE; what no token covers becomes bytes.

    Behind a control token a text begins anew, with its space, as in llama.cpp.
    """
    if len(tokens.scores) != len(tokens.tokens) or tokens.kinds.count(_UNKNOWN) != 1 or tokens.normalized:
        raise ModelError(
            f"{source}: a 'llama' tokenizer must give a score per token and one unknown token, and leave text as it "
            f"is, got {len(tokens.scores)} scores, {tokens.kinds.count(_UNKNOWN)} unknown tokens and "
            f"{'a' if tokens.normalized else 'no'} change of text; use another model"
        )
    vocabulary = _vocabulary(tokens)
    if missing := [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]:
        raise ModelError(f"{source}: a 'llama' tokenizer must have a token per byte, got none for {missing[0]}")
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            _merges(tokens, vocabulary),
            unk_token=tokens.tokens[tokens.kinds.index(_UNKNOWN)],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend(_SPACE)] if tokens.space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", left=1)] if tokens.space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(tokens: GGUFTokens, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens whose union is a token, the highest score first.

    Pairs of equal unions are ordered by their ids; sentencepiece takes the first in the text, which is the same unless
    such pairs overlap.
    """
    plain = {
        token: score
        for token, score, kind in zip(tokens.tokens, tokens.scores, tokens.kinds, strict=True)
        if kind not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE)
    }
    pairs = [
        (-score, vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for token, score in plain.items()
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    return [(left, right) for _, _, _, left, right in sorted(pairs)]
