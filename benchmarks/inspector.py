"""From a click on a head to its picture on the screen, in Chromium, by size of the model: one model, and three drawn
over each other; and from a click on a word or a picture of the viewer. What goes to the browser, and how long the page
takes until it is drawn. The target is 100 ms in the median and 200 ms in 99 of 100 clicks.
Needs playwright and a Chromium."""
import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright

from laid_nb.explore import page_of, shipped_views, view_of
from laid_nb.inspector import HeadInspector, HeadSpectra
from laid_nb.rope import RopeSpec
from measure import table, write

SIZES = [(4, 4, 2, 48), (28, 28, 4, 100), (64, 40, 8, 112)]  # layers, heads, KV heads, bins of distance
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
PAINTED = """() => {
  window.times = [];
  window.addEventListener("click", () => {
    const start = performance.now(), channel = new MessageChannel();
    channel.port1.onmessage = () => window.times.push(performance.now() - start);
    requestAnimationFrame(() => channel.port2.postMessage(0));  // comes when the frame is painted
  }, true);
}"""


def made(name, layers, heads, kv_heads, bins, frequencies=90):
    "Spectra of a model of that size, from random numbers."
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=generator)
    spec = RopeSpec(1e6**(-torch.arange(64)/64), torch.tensor([0]*16 + [1]*24 + [2]*24), 128)
    edges, wavelength = torch.cat([torch.zeros(1), torch.logspace(0, 4, bins)]), torch.logspace(4, .3, frequencies)
    response = draw(layers, heads, bins) - .5
    power = draw(layers, heads, frequencies)
    mass = draw(layers, heads, bins)/bins
    energy = draw(layers, heads, 64)/64, draw(layers, kv_heads, 64)/64
    numbers = [draw(layers, heads) for _ in range(5)]
    return HeadSpectra(name, 50, spec, edges, response, mass, edges, response, wavelength, power, wavelength, power,
                       *energy, *numbers)


def clicked(browser, views, places, clicks):
    "Milliseconds of each click, the page's megabytes, and seconds until it is drawn; places: page -> [(x, y)]."
    text = page_of("heads", views)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "page.html").write_text(text, encoding="utf-8")
        page = browser.new_page(viewport=dict(width=1440, height=1600), bypass_csp=True)
        start = time.perf_counter()
        page.goto(Path(folder, "page.html").as_uri())
        page.locator(".laid-view").last.wait_for()
        drawn = time.perf_counter() - start
        page.evaluate(PAINTED)
        points = places(page)
        for i in range(clicks):
            page.mouse.click(*points[7*i % len(points)])
            page.wait_for_function(f"window.times.length > {i}")
        times = page.evaluate("window.times")
        page.close()
    return times, len(text)/1e6, drawn


def cells(page):
    "Points within every grid of heads."
    boxes = [box.bounding_box() for box in page.locator(".laid-cells").all()]
    return [(box["x"] + 40 + (box["width"] - 46)*x/9, box["y"] + 34 + (box["height"] - 40)*y/9)
            for box in boxes for x in range(10) for y in range(10)]


def words_and_pictures(page):
    "Points on words, and on pictures of the first model."
    found = page.locator(".laid-words button, section:first-child [data-picture]").all()
    return [(box["x"] + 4, box["y"] + 4) for box in (one.bounding_box() for one in found)]


def row(what, models, times, size, drawn):
    "A row of the table."
    return {"clicked": what, "models drawn": models, "clicks": len(times),
            "median ms": round(statistics.median(times), 1),
            "99 of 100 ms": round(sorted(times)[math.ceil(.99*len(times)) - 1], 1),
            "slowest ms": round(max(times), 1), "page MB": round(size, 2), "drawn after s": round(drawn, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model and three clicks, nothing written")
    quick = parser.parse_args().quick
    sizes, clicks = (SIZES[:1], 3) if quick else (SIZES, 200)
    rows = []
    with sync_playwright() as p:
        installed = "/usr/bin/chromium" if Path("/usr/bin/chromium").exists() else None
        browser = p.chromium.launch(executable_path=installed, args=ARGUMENTS)
        for size in sizes:
            for models in (1, 3):
                views = [view_of(HeadInspector([made(f"model {i}", *size) for i in range(models)]))]
                rows.append(row("{} layers, {} heads".format(*size), models, *clicked(browser, views, cells, clicks)))
        rows.append(row("words, pictures", 3, *clicked(browser, shipped_views()[:1], words_and_pictures, clicks)))
        browser.close()
    print(table(rows))
    if quick: return
    write("bench_inspector", rows, load=[round(x, 1) for x in os.getloadavg()])  # what else ran in 1, 5 and 15 minutes


if __name__ == "__main__":
    main()
