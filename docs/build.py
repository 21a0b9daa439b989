"""The documentation site. `python docs/build.py`: notebooks and the pages of docs/ -> _docs_src/ -> site/, checked.
No network, nothing is run.

Also a hook of mkdocs: a notebook's HTML gets the theme's own markup instead of JupyterLab's style sheets."""
import argparse
import ast
import base64
import configparser
import html
import importlib
import inspect
import io
import json
import logging
import os
import re
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES, SITE = ROOT/"_docs_src", ROOT/"site"
sys.path[:0] = [str(ROOT/"docs"), str(ROOT)]

from mkdocs_jupyter.utils import slugify

import reference
from check import check
from laid_nb import page as web

SETTINGS = configparser.ConfigParser(interpolation=None)
SETTINGS.read(ROOT/"settings.ini")
SETTINGS = SETTINGS["DEFAULT"]
REPOSITORY = f"{SETTINGS['git_url']}/blob/{SETTINGS['branch']}"
BASE = SETTINGS["doc_baseurl"].rstrip("/") + "/"
SECTIONS = {"Understand": (0, 5), "Use": (6, 99)}    # numbers of the notebooks
PLAY = ("12", "12a", "12b", "12c", "12d")  # notebooks to be played with, in a section of their own
PICTURES = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}
NOTEBOOK_KEYS = ("cell_type", "id", "metadata", "source", "outputs", "execution_count")
FOLDS = {  # why a cell's code is folded -> what is read there
    "imports": "Imports", "examples": "Imports of the examples", "plotting": "Plotting code", "code": "Code"}

PLAY_TOP = """# Play

> Three small models, the teacher, the student, and the student distilled from it: where they look, what their heads do.
> And RoPE under sliders.

What you see of the models was measured beforehand and is drawn by your browser; nothing is sent anywhere. For your own
checkpoints: `laid inspect`."""

class Refused(Exception):
    "What the reader would miss, with the place to mend it."

# --- what there is ------------------------------------------------------------
def joined(text): return text if isinstance(text, str) else "".join(text)

def read(path): return json.loads(Path(path).read_text(encoding="utf-8"))

def once(
    anchor: str,
    seen: dict,  # anchor -> how often so far
) -> str:  # its own, where the same heading comes again
    seen[anchor] = seen.get(anchor, -1) + 1
    return f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor

def headings(
    nb: dict,  # a notebook
):  # yields (cell, heading above it or in it, its anchor), code cells too
    title, anchor, seen = "", "", {}
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            prose = re.sub(r"```.*?```", "", joined(cell["source"]), flags=re.S)
            for found in re.finditer(r"^#{1,6} (.+)$", prose, re.M):
                title, anchor = found[1].strip(), once(slugify(re.sub(r"[`*]", "", found[1])), seen)
        yield cell, title, anchor

def defined(
    source: str,  # of a code cell
) -> list[str]:  # names that it defines at its top level
    names = []
    for node in ast.parse(source).body:
        patched = any("patch" in ast.unparse(d) for d in getattr(node, "decorator_list", ()))  # a method of a class
        if patched: continue
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)): names.append(node.name)
        elif isinstance(node, ast.Assign):
            parts = [n for target in node.targets for n in ast.walk(target)]
            names += [n.id for n in parts if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name): names.append(node.target.id)
    return names

def directive(source, name):
    found = re.search(rf"^#\|\s*{name}(?::[ \t]*|[ \t]+|$)(.*)$", source, re.M)
    return None if found is None else found[1].strip()

def module_of(nb):  # name of the module that a notebook exports, or None
    code = [joined(cell["source"]) for cell in nb["cells"] if cell["cell_type"] == "code"]
    return next((name for source in code if (name := directive(source, "default_exp"))), None)

