"""Pictures of the built site for docs/screens.md: `python docs/screenshots.py` after `make docs`.
Fails where a page asks another host for something, writes an error to the console, or is wider than the screen.

`python docs/screenshots.py FOLDER` also writes each page light, dark and at a phone's width to FOLDER, to look at."""
import functools
import http.server
import io
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
PAGES = {"home": "index.html", "notebook": "00_rope.html#a-rotation-of-pairs",
         "experiment": "experiments/why.html#count-by-distance", "api": "api/rope.html", "cli": "cli.html",
         "glossary": "glossary.html", "play": "play.html", "inspector": "12_inspector.html#what-is-built-here",
         "viewer": "12c_viewer.html#the-viewer",
         "playground": "play.html#rope-under-sliders"}
SHOWN = {"home": ("light", 1440), "notebook": ("light", 1440), "experiment": ("dark", 1440), "api": ("light", 1440),
         "cli": ("dark", 390), "play": ("dark", 1440), "inspector": ("light", 1440), "viewer": ("light", 1440),
         "playground": ("light", 1440)}
ROOMS = (("light", 1440), ("dark", 1440), ("light", 390), ("dark", 390))

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass

@contextmanager
def served(folder):  # yields the address
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_address[1]}"
    finally: server.shutdown()

def small(
    data: bytes,  # PNG
    path: Path,
):
    "Written with 256 colours: what is on these pages is text and lines."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(data)).convert("RGB").quantize(256).save(path, optimize=True)

def look(
    browser,
    address: str,  # of a page
    scheme: str,  # "light" or "dark"
    width: int,  # of the screen
) -> tuple[bytes, list[str]]:  # PNG, and what was wrong
    "Show a page, wait for its maths."
    wrong, height = [], 900 if width > 500 else 844
    page = browser.new_page(viewport=dict(width=width, height=height), color_scheme=scheme)
    page.on("console", lambda message: wrong.append(f"{address}: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(f"{address}: {error}"))
    own = (address[:address.index("/", 8)], "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(own) else wrong.append(f"{address}: asks for {r.url}"))
    page.goto(address)
    page.wait_for_load_state("networkidle")
    if page.locator('script[src*="maths.js"]').count():
        page.wait_for_function("document.documentElement.dataset.maths", timeout=60_000)
    page.wait_for_timeout(300)
    wide = page.evaluate("document.scrollingElement.scrollWidth")
    if wide > width: wrong.append(f"{address}: {wide} pixels wide on a screen of {width}")
    broken = page.evaluate("[...document.querySelectorAll('.katex-error')].map(e => e.textContent)")
    wrong += [f"{address}: maths not understood: {text}" for text in broken]
    if "#" in address: page.evaluate("document.getElementById(location.hash.slice(1)).scrollIntoView()")
    picture = page.screenshot()
    page.close()
    return picture, wrong

def main(folder=None):
    wrong = []
    with served(ROOT/"site") as address, sync_playwright() as p:
        installed = "/usr/bin/chromium" if Path("/usr/bin/chromium").exists() else None
        browser = p.chromium.launch(executable_path=installed, args=ARGUMENTS)
        for name, page in PAGES.items():
            for room in ROOMS if folder else [SHOWN[name]] if name in SHOWN else []:
                picture, faults = look(browser, f"{address}/{page}", *room)
                wrong += faults
                if folder: small(picture, Path(folder)/f"{name}-{room[0]}-{room[1]}.png")
                if SHOWN.get(name) == room: small(picture, ROOT/"docs"/"screens"/f"{name}.png")
        browser.close()
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))

if __name__ == "__main__": main(*sys.argv[1:])
