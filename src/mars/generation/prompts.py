"""Prompts as image positions see them: each text is read once for all who ask for it at the same time."""

from collections import OrderedDict
from collections.abc import Iterable
from weakref import WeakValueDictionary

from mars.model.cache import Prefix
from mars.model.transformer import MarsTransformer, read_prefixes

REMEMBERED_BYTES = 64 * 2**20
"""Of texts that nobody holds any more: the empty prompt is needed again and again."""
TOGETHER = 256
"""Positions of a pass, padding included: with more, a text is read no sooner beside others than alone."""


class Prompt:
    """A text, and what it leaves behind once it is read."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids
        self.prefix: Prefix | None = None


class Prompts:
    """Reads texts with a model's language expert; a text is read once as long as anybody holds it.

    Args:
        together: positions of a pass. Short texts are read in one, which is several times quicker, and rounds
            differently with what is read in it. With 0 each is read alone: what is drawn then is the same to the bit,
            whatever else is asked for, where the kernel draws.
    """

    def __init__(self, transformer: MarsTransformer, *, together: int = TOGETHER) -> None:
        self.transformer = transformer
        self.together = together
        self._held: WeakValueDictionary[tuple[int, ...], Prompt] = WeakValueDictionary()
        self._latest: OrderedDict[tuple[int, ...], Prompt] = OrderedDict()

    def find(self, ids: tuple[int, ...]) -> Prompt:
        """The text of these ids, perhaps already read."""
        prompt = self._held.get(ids) or Prompt(ids)
        self._held[ids] = prompt
        return prompt

    def read_all(self, prompts: Iterable[Prompt]) -> None:
        """Reads those that have not been read.

        Raises:
            RequestError: if the language expert was released.
        """
        unread = sorted({prompt for prompt in prompts if prompt.prefix is None}, key=lambda prompt: len(prompt.ids))
        while unread:
            count = 1
            while count < len(unread) and (count + 1) * len(unread[count].ids) <= self.together:
                count += 1
            some, unread = unread[:count], unread[count:]
            prefixes = read_prefixes(self.transformer, [prompt.ids for prompt in some])
            for prompt, prefix in zip(some, prefixes, strict=True):
                prompt.prefix = prefix
                self._remember(prompt)

    def read(self, prompt: Prompt) -> Prefix:
        """What image positions look back at; as `read_all` for one."""
        self.read_all([prompt])
        assert prompt.prefix is not None
        self._remember(prompt)
        return prompt.prefix

    def _remember(self, prompt: Prompt) -> None:
        self._latest[prompt.ids] = prompt
        self._latest.move_to_end(prompt.ids)
        while sum(_bytes(one) for one in self._latest.values()) > REMEMBERED_BYTES:
            self._latest.popitem(last=False)


def _bytes(prompt: Prompt) -> int:
    return 0 if prompt.prefix is None else 2 * prompt.prefix.keys.nbytes
