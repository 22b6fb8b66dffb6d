"""The tokenizer inside a GGUF file, as a tokenizer.json."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from mars.errors import ModelError

# Kinds of tokens, from llama.cpp's llama_token_type.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

# Both from the models' own tokenizer.json; they differ in how many digits make one piece.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class GGUFTokens:
    """What a GGUF file says about its tokenizer."""

    model: str
    """`tokenizer.ggml.model`; byte-level BPE is `gpt2`."""
    pre: str
    """`tokenizer.ggml.pre`: how text is split before merging."""
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    """Pairs, as `left right`."""


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
    if tokens.model != "gpt2":
        raise ModelError(f"{source}: the tokenizer must be of kind 'gpt2' (byte-level BPE), got {tokens.model!r}")
    if tokens.pre not in _PRE:
        raise ModelError(f"{source}: tokenizer.ggml.pre must be one of {', '.join(_PRE)}, got {tokens.pre!r}")
    if len(tokens.kinds) != len(tokens.tokens):
        raise ModelError(
            f"{source}: every token must have a type, got {len(tokens.tokens)} and {len(tokens.kinds)}; "
            "the file is damaged"
        )
    vocab = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens.tokens, tokens.kinds, strict=True))
        if kind != _UNUSED
    }
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in tokens.merges)]
    try:
        tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=tokens.pre in ("llama-bpe", "llama3")))
    except Exception as error:  # what `tokenizers` raises has no class of its own
        raise ModelError(f"{source}: tokens and merges do not fit together ({error}); the file is damaged") from error
    _PRE[tokens.pre](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens.tokens, tokens.kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    tokenizer.save(str(path))
