from pathlib import Path

import pytest

from mars.errors import ConfigError
from mars.server.settings import Limits, read_keys


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n  two  \n", "utf-8")
    keys = read_keys(file, environment={"MARS_API_KEYS": "three, four five"})
    for key in (b"one", b"two", b"three", b"four", b"five"):
        assert keys.fit(b"Bearer " + key)
        assert keys.fit(b"bearer " + key)
    for header in (
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer # ours",
        b"one",
        b"Basic one",
        b"Bearer \xff",
        b"Bearer one two",
    ):
        assert not keys.fit(header)
    assert not read_keys(None, environment={})
    assert "one" not in repr(vars(keys))


def test_settings_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none\n", "utf-8")
    (tmp_path / "spaces").write_text("a b\n", "utf-8")
    for name, message in (("empty", "got none"), ("spaces", "without spaces"), ("missing", "No such file")):
        with pytest.raises(ConfigError, match=message) as caught:
            read_keys(tmp_path / name, environment={})
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="MARS_API_KEYS must hold API keys, got none"):
        read_keys(None, environment={"MARS_API_KEYS": " "})
    with pytest.raises(ConfigError, match="limit seconds must be greater than 0, got 0"):
        Limits(seconds=0)
    with pytest.raises(ConfigError, match=r"the pictures of one request \(10\), got 4"):
        Limits(queue=4)
