"""`laid inspect` in a browser: Voilà on 127.0.0.1 behind its token, the widgets at work, no trace of it when it has ended."""
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from conftest import Watched, changed, end


@pytest.fixture(scope="module")
def watched(browser, inspect):
    address, log, _ = inspect
    watched = Watched(browser, log)
    watched.page.goto(address)
    watched.page.locator(".laid img").first.wait_for()
    yield watched
    watched.page.close()


def status(address):
    try:
        with urllib.request.urlopen(address) as reply: return reply.status, reply.url, reply.read().decode()
    except urllib.error.HTTPError as e: return e.code, address, ""


def test_the_heads_are_shown_and_a_click_chooses_one(watched, screen):
    page = watched.page
    cells, picture = page.locator(".laid-grid-cells").first, page.locator(".laid img").first
    assert changed(picture, lambda: cells.click(position=dict(x=5, y=5)))
    assert "layer 0, head 0" in page.locator(".laid-grid-readout").first.inner_text()
    page.mouse.move(0, 0)
    screen("inspect", page)
    watched.check()


def test_the_playground_is_below(watched):
    page = watched.page
    page.get_by_role("heading", name="Rotations").wait_for()
    watched.check()


@pytest.mark.parametrize("query", ["", "?token=wrong"])
def test_without_the_token_there_is_nothing_but_a_login(inspect, query):
    base = inspect[0].split("?")[0]
    code, url, text = status(base + query)
    assert urllib.parse.urlsplit(url).path == "/login" and "laid" not in text
    for path in ("api/kernels/00000000-0000-0000-0000-000000000000", "voila/files/laid-inspect/open.html", "voila/files/picture.png"):
        assert status(f"{base}{path}{query}")[0] == 403, path


def test_no_other_address_of_the_machine_answers(inspect):
    port = urllib.parse.urlsplit(inspect[0]).port
    for line in open("/proc/net/tcp"):
        local, state = (line.split() + [""]*4)[1:4:2]
        if state == "0A" and int(local.split(":")[1], 16) == port: assert local.split(":")[0] == "0100007F"
    assert socket.create_connection(("127.0.0.1", port)).close() is None


def kernels(process):
    "Processes of kernels below the server."
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try: text, line = stat.read_text(), (stat.parent/"cmdline").read_text()
        except OSError: continue
        if int(text.rpartition(")")[2].split()[1]) == process.pid and "ipykernel" in line: found.add(int(stat.parent.name))
    return found


def settled(process, wanted):
    "Wait for a set of kernels that `wanted` accepts."
    end = time.monotonic() + 60
    while not wanted(now := kernels(process)):
        assert time.monotonic() < end, now
        time.sleep(.1)
    return now


def test_a_reload_and_a_closed_tab_end_their_kernels(browser, inspect, watched):
    address, log, process = inspect
    kept = settled(process, lambda now: len(now) == 1)
    page = Watched(browser, log)
    page.page.goto(address)
    page.page.locator(".laid img").first.wait_for()
    first, = settled(process, lambda now: len(now) == 2) - kept
    page.page.reload()
    page.page.locator(".laid img").first.wait_for()
    second, = settled(process, lambda now: len(now) == 2 and first not in now) - kept
    page.page.close(run_before_unload=True)
    assert settled(process, lambda now: second not in now) == kept


@pytest.mark.parametrize("headers", [{}, {"Origin": "http://127.0.0.1:1"}])
def test_nobody_else_ends_a_kernel(inspect, watched, headers):
    address, _, process = inspect
    before = kernels(process)
    name = watched.page.evaluate("JSON.parse(document.getElementById('jupyter-config-data').textContent).kernelId")
    request = urllib.request.Request(f"{address.split('?')[0]}voila/api/shutdown/{name}", b"", headers, method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused: urllib.request.urlopen(request)
    assert refused.value.code in (403, 404) and kernels(process) == before


def test_ctrl_c_ends_it(inspect, watched):  # the last test: no server after it
    address, log, process = inspect
    watched.check()
    assert end(process) == 0 and not re.search("Traceback|Exception", log.read_text())
    with pytest.raises(OSError): urllib.request.urlopen(address)