class Names:
    "Public names of laid_nb: where the API page and the notebook's section are."
    def __init__(self, notebooks):
        self.modules, self.where, self.pages = {}, {}, {}
        for path, nb in notebooks.items():
            name = module_of(nb)
            if name is None: continue
            module, page = importlib.import_module(f"laid_nb.{name}"), path.with_suffix(".html").as_posix()
            self.modules[name], self.pages[name], self.where[name] = module, page, {}
            for cell, title, anchor in headings(nb):
                source = joined(cell["source"])
                if cell["cell_type"] == "code" and directive(source, "export") is not None:
                    place = (f"{page}#{anchor}", title.replace("`", ""))
                    for n in defined(source): self.where[name].setdefault(n, place)
            missing = [n for n in module.__all__ if n not in self.where[name]]
            if missing:
                raise Refused(f"laid_nb.{name} has {missing[0]}, which no exported cell of {path} defines: make export")
        self.known = {}
        for name, module in self.modules.items():
            for n in module.__all__: self.known.setdefault(n, []).append(name)

    def page(self,
        name: str,  # as written in a text
        module: str | None,  # of the notebook where it stands
    ) -> str | None:  # the API page and anchor; None where another thing may be meant
        homes = self.known.get(name, [])
        if module in homes: return f"api/{module}.html#{name}"
        clear = len(homes) == 1 and re.search(r"_|[a-z][A-Z]|^[A-Z][a-z]", name)
        return f"api/{homes[0]}.html#{name}" if clear else None

# --- links and pictures -------------------------------------------------------
TEXT = re.compile(
    r"(```.*?```|~~~.*?~~~|\$\$.*?\$\$)|(`[^`\n]+`|\$[^$\n]+\$)"  # what is left alone, or linked to the API
    r"|(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([\w./#:%?=&~@+,-]+)\)"  # [label](link)
    r"|(<(?:img|a)\b[^>]*?\b(?:src|href)=\")([^\"]+)(\")", re.S)

class Links:
    "Rewrites what a text of one source file points to, for its place on the site."
    def __init__(self,
        source: Path,  # the file, relative to the repository
        page: Path,  # its page, relative to the site
        pages: dict,  # file of the repository -> page
        names: Names | None = None,
        module: str | None = None,  # of the notebook
        copied: Path | None = None,  # where pictures of the repository are put; None: _docs_src
        pages_as: str = ".html",  # suffix of links to pages; ".md" is checked by mkdocs
    ):
        self.source, self.page, self.pages = source, page, pages
        self.names, self.module, self.copied = names, module, copied or SOURCES

    def relative(self, target): return os.path.relpath(target, self.page.parent).replace(os.sep, "/")

    def target(self, link, picture=False):
        if re.match(r"[a-z]+:|#|//", link): return link
        path, _, fragment = link.partition("#")
        file = Path(os.path.normpath(self.source.parent/path))
        if file.suffix == ".ipynb": fragment = slugify(fragment)  # JupyterLab keeps capitals
        fragment = f"#{fragment}" if fragment else ""
        if file.as_posix() in self.pages: return self.relative(self.pages[file.as_posix()]) + fragment
        if os.path.normpath(self.page.parent/path) in self.pages.values(): return link
        if not (ROOT/file).exists(): raise Refused(f"{self.source}: the link {link} leads to no file of the repository")
        if not picture:
            top = REPOSITORY.replace("/blob/", "/tree/") if (ROOT/file).is_dir() else REPOSITORY
            return f"{top}/{file.as_posix()}{fragment}"
        if file.parts[:2] == ("docs", "screens"): return self.relative(file.relative_to("docs"))
        copy = Path("figures")/file.name
        (self.copied/copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/file, self.copied/copy)
        return self.relative(copy)

    def __call__(self, text):
        seen = set()
        def change(found):
            block, inline, bang, label, link, before, address, after = found.groups()
            if block: return block
            if inline:
                page = self.names and inline[0] == "`" and self.names.page(inline[1:-1], self.module)
                line = found.string[:found.start()].rsplit("\n", 1)[-1]
                if not page or page in seen or line.startswith(("#", "|")): return inline
                seen.add(page)
                return f"[{inline}]({self.relative(page)})"
            if address: return before + self.target(address, before.startswith("<img")) + after
            if bang and not label.strip(): raise Refused(f"{self.source}: the picture {link} has no alt text")
            inner = re.match(r"!\[([^\[\]]*)\]\(([^)]+)\)$", label)
            if inner: label = f"![{inner[1]}]({self.target(inner[2], True)})"
            return f"{bang}[{label}]({self.target(link, bool(bang))})"
        return TEXT.sub(change, text)

