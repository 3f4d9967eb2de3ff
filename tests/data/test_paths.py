import pytest

from edgekd.data.paths import find
from edgekd.errors import DataError


def test_first_folder_wins_and_links_are_resolved(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "set").mkdir(parents=True)
    (two / "only").mkdir()
    (one / "link").symlink_to(two / "only")
    assert find("set", [one, two]) == (one / "set").resolve()
    assert find("set", [two, one]) == (two / "set").resolve()
    assert find("only", [one, two]) == (two / "only").resolve()
    assert find("link", [one]) == (two / "only").resolve()
    assert find(two / "only", [one]) == (two / "only").resolve()


def test_missing_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGEKD_DATA", raising=False)
    with pytest.raises(DataError) as caught:
        find("cats", [tmp_path / "a", tmp_path / "b"])
    assert str(tmp_path / "a" / "cats") in caught.value.message
    assert str(tmp_path / "b" / "cats") in caught.value.message
    assert "EDGEKD_DATA is not set" in caught.value.hint
    monkeypatch.setenv("EDGEKD_DATA", "/some/where")
    with pytest.raises(DataError) as caught:
        find("cats", [])
    assert "no folder to search was given" in caught.value.message
    assert "EDGEKD_DATA is /some/where" in caught.value.hint
    with pytest.raises(DataError, match="does not exist"):
        find(tmp_path / "nothing", [])


@pytest.mark.parametrize("path", ["../set", "a/../../set", ".."])
def test_climbing_out_is_refused_even_where_it_exists(tmp_path, path):
    (tmp_path / "set").mkdir()
    (tmp_path / "in" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match=r"climbs out of its folder with '\.\.'") as caught:
        find(path, [tmp_path / "in"])
    assert caught.value.hint == "give an absolute path"


def test_paths_that_the_system_refuses(tmp_path):
    for path in ("x" * 5000, "/" + "x" * 300):
        with pytest.raises(DataError, match="cannot be read: File name too long") as caught:
            find(path, [tmp_path])
        assert len(caught.value.message) < 300
    with pytest.raises(DataError, match="Could not determine home directory"):
        find("~nobody-of-this-name/set", [tmp_path])
