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

_CONTRAST = """least => {
  const rgba = text => {
    const [r, g, b, a = 1] = (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
    return [r, g, b, a];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((value, i) => a * value + (1 - a) * under[i]);
  const light = colour => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => {
    const value = colour[i] / 255;
    return sum + share * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  }, 0);
  const opacity = element => element ? getComputedStyle(element).opacity * opacity(element.parentElement) : 1;
  const paint = element => {
    const style = getComputedStyle(element), drawn = element.namespaceURI.endsWith("svg") && element.tagName !== "svg";
    const colour = rgba(drawn ? (style.fill === "none" ? "rgba(0,0,0,0)" : style.fill) : style.backgroundColor);
    return [...colour.slice(0, 3), colour[3] * (drawn ? style.fillOpacity : 1) * opacity(element)];
  };
  const behind = (element, x, y) => {
    const layers = document.elementsFromPoint(x, y);
    const under = layers.slice(layers.indexOf(element) + (element.closest("svg text") ? 1 : 0));
    const canvas = matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
    return under.filter(layer => !layer.closest("svg text")).reverse()
      .reduce((colour, layer) => over(paint(layer), colour), canvas);
  };
  const wrong = [];
  let seen = 0;
  const check = (element, place, text) => {
    if (element.closest(".scroll")) element.scrollIntoView({ block: "nearest", inline: "center" });
    const box = place();
    const x = box.x + box.width / 2, y = box.y + box.height / 2;
    if (!box.width || !document.elementsFromPoint(x, y).length) { wrong.push(`not on the screen: ${text}`); return; }
    const style = getComputedStyle(element), back = behind(element, x, y);
    const [r, g, b, a] = rgba(element.closest("svg") ? style.fill : style.color);
    const [dark, bright] = [light(over([r, g, b, a * opacity(element)], back)), light(back)].sort((p, q) => p - q);
    const contrast = (bright + 0.05) / (dark + 0.05);
    seen += 1;
    if (contrast < least) wrong.push(`${contrast.toFixed(2)}: ${text.slice(0, 60)}`);
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("script, style, noscript, option, title, metadata, defs")) continue;
    if (!element.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const place = () => element.closest("svg") ? element.getBoundingClientRect() : range.getClientRects()[0];
    check(element, place, node.data.trim());
  }
  for (const field of document.querySelectorAll("input[type=number], select")) {
    check(field, () => field.getBoundingClientRect(), field.id);
  }
  return { wrong, seen };
}"""

_CUT_OFF = """least => {
  const wrong = [], width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) wrong.push(`the page is ${document.documentElement.scrollWidth} wide`);
  for (const element of document.querySelectorAll("main *, header *")) {
    if (element.closest("svg, script, style, noscript") && element.tagName !== "svg") continue;
    const box = element.getBoundingClientRect(), scroll = element.closest(".scroll");
    if (!scroll && box.right > width + 1) wrong.push(`beyond the edge: ${element.tagName} ${element.textContent.slice(0, 40)}`);
    if (element.tagName === "TD" && !(box.width && element.checkVisibility())) wrong.push(`hidden: ${element.textContent}`);
    const style = getComputedStyle(element);
    if (!element.matches("input, select, option") && element.scrollWidth > element.clientWidth + 1 && element.clientWidth
        && style.display !== "inline" && style.overflowX !== "visible" && style.overflowX !== "auto")
      wrong.push(`cut off: ${element.tagName} ${element.textContent.slice(0, 40)}`);
  }
  for (const scroll of document.querySelectorAll("*")) {
    if (!["auto", "scroll"].includes(getComputedStyle(scroll).overflowX) || scroll.closest("svg, head")) continue;
    const named = scroll.tabIndex === 0 && scroll.getAttribute("role") === "region" && scroll.getAttribute("aria-label");
    if (!named) wrong.push(`it scrolls, and the keyboard cannot reach it: ${scroll.outerHTML.slice(0, 60)}`);
  }
  for (const svg of document.querySelectorAll("figure svg")) {
    const frame = svg.getBoundingClientRect(), scale = frame.width / svg.viewBox.baseVal.width;
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect(), pixels = parseFloat(getComputedStyle(text).fontSize) * scale;
      if (pixels < least) wrong.push(`${pixels.toFixed(1)} pixels: ${text.textContent}`);
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        wrong.push(`out of its picture: ${text.textContent}`);
    }
  }
  return wrong;
}"""