# --- notebooks ----------------------------------------------------------------
def lighter(
    data: bytes,  # PNG
) -> tuple[bytes, str]:  # the file, "webp" or "png": the smaller one
    """Lines and text in 256 colours, of which none is changed further; what has more than 16,000 shows pictures, which
    keep their colours and lose what the eye does not miss."""
    from PIL import Image
    made, image = io.BytesIO(), Image.open(io.BytesIO(data)).convert("RGB")
    if image.getcolors(16_000): image.quantize(256).convert("RGB").save(made, "WEBP", lossless=True)
    else: image.save(made, "WEBP", quality=90)
    return min((made.getvalue(), "webp"), (data, "png"), key=lambda made: len(made[0]))

def picture(
    data: bytes,  # of the file
    suffix: str,
    name: str,  # of the file to be made, without suffix
    alt: str,
    links: Links,
) -> str:  # HTML
    if suffix == "png": data, suffix = lighter(data)
    file = Path("figures")/f"{name}.{suffix}"
    (links.copied/file).parent.mkdir(parents=True, exist_ok=True)
    (links.copied/file).write_bytes(data)
    size = ""
    if suffix != "svg":
        from PIL import Image
        size = ' width="{}" height="{}"'.format(*Image.open(io.BytesIO(data)).size)
    where = links.relative(file)
    image = f'<img src="{where}" alt="{html.escape(alt)}"{size} loading="lazy">'
    return f'<a class="laid-figure" href="{where}">{image}</a>'

VIEW = re.compile(r'<div class="laid-static">(?:<img [^>]*>|<p>.*?</p>)<script [^>]*json".*?</script></div>', re.S)
SHOWN = re.compile(r'<img [^>]*\balt="([^"]*)"[^>]*\bsrc="data:image/png;base64,([^"]+)"[^>]*>')

def as_on_site(
    text: str,  # HTML of a view, as a notebook keeps it
    name: str,  # of the file of its picture, without suffix
    links: Links,
) -> str:  # HTML without script and style, which the page loads, and with its picture as a file
    def drawn(found):
        image = picture(base64.b64decode(found[2]), "png", name, html.unescape(found[1]), links)
        return f"<noscript>{image}</noscript>"
    return SHOWN.sub(drawn, VIEW.search(text)[0])

def outputs(
    cell: dict,
    alt: str | None,  # of its pictures
    place: str,  # notebook and cell, for an error
    links: Links,
    strict: bool = True,
) -> list[dict]:  # what the page shows of them
    shown = []
    for i, output in enumerate(cell.get("outputs", [])):
        output, data = dict(output), output.get("data", {})
        data = {kind: value for kind, value in data.items() if not kind.startswith("application/vnd.jupyter.widget")}
        kind = next((k for k in PICTURES if k in data), None)
        if VIEW.search(joined(data.get("text/html", ""))):
            name = f"{links.page.stem}-{cell['id']}-{i}"
            data = {"text/html": [as_on_site(joined(data["text/html"]), name, links)]}
        elif kind:
            if not alt:
                if strict:
                    remedy = "begin the cell with '#| fig-alt: what is to be seen'"
                    raise Refused(f"{place}: a figure without alt text; {remedy}")
                alt = "A figure"
            raw = joined(data[kind]).encode() if kind == "image/svg+xml" else base64.b64decode(joined(data[kind]))
            data = {"text/html": [picture(raw, PICTURES[kind], f"{links.page.stem}-{cell['id']}-{i}", alt, links)]}
        elif strict and joined(data.get("text/plain", "")).startswith("<Figure size"):
            remedy = "run the notebook with the inline backend of Matplotlib (import matplotlib.pyplot)"
            raise Refused(f"{place}: the figure was not drawn, only its name is stored; {remedy}")
        elif "text/markdown" in data: data = {"text/markdown": links(joined(data["text/markdown"]))}
        if "data" in output: output |= dict(data=data, metadata={})
        shown.append(output)
    return shown

DRAWS = re.compile(  # a line that draws
    r"\b(plt|ax|axes|axs|axis|fig|figure|panels?)\b *[.\[(]|\b(subplots|Figure|Rectangle)\("
    r"|\.(plot|imshow|set_\w+|text|legend|ax[hv]line|tick_params|scatter|barh?|fill_between|annotate|add_patch)\(")

def only_imports(
    source: str,  # of a code cell
) -> bool:  # or imports and not more calls, such as torch.manual_seed(0)
    body = ast.parse(source).body
    imports = sum(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)
    calls = sum(isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
                or isinstance(node, ast.Assign) and ast.unparse(node).startswith("_ = ") for node in body)
    return imports + calls == len(body) and imports >= calls

