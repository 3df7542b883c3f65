"""Help that is kept between processes: the same page, made once for one state of the sources."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dbd_dist import helptext


class Maker:
    """Prints a page, and counts how often."""

    def __init__(self, page: str = "usage: …\n", code: int = 0, warning: str = "", exits: bool = True):
        self.page, self.code, self.warning, self.exits, self.calls = page, code, warning, exits, 0

    def __call__(self) -> int:
        self.calls += 1
        sys.stdout.write(self.page)
        sys.stderr.write(self.warning)
        if self.exits:
            raise SystemExit(self.code)
        return self.code


def shown(maker: Maker, argv: tuple[str, ...] = ("--help",)) -> int:
    try:
        return helptext.show("train", list(argv), maker)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("exits", [True, False])
def test_a_page_is_made_once(capsys, exits):
    maker = Maker(exits=exits)
    assert shown(maker) == shown(maker) == 0
    assert maker.calls == 1
    assert capsys.readouterr().out == 2 * maker.page


def test_other_arguments_terminals_and_sources_have_pages_of_their_own(monkeypatch, tmp_path):
    maker = Maker()
    shown(maker)
    shown(maker, ("demo", "--help"))
    assert maker.calls == 2
    monkeypatch.setenv("COLUMNS", "57")
    shown(maker)
    assert maker.calls == 3
    package = tmp_path / "somewhere" / "dbd_plugin_of_a_test"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("one = 1\n")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(helptext, "PACKAGES", (*helptext.PACKAGES, package.name))
    for count, text in ((4, "one = 1\n"), (5, "one = 100\n"), (5, None)):
        if text is not None:
            (package / "__init__.py").write_text(text)
        shown(maker)
        assert maker.calls == count


@pytest.mark.parametrize("maker", [Maker(code=2), Maker(warning="note: a plugin is left out\n"), Maker(page="")])
def test_what_is_not_kept(maker, cache):
    for _ in range(2):
        assert shown(maker) == maker.code
    assert maker.calls == 2
    assert not list(cache.rglob("*.txt"))


def test_a_cache_that_cannot_be_written_costs_time_only(monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")  # root may write any folder but this
    maker = Maker()
    assert shown(maker) == shown(maker) == 0
    assert capsys.readouterr() == (2 * maker.page, "")


def test_old_states_and_too_many_pages_go(cache, monkeypatch):
    monkeypatch.setattr(helptext, "_PAGES", 3)
    for width in range(60, 66):
        monkeypatch.setenv("COLUMNS", str(width))
        shown(Maker())
    assert len(list(cache.rglob("*.txt"))) == 3
    for state in range(6):
        monkeypatch.setattr(helptext, "_sources", lambda state=state: [str(state)])
        shown(Maker())
    assert len(list((cache / "dbd-dist" / "help").iterdir())) == 4


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--help"], True), (["cifar10_badnets", "--method", "nad", "-h"], True), (["smoke"], False), ([], False),
        (["file:space.py", "--help"], False), (["--config", "a/run.json", "--help"], False),
        (["mine.toml", "-h"], False),
    ],
)  # fmt: skip
def test_only_pages_that_depend_on_no_file(argv, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").touch()
    assert helptext.asks(argv) is wanted


def test_the_command_keeps_its_help(cache):
    def run() -> str:
        argv = [sys.executable, "-m", "dbd_dist", "report", "--help"]
        return subprocess.run(argv, check=True, capture_output=True, text=True, env=dict(os.environ)).stdout

    first = run()
    (page,) = cache.rglob("*.txt")
    assert page.read_text() == first == run()
    page.write_text("another page\n")
    assert run() == "another page\n"