_STRUCTURE = """() => {
  const wrong = [], all = selector => [...document.querySelectorAll(selector)];
  if (!document.documentElement.lang) wrong.push("no language");
  if (!document.title.trim()) wrong.push("no title");
  const levels = all("h1, h2, h3, h4, h5, h6").map(heading => Number(heading.tagName[1]));
  if (levels[0] !== 1 || levels.filter(level => level === 1).length !== 1) wrong.push(`headings begin with ${levels}`);
  levels.forEach((level, i) => { if (i && level > levels[i - 1] + 1) wrong.push(`a heading is left out: ${levels}`); });
  for (const picture of all("img, svg, canvas, [role=img]")) {
    const text = picture.tagName === "IMG" ? picture.alt : picture.getAttribute("aria-label");
    if (!(text || "").trim() || (picture.tagName === "svg" && picture.getAttribute("role") !== "img"))
      wrong.push(`a picture without words: ${picture.outerHTML.slice(0, 60)}`);
  }
  for (const field of all("input, select, textarea")) {
    const words = [...field.labels].map(label => label.textContent).join("") + (field.getAttribute("aria-label") || "");
    if (!words.trim()) wrong.push(`a field without a label: ${field.outerHTML}`);
  }
  for (const group of all("fieldset")) if (!group.querySelector("legend")) wrong.push("a group of fields without a legend");
  const ids = all("[id]").map(element => element.id);
  const twice = ids.filter((id, i) => ids.indexOf(id) !== i);
  if (twice.length) wrong.push(`names given twice: ${[...new Set(twice)]}`);
  if (all("[tabindex]").some(element => element.tabIndex > 0)) wrong.push("an order of its own for the keyboard");
  return wrong;
}"""

_OPERABLE = "a[href], button, input, select, textarea, summary, [tabindex], [onclick]"
_FOCUSED = """() => {
  const element = document.activeElement, style = getComputedStyle(element);
  if (element === document.body) return null;
  return {
    at: [...document.querySelectorAll("*")].indexOf(element),
    seen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 && element.checkVisibility(),
    what: element.outerHTML.slice(0, 60),
  };
}"""


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


def pale_text(page: Any) -> list[str]:
    """Text that stands out too little from what is behind it, fields and plots included."""
    found = page.evaluate(_CONTRAST, LEAST_CONTRAST)
    assert found["seen"] > 30, "there is text"
    return list(found["wrong"])


def cut_off(page: Any) -> list[str]:
    """What is wider than the page, hidden, cut, out of a picture or too small in it, or scrolls without a keyboard."""
    return list(page.evaluate(_CUT_OFF, LEAST_PIXELS))


def out_of_order(page: Any) -> list[str]:
    """What a screen reader would miss: a language, a title, headings, words for pictures and fields."""
    return list(page.evaluate(_STRUCTURE))


def out_of_reach(page: Any) -> list[str]:
    """What can be operated and is not reached by the tab key, or is reached and does not show it."""
    everything = "[...document.querySelectorAll('*')]"
    # Of a group of radio buttons one is reached, the others by arrows from it.
    wanted = page.evaluate(
        f"{everything}.map((e, i) => [e, i]).filter(([e]) => e.matches('{_OPERABLE}')"
        " && !(e.type === 'radio' && !e.checked) && e.checkVisibility()).map(([e, i]) => [i, e.outerHTML.slice(0, 60)])"
    )
    wrong, reached = [], set()
    for _ in range(len(wanted) + 2):
        page.keyboard.press("Tab")
        focused = page.evaluate(_FOCUSED)
        if focused is None:
            break
        reached.add(focused["at"])
        if not focused["seen"]:
            wrong.append(f"no focus is seen: {focused['what']}")
    return wrong + [f"not reached: {what}" for at, what in wanted if at not in reached]