def folded(
    cell: dict,  # of a notebook, with its directives
) -> str | None:  # why its code is folded on the page, a key of FOLDS
    """Imports; a function that plots; a cell that shows a figure and mostly draws. Quarto's `#| code-fold: true`
    folds any other cell, `#| code-fold: false` none."""
    source = joined(cell["source"])
    asked = directive(source, "code-fold")
    python = re.sub(r"^\s*[%!].*$", "", source, flags=re.M)  # without magics
    code = [line for line in python.splitlines() if line.strip() and not line.strip().startswith("#")]
    if asked == "false" or not code: return None
    exported = any(directive(source, name) is not None for name in ("export", "exporti"))
    if only_imports(python) and not cell.get("outputs"): return "imports" if exported else "examples"
    share = sum(bool(DRAWS.search(line)) for line in code)/len(code)
    shows = any(kind in output.get("data", {}) for output in cell.get("outputs", []) for kind in PICTURES)
    plots = all(re.match("_?plot_", name) for name in defined(python) or [""])
    if exported and (share >= .4 or plots): return "plotting"
    if not exported and shows and share >= .4 and len(code) >= 4 and "assert" not in source: return "plotting"
    return "code" if asked == "true" else None

def processed(
    path: Path,  # relative to nbs/
    nb: dict,
    links: Links,
    names: Names,
    strict: bool = True,
) -> dict:  # what mkdocs-jupyter renders
    """No directives, no hidden cells; exported cells stay, with a table of parameters to unfold; imports and plotting
    code are folded, in an experiment all code; alt texts, pictures as files, links."""
    from execnb.nbio import nb2dict
    wrong, folds = [], {}
    for i, cell in enumerate(nb["cells"]):
        cell["metadata"] = {}                               # execution times and the like
        cell.setdefault("id", f"cell-{i}")
        cell["source"] = joined(cell["source"])
        if cell["cell_type"] != "code": continue
        place, alt = f"nbs/{path}, cell {cell['id']}", directive(cell["source"], "fig-alt")
        hidden = directive(cell["source"], "hide") is not None
        folds[cell["id"]] = folded(cell) or ("code" if path.parts[0] == "experiments" else None)
        try:
            cell["outputs"] = [] if hidden else outputs(cell, alt, place, links, strict)
        except Refused as e:
            wrong.append(str(e))
        cell["source"] = re.sub(r"^#\|\s*(fig-alt|code-fold):.*\n?", "", cell["source"], flags=re.M)
    if wrong: raise Refused("\n".join(wrong))
    cells, module = [], names.modules.get(module_of(read(ROOT/"nbs"/path)))
    for cell in without_directives(nb):
        exported = cell.cell_type == "code" and "export" in cell.directives_
        plain = nb2dict(cell)
        plain = {k: plain[k] for k in NOTEBOOK_KEYS if k in plain}
        plain |= dict(source=joined(plain["source"]), metadata={})
        if cell.cell_type == "markdown": plain["source"] = links(plain["source"])
        else: plain |= dict(outputs=plain.get("outputs", []), execution_count=None)
        if folds.get(plain["id"]): plain["metadata"] = dict(tags=[f"laid-fold-{folds[plain['id']]}"])
        if not plain["source"].strip() and not plain.get("outputs"): continue
        cells.append(plain)
        public = [n for n in defined(plain["source"]) if n in module.__all__] if exported and module else []
        for name in public:
            here = links.relative(names.page(name, module.__name__.split(".")[-1]))
            cells.append(text_cell(f"api-{name.replace('_', '-')}"[:64], in_api(name, getattr(module, name), here)))
    kernel = dict(display_name="python3", language="python", name="python3")
    return dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)

def without_directives(
    nb: dict,
) -> list:  # cells as nbdev's processing leaves them
    from execnb.nbio import dict2nb
    from nbdev import processors as p
    from nbdev.process import NBProcessor
    def default_exp_(cell, *_): del cell["source"]
    nb = dict2nb(nb)
    NBProcessor(nb=nb, process=True, procs=[
        p.populate_language, p.strip_ansi, p.hide_line, p.filter_stream_, p.rm_header_dash, p.hide_, default_exp_,
        p.strip_hidden_metadata])
    return nb.cells

def text_cell(name, source): return dict(cell_type="markdown", id=name, metadata={}, source=source)

