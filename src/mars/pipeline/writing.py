"""Text in, text out: what the base LLM answers."""

from collections.abc import Callable

from mars.checkpoint import MarsModel
from mars.errors import PromptError
from mars.generation.engine import continue_text


def answer(model: MarsModel, text: str, *, system: str, max_tokens: int, emit: Callable[[str], None] | None) -> str:
    """The likeliest answer; arguments and errors are those of `MarsPipeline.chat`."""
    if not text.strip():
        raise PromptError("the text must not be empty; say something")
    tokenizer = model.text_tokenizer
    written: list[int] = []
    told = ""

    def tell(token: int) -> None:
        nonlocal told
        written.append(token)
        whole = tokenizer.decode(written)
        if emit is not None and not whole.endswith("\ufffd"):  # half a character waits for its other bytes
            emit(whole[len(told) :])
            told = whole

    ids = continue_text(
        model.transformer,
        tokenizer.apply_chat(text, system=system),
        max_tokens=max_tokens,
        end=(tokenizer.eos_id,),
        emit=tell,
    )
    answer = tokenizer.decode(ids)
    if emit is not None and answer != told:
        emit(answer[len(told) :])
    return answer
