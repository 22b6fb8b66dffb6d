from pathlib import Path

import pytest

from mars.data.described_folder import read_description, refuse_other, write_description
from mars.errors import DataError


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = {"finished": False, "settings": {"source": "猫", "sizes": [1, 2]}}
    write_description(tmp_path / "dataset.json", content)
    assert read_description(tmp_path / "dataset.json") == content
    assert [one.name for one in tmp_path.iterdir()] == ["dataset.json"]


@pytest.mark.parametrize("content", [None, b"", b'{"finished": ', b"\xff"])
def test_what_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=r"dataset.json is damaged \(.*\); remove .* and make it again") as caught:
        read_description(tmp_path / "dataset.json")
    assert "\n" not in str(caught.value)


def test_settings_that_differ_are_told(tmp_path: Path) -> None:
    refuse_other(tmp_path, made={"a": 1}, asked={"a": 1})
    for made, asked, told in (
        ({"a": 1}, {"a": 2}, "made with a 1, got 2"),
        ({"a": 1, "b": "猫"}, {"a": 1}, 'made with b "猫", got null'),
        ({"a": 1}, {"a": 1, "b": [2]}, r"made with b null, got \[2\]"),
    ):
        with pytest.raises(DataError, match=told):
            refuse_other(tmp_path, made=made, asked=asked)