def in_api(
    name: str,
    obj,  # what the module calls so
    here: str,  # address of its entry
) -> str:  # what stands below the cell that defines it: its parameters, to unfold, and the link
    body = reference.documented(obj) if inspect.isclass(obj) or inspect.isroutine(obj) else ""
    if not body: return f'<p class="laid-api"><a href="{here}"><code>{name}</code> in the API</a></p>'
    return (f'<details class="laid-api"><summary><code>{name}</code>: parameters</summary>\n\n{body}\n'
            f"[{name} in the API]({here})\n\n</details>")

def headed(
    nb: dict,  # as processed
    path: Path,  # relative to nbs/
    links: Links,
    names: Names,
):
    "The line below a notebook's title: its source, and its module."
    module = links.module
    place = f"nbs/{path.as_posix()}"
    line = f'<a href="{REPOSITORY}/{place}">Notebook <code>{place}</code></a>'
    if module: line += f' · <a href="{links.relative(f"api/{module}.html")}">API of <code>laid_nb.{module}</code></a>'
    line = f'<p class="laid-source">{line}</p>'
    first = next(c for c in nb["cells"] if c["cell_type"] == "markdown")
    top = re.compile(r"\A(# .+\n(?:\s*\n)?(?:>.*\n?)*)")
    first["source"] = top.sub(lambda found: f"{found[1].rstrip()}\n\n{line}\n\n", first["source"] + "\n")

PICTURE = r"^!\[([^\]]+)\]\(([^)]+)\)\n*(?:\*[^*\n]+\*\n*)?"  # and its caption, which the view has no need of

def home(
    nb: dict,  # nbs/index.ipynb as processed
    hero: str,  # HTML of docs/home.html
) -> dict:
    "The README as a front page: its picture answers to the pointer; of code only what it shows stays."
    cells, figure = [], ""
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            for output in cell["outputs"]:
                text = joined(output.get("data", {}).get("text/markdown", ""))
                if text: cells.append(text_cell(cell["id"], text))
            continue
        cell["source"] = re.sub(r"^\[!\[.*\n+", "", cell["source"], flags=re.M)  # badges come from another host
        if not figure and (found := re.search(PICTURE, cell["source"], re.M)):
            image = f'<img src="{found[2]}" alt="{html.escape(found[1])}">'
            figure = f'<a class="laid-figure" href="{found[2]}">{image}</a>'
            shown = hero.replace("{viewer}", placed(only_haystack(shipped_view(0), 50), figure))
            cell["source"] = cell["source"].replace(found[0], f"{shown}\n\n")
        cells.append(cell)
    if not figure: raise Refused("nbs/index.ipynb: the front page needs a picture, ![what is to be seen](file)")
    return nb | dict(cells=cells)

def shipped_view(i): return read(ROOT/"data"/"spectra"/"views.json")[i]

def only_haystack(
    view: dict,  # of haystacks
    images: int,  # of the one that stays
) -> dict:
    state = view["state"]
    kept = [h for h in state["view"]["haystacks"] if h["images"] == images]
    return view | dict(state=state | dict(view=state["view"] | dict(haystacks=kept), haystack=kept[0]["id"]))

def placed(
    view: dict,  # as laid_nb.explore keeps it
    figure: str,  # HTML of what is seen without a script
) -> str:  # HTML on one line, which Markdown leaves alone
    made = web.fragment(view["state"], view["words"])
    return re.sub(r"<p>.*?</p>", lambda _: f"<noscript>{figure}</noscript>", made, count=1, flags=re.S)

def play_page() -> str:  # Markdown
    "Everything that can be played with, on one page."
    from laid_nb.explore import view_of
    from laid_nb.playground import RopePlayground
    views = [shipped_view(0), shipped_view(1), view_of(RopePlayground())]
    parts = [f"## {v['heading']}\n\n{v['lead']}\n\n{placed(v, html.escape(v['words']))}" for v in views]
    return "\n\n".join([PLAY_TOP, *parts])

# --- the folder that mkdocs reads ----------------------------------------------
def order(
    paths: list,  # of notebooks, relative to nbs/
    index: str,  # text of nbs/index.ipynb
) -> list:
    "By number; those without one as the index's last table names them."
    def place(path):
        name, numbered = path.as_posix(), path.name[0].isdigit()
        return not numbered, path.name if numbered else "", index.rfind(name) if name in index else len(index), name
    return sorted((p for p in paths if p.name != "index.ipynb"), key=place)

