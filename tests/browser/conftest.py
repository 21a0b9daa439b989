"""A browser, JupyterLab and `laid inspect` for the tests of this folder. Whatever goes wrong on a page fails the test that used it: see `Watched`."""
import functools
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
WAIT = 60_000  # ms; a loaded machine is slow, and nothing is slept through


def pytest_addoption(parser): parser.addoption("--screens", metavar="FOLDER", help="write a picture of every widget there")


class Watched:
    "A page, and everything that went wrong on it."
    def __init__(self, browser, log: Path, **options):
        self.page, self.log, self.wrong, self.logged = browser.new_page(**(dict(viewport=dict(width=1280, height=900)) | options)), log, [], 0
        self.page.set_default_timeout(WAIT)
        self.page.on("console", lambda message: message.type == "error" and self.wrong.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"page: {error}"))
        self.page.on("request", lambda request: re.match(r"(https?://127\.0\.0\.1:|data:|blob:)", request.url) or self.wrong.append(f"asks for {request.url}"))
        self.page.on("websocket", lambda websocket: websocket.on("framereceived", self.frame))

    def frame(self, data):
        "A message from a kernel: an exception in a cell or a callback."
        found = re.search(rb'"msg_type":\s*"error"', data := data.encode() if isinstance(data, str) else data)
        if found: self.wrong.append("kernel: " + (re.search(rb'"evalue":\s*"((?:[^"\\]|\\.)*)"', data) or [0, data])[1].decode(errors="replace"))

    def check(self):
        "AssertionError for what went wrong since the last time."
        if self.page.locator(".jp-NotebookPanel-toolbar [data-status]").count(): self.page.locator('.jp-NotebookPanel-toolbar [data-status="idle"]').wait_for()
        self.wrong += [f"shown: {text}" for text in self.page.locator(".laid-error").all_inner_texts()]
        if self.log:
            text = self.log.read_text(encoding="utf-8", errors="replace")
            text, self.logged = text[self.logged:], len(text)
            if re.search(r"Traceback|Exception|\bERROR\b", text): self.wrong.append(f"log: {text}")
        wrong, self.wrong = self.wrong, []
        assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="session")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert path, f"none of {', '.join(BROWSERS)} is installed"
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def screen(request):
    "A function that keeps a picture of what a locator finds, with --screens."
    folder = request.config.getoption("--screens")
    def keep(name, locator):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(locator.screenshot())).convert("RGB").quantize(256).save(Path(folder, f"{name}.png"), optimize=True)
    return keep


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    "Of servers and kernels: settings of the user play no part and nothing is written to them."
    folder = tmp_path_factory.mktemp("jupyter")
    for name, text in (("notebook-extension/tracker", '{"windowingMode": "none"}'),  # cells out of sight stay on the page
                       ("apputils-extension/notification", '{"fetchNews": "false", "checkForUpdates": false}')):
        settings = folder/f"lab/@jupyterlab/{name}.jupyterlab-settings"
        settings.parent.mkdir(parents=True)
        settings.write_text(text)
    return os.environ | dict(JUPYTER_CONFIG_DIR=str(folder/"config"), JUPYTER_DATA_DIR=str(folder/"data"), JUPYTERLAB_SETTINGS_DIR=str(folder/"lab"), JUPYTERLAB_WORKSPACES_DIR=str(folder/"workspaces"), IPYTHONDIR=str(folder/"ipython"),
                             JUPYTER_TOKEN="a-token", HF_HUB_OFFLINE="1", MPLBACKEND="Agg", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")


def changed(picture, act):
    "Do something and wait until the picture is another; its new text."
    before = picture.get_attribute("src")
    act()
    expect(picture).not_to_have_attribute("src", before, timeout=WAIT)
    return picture.get_attribute("alt")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def end(process):
    "Ctrl-C; the exit code."
    process.send_signal(2)
    try: return process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


@pytest.fixture(scope="session")
def lab(browser, environment, tmp_path_factory):
    "A function that opens a notebook of nbs/ in JupyterLab and runs it, once for all tests that ask for it."
    folder = tmp_path_factory.mktemp("notebooks")
    port, log = free_port(), folder/"server.log"
    (work := folder/"nbs").mkdir()
    with open(log, "w") as stream:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "-y", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={work}"], env=environment, stdout=stream, stderr=stream)
    pages = {}

    def open_notebook(source: Path):
        if source not in pages:
            notebook = json.loads(source.read_text(encoding="utf-8"))
            notebook["cells"] = [cell for cell in notebook["cells"] if not re.search(r"^#\|\s*slow|nbdev_export\(\)", "".join(cell["source"]), re.M)]
            for cell in notebook["cells"]:
                if cell["cell_type"] == "code": cell |= dict(outputs=[], execution_count=None)
            (work/source.name).write_text(json.dumps(notebook), encoding="utf-8")
            pages[source] = watched = Watched(browser, log)
            page = watched.page
            page.goto(f"http://127.0.0.1:{port}/lab/workspaces/{source.stem}/tree/{source.name}?token={environment['JUPYTER_TOKEN']}")
            page.locator(".jp-KernelName", has_text="Python 3").wait_for()  # "idle" alone is also what an indicator without a kernel says
            page.locator('.jp-NotebookPanel-toolbar [data-status="idle"]').wait_for()
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            last = max(i for i, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code")
            page.locator(".jp-Notebook-cell").nth(last).locator(".jp-InputPrompt").filter(has_text=re.compile(r"\[\d+\]")).wait_for()
        return pages[source]
    try:
        while True:
            assert server.poll() is None, log.read_text()
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api").close()
            except OSError: time.sleep(.1)
            else: break
        yield open_notebook
    finally:
        end(server)


@pytest.fixture(scope="session")
def inspect(environment, tmp_path_factory):
    "`laid inspect`: the address it says, its log, its process."
    folder = tmp_path_factory.mktemp("inspect")
    with open(folder/"server.log", "w") as stream:
        process = subprocess.Popen([sys.executable, "-c", "from laid_nb.cli import main; raise SystemExit(main())", "inspect", "--no-browser", "--out", str(folder/"laid-inspect")], env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=stream, text=True)
    try:
        address = next((line.strip() for line in process.stdout if line.startswith("http")), None)
        assert address, (folder/"server.log").read_text()
        yield address, folder/"server.log", process
    finally:
        if process.poll() is None: end(process)


@pytest.fixture(scope="session")
def site():
    "The address of the built site."
    if not (ROOT/"site/index.html").exists(): pytest.skip("site/ is not built: make docs")
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(ROOT/"site")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
