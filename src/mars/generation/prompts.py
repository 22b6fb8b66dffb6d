"""Prompts as image positions see them: each text is read alone, once for all who ask for it at the same time.

Read alone, a prompt's keys and values do not depend on what else is asked for, to the bit.
"""

from collections import OrderedDict
from weakref import WeakValueDictionary

from mars.model.cache import Prefix
from mars.model.transformer import MarsTransformer, read_prefixes

REMEMBERED_BYTES = 64 * 2**20
"""Of texts that nobody holds any more: the empty prompt is needed again and again."""


class Prompt:
    """A text, and what it leaves behind once it is read."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids
        self.prefix: Prefix | None = None


class Prompts:
    """Reads texts with a model's language expert; a text is read once as long as anybody holds it."""

    def __init__(self, transformer: MarsTransformer) -> None:
        self.transformer = transformer
        self._held: WeakValueDictionary[tuple[int, ...], Prompt] = WeakValueDictionary()
        self._latest: OrderedDict[tuple[int, ...], Prompt] = OrderedDict()

    def find(self, ids: tuple[int, ...]) -> Prompt:
        """The text of these ids, perhaps already read."""
        prompt = self._held.get(ids) or Prompt(ids)
        self._held[ids] = prompt
        return prompt

    def read(self, prompt: Prompt) -> Prefix:
        """What image positions look back at.

        Raises:
            RequestError: if it was not read before the language expert was released.
        """
        if prompt.prefix is None:
            prompt.prefix = read_prefixes(self.transformer, [prompt.ids])[0]
        self._remember(prompt)
        return prompt.prefix

    def _remember(self, prompt: Prompt) -> None:
        self._latest[prompt.ids] = prompt
        self._latest.move_to_end(prompt.ids)
        while sum(_bytes(one) for one in self._latest.values()) > REMEMBERED_BYTES:
            self._latest.popitem(last=False)


def _bytes(prompt: Prompt) -> int:
    return 0 if prompt.prefix is None else 2 * prompt.prefix.keys.nbytes