def navigation(
    titles: dict,  # notebook (path relative to nbs/, in order) -> its title
    modules: list,  # names of those with an API page
    pages: dict,  # "your_pair.md" and so on -> title, of those that are there
) -> list:  # as in mkdocs.yml
    nav = [{"Home": "index.ipynb"}]
    numbered = {p: found for p in titles if p.parent == Path(".") and (found := re.match(r"(\d+)[a-z]*", p.name))}
    first_page = {page: pages[page] for page in ("your_pair.md",) if page in pages}
    more = {page: title for page, title in (first_page | {"cli.md": "The command line"} | pages).items()
            if page != "glossary.md"}
    played = {p: found for p, found in numbered.items() if found[0] in PLAY}
    for section, (first, last) in SECTIONS.items():
        part = [{f"{found[0]} {titles[p]}": p.as_posix()} for p, found in numbered.items()
                if first <= int(found[1]) <= last and p not in played]
        if section == "Use": part += [{title: page} for page, title in more.items()]
        nav.append({section: part})
    nav.insert(1, {"Play": [{"Try it here": "play.md"},
                            *({f"{found[0]} {titles[p]}": p.as_posix()} for p, found in played.items())]})
    nav.append({"Evidence": [{title: p.as_posix()} for p, title in titles.items() if p.parts[0] == "experiments"]})
    nav.append({"API": [{"Modules": "api/index.md"}, *({m: f"api/{m}.md"} for m in reference.helpers_last(modules))]})
    if "glossary.md" in pages: nav.append({"Glossary": "glossary.md"})
    placed = json.dumps(nav)
    lost = [p.as_posix() for p in titles if f'"{p.as_posix()}"' not in placed]
    if lost:
        remedy = "begin its name with a number, or put it into nbs/experiments"
        raise Refused(f"nbs/{lost[0]} has no place in the navigation: {remedy}")
    return nav

def title_of(text, path):
    found = re.search(r"^# (.+)$", text, re.M)
    if not found: raise Refused(f"{path} has no title: begin it with '# '")
    return re.sub(r"[`*]", "", found[1]).strip()

def notebooks_in_order() -> dict:  # path relative to nbs/ -> notebook, the index first
    index = read(ROOT/"nbs"/"index.ipynb")
    text = "".join(joined(c["source"]) for c in index["cells"])
    paths = [p.relative_to(ROOT/"nbs") for p in (ROOT/"nbs").rglob("*.ipynb")]
    paths = [p for p in paths if not any(part[0] in "._" for part in p.parts)]
    return {p: read(ROOT/"nbs"/p) for p in [Path("index.ipynb"), *order(paths, text)]}

def page_of_each(
    notebooks,  # paths relative to nbs/
    texts,  # names of pages of docs/
    modules,  # names of those with an API page
) -> dict:  # file that a link may name -> page
    pages = {f"nbs/{p.as_posix()}": p.with_suffix(".html").as_posix() for p in notebooks}
    pages |= {f"docs/{name}": name.replace(".md", ".html") for name in texts}
    generated = ("cli", "play", "api/index", *(f"api/{m}" for m in modules))
    return pages | {f"docs/{name}.md": f"{name}.html" for name in generated} | {"README.md": "index.html"}

def write_source(
    name: str,  # of a file of _docs_src/
    text: str,
):
    (SOURCES/name).parent.mkdir(parents=True, exist_ok=True)
    (SOURCES/name).write_text(text, encoding="utf-8")

def write_notebooks(
    notebooks: dict,  # path relative to nbs/ -> notebook
    pages: dict,  # file of the repository -> page
    names: Names,
    strict: bool,
):
    wrong = []
    for p, nb in notebooks.items():
        links = Links(Path("nbs")/p, p.with_suffix(".html"), pages, names, module_of(nb))
        try:
            made = processed(p, nb, links, names, strict)
        except Refused as e:
            wrong.append(str(e))
            continue
        if p == Path("index.ipynb"): made = home(made, (ROOT/"docs"/"home.html").read_text(encoding="utf-8"))
        else: headed(made, p, links, names)
        write_source(p, json.dumps(made))
    if wrong: raise Refused("\n".join(wrong))

def write_reference(names: Names):
    from laid_nb.cli import parser
    for name, module in names.modules.items():
        where = {n: (f"../{page}", title) for n, (page, title) in names.where[name].items()}
        write_source(f"api/{name}.md", reference.api_page(module, where, f"../{names.pages[name]}"))
    write_source("api/index.md", reference.api_index(list(names.modules.values())))
    write_source("cli.md", reference.cli_page(parser()))

