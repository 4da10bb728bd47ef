// What tests/browser.py asks of a page as a browser shows it: each answers with what is wrong.
({
  // Text, of fields and plots too, against what is painted behind its middle.
  pale(least) {
    const rgba = (text) => {
      const [r, g, b, a = 1] = (text.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
      return [r, g, b, a];
    };
    const over = ([r, g, b, a], under) => [r, g, b].map((value, i) => a * value + (1 - a) * under[i]);
    const light = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => {
      const value = colour[i] / 255;
      return sum + share * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    }, 0);
    const opacity = (element) => (element ? getComputedStyle(element).opacity * opacity(element.parentElement) : 1);
    const paint = (element) => {
      const style = getComputedStyle(element), shape = element.ownerSVGElement;
      const colour = rgba(shape ? (style.fill === "none" ? "rgba(0,0,0,0)" : style.fill) : style.backgroundColor);
      return [...colour.slice(0, 3), colour[3] * (shape ? style.fillOpacity : 1) * opacity(element)];
    };
    const canvas = matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
    const behind = (x, y) => document.elementsFromPoint(x, y)
      .filter((layer) => !layer.closest("svg text")).reverse()
      .reduce((colour, layer) => over(paint(layer), colour), canvas);

    const wrong = [];
    let seen = 0;
    const check = (element, place, text) => {
      if (element.closest(".scroll")) element.scrollIntoView({ block: "nearest", inline: "center" });
      const box = place(), x = box.x + box.width / 2, y = box.y + box.height / 2;
      if (!box.width || !document.elementsFromPoint(x, y).length) return wrong.push(`not on the screen: ${text}`);
      const style = getComputedStyle(element), back = behind(x, y);
      const [r, g, b, a] = rgba(element.ownerSVGElement ? style.fill : style.color);
      const [low, high] = [light(over([r, g, b, a * opacity(element)], back)), light(back)].sort((p, q) => p - q);
      const contrast = (high + 0.05) / (low + 0.05);
      seen += 1;
      if (contrast < least) wrong.push(`${contrast.toFixed(2)}: ${text.slice(0, 60)}`);
    };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = texts.nextNode(); node; node = texts.nextNode()) {
      const element = node.parentElement, unseen = "script, style, noscript, option, title, metadata, defs";
      if (!node.data.trim() || element.closest(unseen) || !element.checkVisibility()) continue;
      const range = document.createRange();
      range.selectNodeContents(node);
      const drawn = element.ownerSVGElement;
      check(element, () => (drawn ? element.getBoundingClientRect() : range.getClientRects()[0]), node.data.trim());
    }
    for (const field of document.querySelectorAll("input[type=number], select")) {
      check(field, () => field.getBoundingClientRect(), field.id);
    }
    return { wrong, seen };
  },

  // What is wider than the page, hidden, or out of reach of the keyboard where it scrolls; and the text of plots.
  cutOff(least) {
    const wrong = [], width = document.documentElement.clientWidth, whole = document.documentElement.scrollWidth;
    const start = (element) => `${element.tagName} ${element.textContent.trim().slice(0, 40)}`;
    if (whole > width) wrong.push(`the page is ${whole} wide`);
    for (const element of document.querySelectorAll("body *:not(svg *, script, style, noscript, option)")) {
      const box = element.getBoundingClientRect();
      if (!element.closest(".scroll") && box.right > width + 1) wrong.push(`beyond the edge: ${start(element)}`);
      if (element.tagName === "TD" && !(box.width && element.checkVisibility())) wrong.push(`hidden: ${start(element)}`);
      const flow = getComputedStyle(element).overflowX, scrolls = ["auto", "scroll"].includes(flow);
      if (flow === "hidden" && element.scrollWidth > element.clientWidth + 1) wrong.push(`cut off: ${start(element)}`);
      const named = element.getAttribute("role") === "region" && element.getAttribute("aria-label");
      if (scrolls && !(named && element.tabIndex === 0)) wrong.push(`it scrolls without a keyboard: ${start(element)}`);
    }
    for (const svg of document.querySelectorAll("figure svg")) {
      const frame = svg.getBoundingClientRect(), scale = frame.width / svg.viewBox.baseVal.width;
      for (const text of svg.querySelectorAll("text, tspan")) {
        const box = text.getBoundingClientRect(), pixels = parseFloat(getComputedStyle(text).fontSize) * scale;
        const out = [frame.left - box.left, box.right - frame.right, frame.top - box.top, box.bottom - frame.bottom];
        if (pixels < least) wrong.push(`${pixels.toFixed(1)} pixels: ${text.textContent}`);
        if (Math.max(...out) > 1) wrong.push(`out of its picture: ${text.textContent}`);
      }
    }
    return wrong;
  },

  // What somebody who does not see the page would miss.
  unnamed() {
    const wrong = [], all = (selector) => [...document.querySelectorAll(selector)];
    const start = (element) => element.outerHTML.slice(0, 60);
    if (!document.documentElement.lang) wrong.push("no language");
    if (!document.title.trim()) wrong.push("no title");
    const levels = all("h1, h2, h3, h4, h5, h6").map((heading) => Number(heading.tagName[1]));
    const jumps = levels.some((level, i) => (i ? level > levels[i - 1] + 1 || level === 1 : level !== 1));
    if (jumps) wrong.push(`headings out of order: ${levels}`);
    for (const picture of all("img, svg, canvas, [role=img]")) {
      const words = picture.tagName === "IMG" ? picture.alt : picture.getAttribute("aria-label");
      const named = picture.tagName === "IMG" || picture.getAttribute("role") === "img";
      if (!named || !(words || "").trim()) wrong.push(`a picture without words: ${start(picture)}`);
    }
    for (const field of all("input, select, textarea")) {
      const words = [...field.labels].map((label) => label.textContent).join("");
      if (!words.trim()) wrong.push(`a field without a label: ${start(field)}`);
    }
    for (const group of all("fieldset")) if (!group.querySelector("legend")) wrong.push("fields without a legend");
    const ids = all("[id]").map((element) => element.id), twice = ids.filter((id, i) => ids.indexOf(id) !== i);
    if (twice.length) wrong.push(`names given twice: ${[...new Set(twice)]}`);
    if (all("[tabindex]").some((element) => element.tabIndex > 0)) wrong.push("an order of its own for the keyboard");
    return wrong;
  },

  // What the tab key must reach; of a group of radio buttons one, the others are reached from it by arrows.
  operable() {
    const kinds = "a[href], button, input, select, textarea, summary, [tabindex], [onclick]";
    return [...document.querySelectorAll("*")].map((element, at) => ({ element, at, what: element.outerHTML.slice(0, 60) }))
      .filter(({ element }) => element.matches(kinds) && element.checkVisibility())
      .filter(({ element }) => element.type !== "radio" || element.checked)
      .map(({ at, what }) => ({ at, what }));
  },

  // Where the keyboard is, and whether that is to be seen.
  focused() {
    const element = document.activeElement, style = getComputedStyle(element);
    if (element === document.body) return null;
    const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 && element.checkVisibility();
    return { at: [...document.querySelectorAll("*")].indexOf(element), what: element.outerHTML.slice(0, 60), seen };
  },

  // The colours of the bars whose labels are this name, whatever its case, and of its marks on the estimate's page.
  coloursOf(name) {
    const called = (element) => element.textContent.toLowerCase() === name;
    const painted = (element) => {
      const style = getComputedStyle(element);
      return element.tagName === "path" && style.fill !== "none" && style.opacity > 0;
    };
    const bars = [...document.querySelectorAll("figure svg text")].filter(called).map((label) => {
      const box = label.getBoundingClientRect(), steps = [...Array(12).keys()];
      const beside = steps.flatMap((i) => document.elementsFromPoint(box.right + 2 * i, box.y + box.height / 2));
      return beside.find(painted);
    });
    const marks = [...document.querySelectorAll("#bars span")].filter(called);
    const colours = [...bars.filter(Boolean).map((bar) => getComputedStyle(bar).fill),
      ...marks.map((mark) => getComputedStyle(mark).borderLeftColor)];
    return [...new Set(colours)].map((colour) =>
      "#" + colour.match(/\d+/g).slice(0, 3).map((part) => Number(part).toString(16).padStart(2, "0")).join(""));
  },
})
