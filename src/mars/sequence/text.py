"""Text to ids and back, with the tokenizer of the LLM; it knows nothing of pictures or of the model."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from mars.errors import ModelError, PromptError

CAPTION_HINTS = {"en": "English:", "zh": "中文："}
"""What a caption begins with, so that its language can be chosen; ours."""
_CHINESE = re.compile("[\u4e00-\u9fff]")


def caption_language(text: str) -> str:
    """The hint that suits a text: Chinese if it has a Chinese character."""
    return "zh" if _CHINESE.search(text) else "en"


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


class TextTokenizer:
    """The LLM's tokenizer. What a user types is never a control token, even if it is spelled like one.

    `config` gives `bos_token_id`, `eos_token_id` (int or None) and `chat_template` (str or None), as
    `BaseLLM.tokenizer_config` does. Raises ModelError when the file or the template cannot be used.
    """

    def __init__(self, path: Path, *, config: Mapping[str, Any]) -> None:
        self._path = path
        self._tokenizer = self._load()
        self._tokenizer.encode_special_tokens = True  # "<|im_end|>" is text
        bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
        eos = bos if eos is None else eos
        if eos is None:
            raise ModelError(f"{path}: the tokenizer must have an end-of-text token, got none; set eos_token_id")
        self.eos_id = int(eos)
        """Ends a text."""
        self.bos_id = self.eos_id if bos is None else int(bos)
        """Starts a document; the end-of-text token where the LLM has none of its own."""
        tokens = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(tokens.values()) + 1
        """One more than the highest id; the LLM's embedding table may have more rows."""
        if not all(0 <= number < self.vocab_size for number in (self.bos_id, self.eos_id)):
            raise ModelError(
                f"{path}: control tokens must be below {self.vocab_size}, got {self.bos_id} and {self.eos_id}"
            )
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        self._specials = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._template_source: str | None = config.get("chat_template")
        self._template = self._compile()

    def __getstate__(self) -> dict[str, Any]:
        """All but what cannot be pickled; it is made again from the rest."""
        return {name: value for name, value in vars(self).items() if name not in ("_template", "_chat_tokenizer")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._tokenizer.encode_special_tokens = True  # which is not kept
        self._template = self._compile()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without control tokens; PromptError when it is not valid Unicode."""
        return list(self._tokenizer.encode(_checked(text), add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without control tokens. `decode(encode(text))` is `text` (NFC for Qwen)."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def apply_chat(self, text: str, *, system: str | None = None, before: Sequence[tuple[str, str]] = ()) -> list[int]:
        """The ids of a user's message in the LLM's chat template, up to where the answer starts.

        `before` is what was said so far, as (`user` or `assistant`, text). The template's control tokens count, those
        of texts are text. Without a template: all texts, a line each.
        Raises ModelError when the template refuses the message.
        """
        if not self._template_source:
            return self.encode("\n".join([*(said for _, said in before), text]))
        turns = [*([] if system is None else [("system", system)]), *before, ("user", text)]
        mark = self._unused_character("".join(said for _, said in turns))
        messages = [{"role": role, "content": self._broken(_checked(said), mark=mark)} for role, said in turns]
        try:
            rendered = self._template.render(
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                bos_token=self._tokenizer.id_to_token(self.bos_id),
                eos_token=self._tokenizer.id_to_token(self.eos_id),
            )
        except TemplateError as error:
            raise ModelError(f"{self._path}: the chat template cannot be applied: {error}") from error
        pieces = (self._chat_tokenizer.encode(piece, add_special_tokens=False).ids for piece in rendered.split(mark))
        return [number for ids in pieces for number in ids]

    def _compile(self) -> Template:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        try:
            return environment.from_string(self._template_source or "")
        except TemplateError as error:
            raise ModelError(f"{self._path}: the chat template must be valid Jinja, got: {error}") from error

    def _load(self) -> Tokenizer:
        try:
            tokenizer = Tokenizer.from_file(str(self._path))
        except Exception as error:  # what `tokenizers` raises has no class of its own
            raise ModelError(f"{self._path} must be a tokenizer.json, got: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _chat_tokenizer(self) -> Tokenizer:
        """The same, reading control tokens; an object of its own because threads would share the switch."""
        return self._load()

    def _unused_character(self, text: str) -> str:
        """A private-use character (U+E000 and on) that stands nowhere in the text or the template."""
        used = set(text) | set(self._template_source or "")
        return next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in used)

    def _broken(self, text: str, *, mark: str) -> str:
        """The text with a mark, where it will be cut, inside all that is spelled like a control token."""
        starts = (start for start in range(len(text)) if self._specials.match(text, start))
        parts, last = [], 0
        for start in starts:
            parts.append(text[last : start + 1])
            last = start + 1
        return mark.join([*parts, text[last:]])


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"a text must be valid Unicode, got a lone surrogate at character {error.start}") from error
    return text
