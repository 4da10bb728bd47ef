"""Pages in a browser: one chromium, and what is looked at in every page, each as a list of what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NARROW, WIDE = 420, 1400
LEAST_CONTRAST, LEAST_PIXELS = 4.5, 9.0
"""Of text against what is behind it (WCAG 2, level AA), and of letters in a picture."""

CHECKS = Path(__file__).with_name("page_checks.js")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; what needs one is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on PATH")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, path: Path) -> Iterator[Any]:
    """A page, which asks for no other file and says nothing on its console."""
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: said.append(asked.url) if asked.url != path.as_uri() else None)
    page.goto(path.as_uri())
    yield page
    page.close()
    assert said == []


def show(page: Any, width: int, scheme: str = "light") -> None:
    """The whole page at once: only what is on the screen can be asked what lies behind it."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.set_viewport_size({"width": width, "height": page.evaluate("document.documentElement.scrollHeight")})


def asked(page: Any, check: str, given: float | str | None = None) -> Any:
    """What one of the checks in page_checks.js answers."""
    checks = CHECKS.read_text(encoding="utf-8").partition("\n")[2]  # after the comment
    return page.evaluate(f"given => {checks.strip()}.{check}(given)", given)


def pale_text(page: Any) -> list[str]:
    """Text that stands out too little from what is behind it, fields and plots included."""
    found = asked(page, "pale", LEAST_CONTRAST)
    assert found["seen"] > 30, "there is text"
    return list(found["wrong"])


def cut_off(page: Any) -> list[str]:
    """What is wider than the page, hidden, cut, out of a picture or too small in it, or scrolls without a keyboard."""
    return list(asked(page, "cutOff", LEAST_PIXELS))


def unnamed(page: Any) -> list[str]:
    """What a screen reader would miss: a language, a title, headings, words for pictures and fields."""
    return list(asked(page, "unnamed"))


def out_of_reach(page: Any) -> list[str]:
    """What can be operated and is not reached by the tab key, or is reached and does not show it."""
    wanted = {each["at"]: each["what"] for each in asked(page, "operable")}
    wrong = []
    for _ in range(len(wanted) + 2):
        page.keyboard.press("Tab")
        focused = asked(page, "focused")
        if focused is None:
            break
        wanted.pop(focused["at"], None)
        if not focused["seen"]:
            wrong.append(f"no focus is seen: {focused['what']}")
    return wrong + [f"not reached: {what}" for what in wanted.values()]


def colours_of(page: Any, name: str) -> list[str]:
    """All that the bars and marks of an optimizer are painted in."""
    return list(asked(page, "coloursOf", name))
