"Checks of the built site: links, anchors, alt texts, weights, and that nothing is loaded from another host."
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

LOADED = {  # tag -> attributes that name a file
    "script": ("src",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src", "srcset"), "audio": ("src",),
    "video": ("src", "poster"), "embed": ("src",), "object": ("data",), "image": ("href",), "use": ("href",)}
RELS = {"stylesheet", "icon", "shortcut", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch",
        "manifest", "apple-touch-icon"}
LIMIT = 1_500_000  # bytes of a page with all that it may load
CSS = re.compile(r"""(?:url\(\s*|@import\s+)['"]?([^'")\s;]+)""")

class Page(HTMLParser):
    "What a page links to, loads, and can be linked by."
    def __init__(self, text):
        super().__init__()
        self.ids, self.twice, self.links, self.loads, self.blind, self.style = set(), set(), [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, pairs):
        a = {k: v or "" for k, v in pairs}
        for key in {a.get("id"), a.get("name") if tag == "a" else None} - {None, ""}:
            if key in self.ids: self.twice.add(key)
            self.ids.add(key)
        if tag == "a" and "href" in a: self.links.append(a["href"])
        for key in LOADED.get(tag, ()):
            if key == "srcset": self.loads += [part.split()[0] for part in a.get(key, "").split(",") if part.split()]
            elif key in a: self.loads.append(a[key])
        if tag == "link" and RELS & set(a.get("rel", "").split()): self.loads.append(a.get("href", ""))
        if tag == "img" and not a.get("alt", "").strip(): self.blind.append(a.get("src", "")[:60])
        self.loads += CSS.findall(a.get("style", ""))
        self.style = tag == "style"

    def handle_data(self, data):
        if self.style: self.loads += CSS.findall(data)

    def handle_endtag(self, tag): self.style = False

def remote(target): return target.startswith("//") or urlsplit(target).scheme in ("http", "https", "ftp", "ws", "wss")

def texts(
    site: Path,  # the built site
    pattern: str,  # of names of files
) -> dict:  # name -> text
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in sorted(site.rglob(pattern))}

def find(
    page: str,  # name of the page where it stands
    target: str,  # of a link, or what is loaded
    base: str,  # path of the site's address
):  # the file and the fragment that it means; None: outside
    url = urlsplit(urljoin(f"http://site{base}{page}", target))
    if url.netloc != "site" or url.scheme != "http": return None
    path = unquote(url.path).removeprefix(base) if url.path.startswith(base) else unquote(url.path).lstrip("/")
    if path == "" or path.endswith("/"): path += "index.html"
    return path, unquote(url.fragment)

def weights(
    site: Path,  # the built site
    pages: dict,  # name -> Page
    base: str,  # path of its address
) -> dict:  # name -> bytes
    """What a page and all that it may load weigh, as files: scripts, styles with every font they name, pictures, those
    far down and those for a browser without scripts too. The index of the search is loaded by who searches."""
    def files(name, targets): return {found[0] for target in targets if (found := find(name, target, base))}
    loaded = {name: files(name, page.loads) for name, page in pages.items()}
    fonts = {name: files(name, CSS.findall(text)) for name, text in texts(site, "*.css").items()}
    def weight(name):
        every = {name, *loaded[name]}.union(*(fonts.get(file, ()) for file in loaded[name]))
        return sum((site/file).stat().st_size for file in every if (site/file).is_file())
    return {name: weight(name) for name in pages}

def check(
    site: Path,  # the built site
    base: str = "/",  # path of its address: what links that start with / start with
) -> list[str]:  # what is wrong, a line each
    "Every link to a page or an anchor, every file that a page loads and their weight, every picture's alt text."
    pages, wrong = {name: Page(text) for name, text in texts(site, "*.html").items()}, []
    for name, page in pages.items():
        for target in page.links + page.loads:
            found = find(name, target, base)
            if found is None: continue
            path, fragment = found
            if not (site/path).is_file(): wrong.append(f"{name}: {target}: there is no such file")
            elif fragment and target in page.links and path in pages and fragment not in pages[path].ids:
                wrong.append(f"{name}: {target}: the page has no such anchor")
        wrong += [f"{name}: loads {target} from another host" for target in page.loads if remote(target)]
        wrong += [f"{name}: {src}: a picture without alt text" for src in page.blind]
        wrong += [f"{name}: the id {key} stands twice" for key in sorted(page.twice) if not key.startswith("__")]
    for name, text in texts(site, "*.css").items():
        wrong += [f"{name}: loads {target} from another host" for target in CSS.findall(text) if remote(target)]
    for name, weight in weights(site, pages, base).items():
        if weight > LIMIT: wrong.append(f"{name}: weighs {weight/1e6:.2f} MB with what it loads, more than {LIMIT/1e6}")
    return wrong