def prepare(
    strict: bool = True,  # False: a figure may be without alt text
) -> list:  # the navigation
    "Fill _docs_src/."
    shutil.rmtree(SOURCES, ignore_errors=True)
    SOURCES.mkdir()
    notebooks, titles = notebooks_in_order(), {}
    for p, nb in notebooks.items():
        prose = "\n".join(joined(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown")
        titles[p] = title_of(prose, f"nbs/{p}")
    files = [p for p in sorted((ROOT/"docs").glob("*.md")) if p.name != "README.md"]
    texts = {p.name: p.read_text(encoding="utf-8") for p in files}
    names = Names({p: nb for p, nb in notebooks.items() if p.parts[0] != "experiments"})
    pages = page_of_each(notebooks, texts, names.modules)
    write_notebooks(notebooks, pages, names, strict)
    for name, text in texts.items():
        write_source(name, Links(Path("docs")/name, Path(name).with_suffix(".html"), pages, names)(text))
    write_reference(names)
    write_source("play.md", play_page())
    write_source("javascripts/views.js", web.page_script())
    write_source("stylesheets/view.css", web.front_end()[1])
    for folder in ("javascripts", "stylesheets", "screens"):
        shutil.copytree(ROOT/"docs"/folder, SOURCES/folder, dirs_exist_ok=True)
    shutil.copyfile(ROOT/"docs"/"favicon.svg", SOURCES/"favicon.svg")
    del titles[Path("index.ipynb")]
    return navigation(titles, list(names.modules), {n: title_of(t, f"docs/{n}") for n, t in texts.items()})

# --- hook ---------------------------------------------------------------------
FOLDED = re.compile(  # a cell's tag, which only says why its code is folded, and the code
    r'<div class="celltoolbar">(?:(?!</div>).)*<span class="cell-tag">laid-fold-(\w+)</span>.*?</div>\s*</div>\s*'
    r'(<div class="CodeMirror[^>]*>\s*)(<div class="highlight"><pre><code>.*?</code></pre></div>)', re.S)

def themed(
    text: str,  # HTML of a notebook from mkdocs-jupyter
) -> str:
    """Without JupyterLab's style sheets and scripts (600 kB a page, a fixed light theme, a remote MathJax); code as the
    theme marks it, with its copy button; folded where its cell says so."""
    text = re.sub(r'<style.*?</style>|<script(?![^>]*class="laid-data").*?</script>|<!--.*?-->', "", text, flags=re.S)
    text = re.sub(r'<div class="zeroclipboard-container">.*?</clipboard-copy>\s*</div>', "", text, flags=re.S)
    text = re.sub(r'<div class="clipboard-copy-txt"[^>]*>.*?</div>', "", text, flags=re.S)
    code = r'<div class="highlight"><pre><code>\1</code></pre></div>'
    text = re.sub(r'<div class="\s*highlight(?:-ipynb)?[^"]*"><pre>(.*?)</pre></div>', code, text, flags=re.S)
    text = re.sub(r'<span class="(?:n|w)">([^<]*)</span>', r"\1", text)  # names and space: in the colour of all code
    def fold(found):
        return f'{found[2]}<details class="laid-code"><summary>{FOLDS[found[1]]}</summary>{found[3]}</details>'
    text = FOLDED.sub(fold, text)
    seen = {}
    def heading(found):
        anchor = once(found[2], seen)
        own = found[0].replace(f'id="{found[2]}"', f'id="{anchor}"')
        return own.replace(f'href="#{found[2]}"', f'href="#{anchor}"')
    text = re.sub(r'<h([1-6])[^>]*\bid="([^"]+)"[^>]*>.*?</h\1>', heading, text, flags=re.S)
    return text.replace('class="anchor-link"', 'class="headerlink"')

def contents(
    text: str,  # HTML
) -> list[dict]:  # its headings below the first level, as mkdocs nests them
    top = []
    open_ = [(1, top)]
    for level, anchor, inner in re.findall(r'<h([2-4])[^>]*\bid="([^"]+)"[^>]*>(.*?)</h\1>', text, re.S):
        words = re.sub(r'<a class="headerlink".*?</a>', "", inner, flags=re.S)
        name = html.unescape(re.sub(r"<[^>]+>", "", words)).strip()
        while open_[-1][0] >= int(level): open_.pop()
        token = dict(level=int(level), id=anchor, name=name, children=[])
        open_[-1][1].append(token)
        open_.append((int(level), token["children"]))
    return top

def on_page_content(text, page, config, files):
    "mkdocs calls this with each page."
    from mkdocs.structure.toc import get_toc
    if page.file.src_uri.endswith(".ipynb"):
        text = themed(text)
        page.toc = get_toc(contents(text))
        page.title = next((title for title, uri in entries(config["nav"]) if uri == page.file.src_uri), page.title)
    bare = re.sub(r"<pre.*?</pre>|<code.*?</code>|<script.*?</script>", "", text, flags=re.S)
    page.meta |= dict(maths="$" in bare or "arithmatex" in bare, views='class="laid-data"' in text)
    if page.file.src_uri == "index.ipynb": page.meta |= dict(home=True, hide=["navigation"])
    return text

GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau phi chi psi omega"
SIGNS = dict(zip(GREEK.split(), "αβγδεζηθικλμνξπρστφχψω")) | dict(
    Delta="Δ", Gamma="Γ", Theta="Θ", Lambda="Λ", Sigma="Σ", Phi="Φ", Psi="Ψ", Omega="Ω", sum="Σ", prod="∏", cdot="·",
    times="×", le="≤", leq="≤", ge="≥", geq="≥", ne="≠", approx="≈", to="→", mapsto="↦", infty="∞", pm="±", ll="≪",
    gg="≫", dots="…", ldots="…", cdots="…", quad=" ", qquad=" ", top="ᵀ", varphi="φ", varepsilon="ε", ell="ℓ",
    partial="∂", propto="∝", langle="⟨", rangle="⟩", odot="⊙",
    sqrt="√", ast="*", lVert="‖", rVert="‖", Vert="‖", lfloor="⌊", rfloor="⌋")

WORDS = ("cos", "sin", "log", "exp", "max", "min", "softmax", "arg", "mod", "det", "lim")

def maths_as_text(
    latex: str,
) -> str:  # what a search result shows: signs for commands, no braces
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", html.unescape(latex))
    text = re.sub(r"\\([A-Za-z]+)\s?", lambda found: SIGNS.get(found[1], found[1]*(found[1] in WORDS)), text)
    return re.sub(r"\s+", " ", re.sub(r"\\[,;:!| ]?|[{}&]|_(?=\{)|(?<=\w)_", "", text)).strip()

MATHS = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\w$])\$([^$\n]+?)\$(?![\w$])", re.S)

