import gc
import io
from collections.abc import Iterator

import httpx2
import pytest
from PIL import Image
from PIL._util import DeferredError

from tests.server.conftest import Running

SIDE = (311, 313)
"""Of no other picture here."""


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Nothing that is held in a circle is let go."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def file(*, broken: bool) -> bytes:
    made = io.BytesIO()
    Image.effect_noise(SIDE, 50).convert("RGB").save(made, "PNG")
    return made.getvalue()[: 20_000 if broken else None]


def alive() -> int:
    """Pictures of that size whose pixels are in memory."""
    pictures = [one for one in gc.get_objects() if issubclass(type(one), Image.Image) and one.size == SIDE]
    return sum(not isinstance(one._im, DeferredError) for one in pictures if one._im is not None)


@pytest.mark.usefixtures("uncollected")
def test_a_refused_request_holds_no_picture(started: Running) -> None:
    broken, whole = file(broken=True), file(broken=False)
    before = alive()
    for _ in range(8):
        for path, files in (
            ("edits", {"image": whole}),
            ("edits", {"image": broken}),
            ("variations", {"image": broken}),
        ):
            answer = httpx2.post(
                f"http://127.0.0.1:{started.port}/v1/images/{path}", data={"prompt": "a"}, files=files, timeout=30
            )
            assert answer.status_code == 400
    assert alive() - before <= 2  # the last of each thread that reads
