"""MARS draws pictures from prompts: a frozen language expert and a trained visual expert in one decoder.

    from mars import MarsPipeline

    pipe = MarsPipeline.from_pretrained()
    pipe("a red apple").images[0].save("apple.png")

Importing the package is instant; what needs torch is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mars.errors import MarsError

if TYPE_CHECKING:
    from mars.pipeline import MarsPipeline

__version__ = "0.1.0"
__all__ = ["MarsError", "MarsPipeline", "__version__"]

_LAZY = {"MarsPipeline": "mars.pipeline"}


def __getattr__(name: str) -> object:
    """Import a public name from its own module the first time that it is used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'mars' has no attribute {name!r}")
    value: object = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