def on_post_build(config):
    "mkdocs calls this at the end: formulas of the search index become text, and code, two thirds of it, is left out."
    file = Path(config["site_dir"])/"search"/"search_index.json"
    index = read(file)
    def said(found): return html.escape(maths_as_text(next(filter(None, found.groups()))), False)
    for entry in index["docs"]:
        prose = {key: re.sub(r"<pre.*?</pre>", "", entry[key], flags=re.S) for key in ("title", "text")}
        entry |= {key: MATHS.sub(said, text) for key, text in prose.items()}
    file.write_text(json.dumps(index, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")

def entries(nav):  # (title, page) of all levels
    for item in nav:
        for title, value in item.items():
            if isinstance(value, str): yield title, value
            else: yield from entries(value)

def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--draft", action="store_true", help="let figures without alt text pass")
    strict, start = not args.parse_args().draft, time.time()
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort
    try: nav = prepare(strict)
    except Refused as e: sys.exit(f"make docs:\n{e}")
    try: build(load_config(str(ROOT/"mkdocs.yml"), nav=nav, strict=True))
    except Abort as e: sys.exit(f"make docs: {e}")
    wrong = check(SITE, BASE)
    if not strict: wrong = [line for line in wrong if "alt text" not in line]
    print(*wrong, sep="\n", file=sys.stderr)
    if wrong: sys.exit(f"make docs: {len(wrong)} faults in the pages")
    pages, size = list(SITE.rglob("*.html")), sum(f.stat().st_size for f in SITE.rglob("*") if f.is_file())
    print(f"site/: {len(pages)} pages, {size/1e6:.0f} MB, {time.time() - start:.0f} s; "
          "every link, anchor, picture and file is there")

if __name__ == "__main__": main()
