"""One id space for text, image codes and special ids.

    0 .. text_size                text ids of the LLM
    .. + num_codes                image codes
    .. + 6                        special ids
    .. padded to a multiple of 8  dead ids, never used

For Qwen-7B and 8,192 codes: 151,936 + 8,192 + 6 = 160,134, stored as 160,136 (the figure that the paper gives).
"""

from dataclasses import dataclass
from enum import Enum

from mars.errors import ConfigError

SPECIALS = ("<img>", "</img>", "<low>", "</low>", "<source>", "</source>")
"""The paper shows `<img>` and `</img>`; the other four are ours (grids that are read, not drawn)."""
PADDING = 8
"""The vocabulary's size is a multiple of this."""


class IdRange(Enum):
    """What an id of the joint vocabulary is."""

    TEXT = "text"
    CODE = "code"
    SPECIAL = "special"
    DEAD = "dead"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Where each kind of id begins."""

    text_size: int
    num_codes: int
    cell: int = 1
    """Codes on each side of the square that one image position holds (ours); 1 is a code per position."""

    def __post_init__(self) -> None:
        if self.text_size < 1 or self.num_codes < 1:
            raise ConfigError(
                f"a vocabulary needs text and codes, got {self.text_size} text ids and {self.num_codes} codes"
            )

    @property
    def slots(self) -> int:
        """K, the codes of one image position."""
        return self.cell * self.cell

    @property
    def size(self) -> int:
        """All ids, dead ones included."""
        return -(-(self.text_size + self.num_codes + len(SPECIALS)) // PADDING) * PADDING

    @property
    def visual_rows(self) -> int:
        """Rows of the visual tables: codes, special ids and dead ids."""
        return self.size - self.text_size

    @property
    def first_code(self) -> int:
        """Id of code 0."""
        return self.text_size

    @property
    def first_special(self) -> int:
        """Id of the first special."""
        return self.text_size + self.num_codes

    @property
    def image_start(self) -> int:
        """Id of `<img>`, which belongs to the image and predicts its first code."""
        return self.first_special

    @property
    def image_end(self) -> int:
        """Id of `</img>`, which belongs to the text that follows an image."""
        return self.first_special + 1

    @property
    def low_start(self) -> int:
        """Id of `<low>`, which begins a low-resolution image that is read."""
        return self.first_special + 2

    def range_of(self, index: int) -> IdRange:
        """What kind of id `index` is.

        Raises:
            ConfigError: if it lies outside the vocabulary.
        """
        if not 0 <= index < self.size:
            raise ConfigError(f"an id must lie in 0..{self.size - 1}, got {index}")
        if index < self.first_code:
            return IdRange.TEXT
        if index < self.first_special:
            return IdRange.CODE
        return IdRange.SPECIAL if index < self.first_special + len(SPECIALS) else IdRange.DEAD

    @property
    def source_start(self) -> int:
        """Id of `<source>`, which begins an image that an instruction changes."""
        return self.first_special + SPECIALS.index("<source>")

    @property
    def source_end(self) -> int:
        """Id of `</source>`, which belongs to the instruction."""
        return self.first_special + SPECIALS.index("</source>")
