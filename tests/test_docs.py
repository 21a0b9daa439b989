"The builder of the documentation site: what it refuses, what it rewrites, what it lists. (`make docs` builds and checks the whole site.)"
import ast
import base64
import dataclasses
import io
import json
import re
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]/"docs"))
mkdocs = pytest.importorskip("mkdocs_jupyter")
import build
import reference
from check import check
from laid_nb.page import standalone

ROOT = Path(__file__).parents[1]
PNG = base64.b64encode(base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")).decode()

def code(source, *outputs, id="cell"): return dict(cell_type="code", id=id, metadata={"execution": {"iopub.execute_input": "now"}}, source=source, outputs=list(outputs), execution_count=1)
def text(source, id="text"): return dict(cell_type="markdown", id=id, metadata={}, source=source)
def image(**more): return dict(output_type="display_data", data={"image/png": PNG, "text/plain": "<Figure>"} | more, metadata={})
def notebook(*cells): return dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5)

@pytest.fixture
def links(tmp_path): return build.Links(Path("nbs/00_rope.ipynb"), Path("00_rope.html"), {"nbs/00_rope.ipynb": "00_rope.html", "nbs/experiments/why.ipynb": "experiments/why.html"}, copied=tmp_path)

@pytest.fixture(scope="module")
def names():
    paths = sorted(p for p in (ROOT/"nbs").glob("*.ipynb"))
    return build.Names({p.relative_to(ROOT/"nbs"): build.read(p) for p in paths})

# --- figures ------------------------------------------------------------------
def test_a_figure_without_alt_text_is_refused_by_notebook_and_cell(links, names):
    with pytest.raises(build.Refused, match=r"nbs/00_rope.ipynb, cell shown: a figure without alt text"):
        build.processed(Path("00_rope.ipynb"), notebook(text("# T"), code("plot()", image(), id="shown")), links, names)

def test_a_figure_gets_the_alt_text_of_its_cell(links, names, tmp_path):
    made = build.processed(Path("00_rope.ipynb"), notebook(text("# T"), code("#| fig-alt: A line: it \"falls\".\nplot()", image())), links, names)
    cell = made["cells"][-1]
    assert build.joined(cell["source"]) == "plot()" and cell["metadata"] == {} and cell["execution_count"] is None
    shown = "".join(cell["outputs"][0]["data"]["text/html"])
    assert 'alt="A line: it &quot;falls&quot;."' in shown
    written = Image.open(tmp_path/re.search(r'src="([^"]+)"', shown)[1])
    assert (np.asarray(written.convert("RGB")) == np.asarray(Image.open(io.BytesIO(base64.b64decode(PNG))).convert("RGB"))).all()

def lighter(pixels):  # as build.lighter makes them again, and its share of the size
    before = io.BytesIO()
    Image.fromarray(pixels).save(before, "PNG")
    after, suffix = build.lighter(before.getvalue())
    assert suffix == "webp"
    return np.asarray(Image.open(io.BytesIO(after))), len(after)/len(before.getvalue())

def test_a_figure_becomes_lighter_and_keeps_its_256_colours():
    pixels = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)[np.arange(64*64).reshape(64, 64)//16]
    made, share = lighter(pixels)
    assert (made == pixels).all() and share < 1

def test_a_figure_of_pictures_keeps_their_colours_nearly():
    y, x = np.mgrid[:160, :160]
    pixels = np.stack([x*255//159, y*255//159, (x + y)*255//318], -1).astype(np.uint8)
    made, share = lighter(pixels)
    few = np.asarray(Image.fromarray(pixels).quantize(256).convert("RGB"), int)
    assert np.abs(made.astype(int) - pixels).mean() < .5*np.abs(few - pixels).mean() and share < .7

def test_of_a_widget_the_picture_stays(links):
    cell = code("x", image(**{"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}))
    (output,) = build.outputs(cell, "A grid.", "here", links)
    assert list(output["data"]) == ["text/html"]

def test_a_figure_that_was_not_drawn_is_refused(links):
    output = dict(output_type="execute_result", data={"text/plain": "<Figure size 1000x420 with 2 Axes>"}, metadata={}, execution_count=1)
    with pytest.raises(build.Refused, match="here: the figure was not drawn"): build.outputs(code("x", output), "A line.", "here", links)

def test_a_picture_in_a_text_needs_alt_text(links):
    with pytest.raises(build.Refused, match="has no alt text"): links("![ ](../data/results/reproduce.png)")

# --- cells --------------------------------------------------------------------
def test_hidden_cells_and_directives_go_and_exported_code_stays_with_its_parameters(names):
    links = build.Links(Path("nbs/00_rope.ipynb"), Path("00_rope.html"), {}, names, "rope")
    path, nb = Path("00_rope.ipynb"), build.read(ROOT/"nbs"/"00_rope.ipynb")
    made = build.processed(path, nb, links, names, strict=False)
    sources = [build.joined(c["source"]) for c in made["cells"]]
    assert not any(re.search(r"^#\|", s, re.M) for s in sources) and not any("nbdev_export()" in s or "default_exp" in s for s in sources)
    at = next(i for i, s in enumerate(sources) if "def rope_series(" in s)
    assert "| `distances` | " in sources[at + 1] and "api/rope.html#rope_series" in sources[at + 1]
    json.dumps(made)

# --- folds --------------------------------------------------------------------
PLOT = "figure, axes = plt.subplots()\naxes.plot(x)\naxes.set_title('x')\nfigure"

@pytest.mark.parametrize("cell, why", [
    (code("#| export\nimport math\n\nfrom torch import nn"), "imports"),
    (code("%matplotlib inline\nimport torch\ntorch.manual_seed(0)"), "examples"),
    (code("import torch\n_ = torch.manual_seed(0)"), "examples"),
    (code("import torch\nx = torch.ones(1)"), None),
    (code("#| export\ndef plot_gain(\n    x,  # values\n):\n    return draw(x)"), "plotting"),
    (code("#| export\ndef gain(x): return 2*x"), None),
    (code(PLOT, image()), "plotting"),
    (code("#| code-fold: false\n" + PLOT, image()), None),
    (code("plot_gain(x)", image()), None),
    (code(PLOT + "\nassert x > 1", image()), None),
    (code("#| code-fold: true\nx = 1"), "code"),
])
def test_imports_and_plotting_code_are_folded(cell, why): assert build.folded(cell) == why

def test_a_fold_opens_by_its_name(names, links):
    made = build.processed(Path("00_rope.ipynb"), notebook(text("# T"), code("#| code-fold: true\nx = 1"), code("y = 2", id="open")), links, names)
    first, second = made["cells"][1:]
    assert first["source"] == "x = 1" and first["metadata"] == {"tags": ["laid-fold-code"]} and second["metadata"] == {}
    page = build.themed('<div class="celltoolbar">\n<div class="tags">\n<span>\n<span class="cell-tag">laid-fold-imports</span>\n</span>\n</div>\n</div>\n'
                        '<div class="CodeMirror cm">\n<div class="highlight-ipynb"><pre>import x</pre></div></div>')
    assert '<details class="laid-code"><summary>Imports</summary><div class="highlight">' in page and "cell-tag" not in page

# --- links --------------------------------------------------------------------
def test_links_of_a_notebook(links):
    assert links("[a](experiments/why.ipynb#The-answer) [b](../benchmarks/spectra.py) [c](../benchmarks) [d](https://a.b/c) [e](#here)") == (
        f"[a](experiments/why.html#the-answer) [b]({build.REPOSITORY}/benchmarks/spectra.py) [c]({build.REPOSITORY.replace('/blob/', '/tree/')}/benchmarks) [d](https://a.b/c) [e](#here)")

def test_code_and_maths_are_not_links(links):
    same = "`[a](b.ipynb)` $S[q](k.x)$\n\n```\n[a](b.ipynb)\n```"
    assert links(same) == same

def test_a_link_to_nothing_is_refused(links):
    with pytest.raises(build.Refused, match="nbs/00_rope.ipynb: the link ../gone.py"): links("[a](../gone.py)")

def test_a_public_name_links_to_its_api_once(names):
    links = build.Links(Path("nbs/experiments/x.ipynb"), Path("experiments/x.html"), {}, names)
    assert links("`rope_series`, `rope_series`, `main`") == "[`rope_series`](../api/rope.html#rope_series), `rope_series`, `main`"

def test_a_page_of_the_site_may_be_named_too(links): assert links("[a](experiments/why.html#the-answer)") == "[a](experiments/why.html#the-answer)"

def test_the_front_page_shows_the_figure_first_and_of_code_what_it_shows():
    table = dict(output_type="execute_result", data={"text/markdown": ["| a |\n", "|---|"]}, metadata={})
    made = build.home(notebook(text("# T\n\nWhy.\n\n## Next\nMore."), code("Markdown(x)", table), text("![A line](figures/x.png)\n\nHow to read it.")), "<p>{viewer}</p>")
    first, shown, last = (build.joined(c["source"]) for c in made["cells"])
    assert first == "# T\n\nWhy.\n\n## Next\nMore." and shown == "| a |\n|---|"
    assert re.match(r'<p><div class="laid-static"><noscript><a .*<img src="figures/x.png" alt="A line"></a></noscript><script type="application/json"', last) and last.endswith("</p>\n\nHow to read it.")
    with pytest.raises(build.Refused, match="needs a picture"): build.home(notebook(text("# T")), "")

def test_badges_are_for_the_readme_alone():
    made = build.home(notebook(text("# T\n\n[![Tests](https://x.org/badge.svg)](https://x.org)\n\nWhy."), text("![A line](figures/x.png)")), "{viewer}")
    assert "badge" not in str(made["cells"][0]) and "Why." in made["cells"][0]["source"]

def test_the_readme_is_short_and_opens_on_the_finding():
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    assert sum(any(map(str.isalnum, word)) for word in readme.split()) < 900  # a table's strokes are no words
    places = [readme.index(mark) for mark in ("A small vision-language model", "**What was found**", "![Fifty pictures", "| teacher |", "make demo")]
    assert places == sorted(places)
    rows = re.findall(r"^\|(?!:--)(.+)\|$", readme[:readme.index("## Try it")], re.M)
    assert len(rows) == 6 and len(re.search(r"```sh\n(.*?)```", readme, re.S)[1].splitlines()) == 3

# --- views that answer without a kernel -------------------------------------------
def view_output(state=None): return standalone(state or dict(view=dict(kind="heads", name="</script><b>")), "in words", f"data:image/png;base64,{PNG}")

def test_of_a_view_its_arrays_stay_and_its_picture_becomes_a_file(links, tmp_path):
    (output,) = build.outputs(code("x", image(**{"text/html": view_output(), "application/vnd.jupyter.widget-view+json": {"model_id": "1"}}) | dict(data={"text/html": view_output()})), None, "here", links)
    (shown,) = output["data"]["text/html"]
    assert shown.count("<script") == 1 and "<style" not in shown and 'alt="in words"' in shown and "base64" not in shown.split("<script")[0]
    assert (tmp_path/re.search(r'<noscript>.*?src="([^"]+)"', shown)[1]).exists()

def test_a_theme_keeps_data_and_drops_scripts():
    kept = '<script type="application/json" class="laid-data">{"a": 1}</script>'
    assert build.themed(f"<style>x</style><script>y</script>{kept}<script src='z'></script>") == kept

def test_all_code_of_an_experiment_is_folded(names):
    for path, why in ((Path("experiments/why.ipynb"), ["laid-fold-code"]), (Path("00_rope.ipynb"), None)):
        made = build.processed(path, notebook(text("# T"), code("x = 1\nx + 1")), build.Links(Path("nbs")/path, path.with_suffix(".html"), {}, names), names)
        assert made["cells"][-1]["metadata"].get("tags") == why

@pytest.mark.parametrize("latex, said", [(r"f(\Delta) = \sum_b \cos(\Delta\,\omega_b)", "f(Δ) = Σb cos(Δωb)"), (r"\frac{1}{n}", "1/n"), ("a_{mn}", "amn"), (r"x \le 2\pi", "x ≤2π")])
def test_formulas_of_the_search_are_text(latex, said):
    assert build.maths_as_text(latex).replace(" ", "") == said.replace(" ", "")

# --- the built site -----------------------------------------------------------
def site(tmp_path, **pages):
    for name, body in pages.items(): (tmp_path/f"{name}.html").write_text(f"<html><body>{body}</body></html>")
    return check(tmp_path, "/base/")

def test_a_whole_site_passes(tmp_path):
    assert site(tmp_path, a='<h1 id="x">A</h1><a href="b.html#y">b</a><a href="/base/b.html">b</a><a href="https://else.where/">e</a>', b='<p id="y"><a href="a.html">a</a><img src="data:image/png;base64,AA" alt="dot"></p>') == []

@pytest.mark.parametrize("body, wrong", [
    ('<a href="gone.html">g</a>', "gone.html: there is no such file"),
    ('<a href="#gone">g</a>', "#gone: the page has no such anchor"),
    ('<a href="b.html#gone">g</a>', "b.html#gone: the page has no such anchor"),
    ('<img src="gone.png" alt="g">', "gone.png: there is no such file"),
    ('<img src="data:image/png;base64,AA">', "a picture without alt text"),
    ('<script src="https://cdn.example/x.js"></script>', "loads https://cdn.example/x.js from another host"),
    ('<link rel="stylesheet" href="//cdn.example/x.css">', "loads //cdn.example/x.css from another host"),
    ("<style>@import 'https://cdn.example/x.css';</style>", "loads https://cdn.example/x.css from another host"),
    ('<p style="background: url(https://cdn.example/x.png)">', "loads https://cdn.example/x.png from another host"),
    ('<p id="a"></p><p id="a"></p>', "the id a stands twice"),
])
def test_a_fault_is_found(tmp_path, body, wrong):
    (found,) = site(tmp_path, a=body, b="<p>b</p>")
    assert found == f"a.html: {wrong}" or found.startswith("a.html: ") and found.endswith(wrong)

def test_a_remote_font_in_a_style_sheet_is_found(tmp_path):
    (tmp_path/"x.css").write_text("@font-face { src: url('https://fonts.example/a.woff2') }")
    assert check(tmp_path) == ["x.css: loads https://fonts.example/a.woff2 from another host"]

def test_a_page_is_weighed_with_all_that_it_loads(tmp_path):
    (tmp_path/"x.css").write_text("@font-face { src: url('a.woff2') }")
    for name, size in (("a.woff2", 400_000), ("x.js", 500_000), ("x.webp", 600_000)): (tmp_path/name).write_bytes(bytes(size))
    style, script, image = '<link rel="stylesheet" href="x.css">', '<script src="x.js"></script>', '<img src="x.webp" alt="x" loading="lazy">'
    found = site(tmp_path, a=style + script + image*2, b=script + image, c=style + image)
    assert found == ["a.html: weighs 1.50 MB with what it loads, more than 1.5"]

def test_a_notebook_page_loses_foreign_styles_and_repeated_code():
    made = build.themed('<style>@import "https://a.b";</style><script src="https://a.b/mathjax.js"></script><div class=" highlight-ipynb hl-python "><pre><span></span><span class="n">x</span><span class="w"> </span><span class="o">=</span></pre></div>\n<div class="clipboard-copy-txt" id="cell-1">x</div>'
                        '<h2 id="a">A<a class="anchor-link" href="#a">¶</a></h2><h2 id="a">A<a class="anchor-link" href="#a">¶</a></h2>')
    assert "https" not in made and "clipboard" not in made and '<div class="highlight"><pre><code><span></span>x <span class="o">=</span></code></pre></div>' in made
    assert [(t["id"], t["name"]) for t in build.contents(made)] == [("a", "A"), ("a-1", "A")]

# --- navigation ---------------------------------------------------------------
def test_navigation_follows_the_files():
    titles = {Path(p): p for p in ("00_rope.ipynb", "05_gain.ipynb", "06_window.ipynb", "12a_more.ipynb", "13_cli.ipynb", "experiments/why.ipynb")}
    nav = build.navigation(titles, ["rope"], {"your_pair.md": "Your own pair", "glossary.md": "Glossary"})
    sections = {k: v for item in nav for k, v in item.items()}
    pages = {k: [next(iter(i.values())) for i in v] for k, v in sections.items() if isinstance(v, list)}
    assert list(sections) == ["Home", "Play", "Understand", "Use", "Evidence", "API", "Glossary"] and pages["Play"] == ["play.md", "12a_more.ipynb"]
    assert pages["Understand"] == ["00_rope.ipynb", "05_gain.ipynb"]
    assert pages["Use"] == ["06_window.ipynb", "13_cli.ipynb", "your_pair.md", "cli.md"]
    assert pages["Evidence"] == ["experiments/why.ipynb"] and pages["API"] == ["api/index.md", "api/rope.md"]

def test_a_notebook_without_a_place_is_refused():
    with pytest.raises(build.Refused, match="nbs/notes.ipynb has no place"): build.navigation({Path("notes.ipynb"): "Notes"}, [], {})

def test_notebooks_come_by_number_and_experiments_as_the_index_lists_them():
    paths = [Path(p) for p in ("experiments/b.ipynb", "experiments/a.ipynb", "experiments/z.ipynb", "12a_x.ipynb", "12_w.ipynb", "02_s.ipynb", "index.ipynb")]
    assert [p.stem for p in build.order(paths, "experiments/z.ipynb, then experiments/a.ipynb")] == ["02_s", "12_w", "12a_x", "z", "a", "b"]

# --- reference ----------------------------------------------------------------
def comments(path):  # (name of the function, name of the parameter or "returns", its comment), read from the source alone
    source = path.read_text()
    found = {token.start[0]: token.string.lstrip("#").strip() for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}
    for node in ast.parse(source).body:
        if getattr(node, "name", "_")[0] == "_": continue
        for function in [node] if isinstance(node, ast.FunctionDef) else [f for f in node.body if isinstance(f, ast.FunctionDef) and (f.name[0] != "_" or f.name == "__init__")]:
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs, *filter(None, (function.args.vararg, function.args.kwarg))]
            line = {a.lineno: a.arg for a in arguments if a.lineno != function.lineno}
            for n in range(function.lineno, function.body[0].lineno):
                if n in found: yield function.name, line.get(n, "returns"), found[n].removeprefix("-> ")

plain = lambda markdown: re.sub(r"\\(.)", r"\1", markdown)

def test_every_public_name_has_its_entry(names):
    for name, module in names.modules.items():
        page = reference.api_page(module, {n: ("x", "y") for n in module.__all__}, "x")
        assert re.findall(r"^## `(\w+)` \{ #\w+ \}$", page, re.M) == list(module.__all__), name

def test_every_comment_of_a_parameter_stands_in_the_api(names):
    count = 0
    for name, module in names.modules.items():
        page = plain(reference.api_page(module, {n: ("x", "y") for n in module.__all__}, "x"))
        for function, parameter, comment in comments(ROOT/"laid_nb"/f"{name}.py"):
            if function.split(".")[0] not in module.__all__: continue  # what only rooms share has no page
            row = re.search(rf"^\| [`*]*{parameter}[`*]* \|.*{re.escape(' '.join(comment.split()))} \|$", page, re.M)
            assert row, f"laid_nb.{name}.{function}: {parameter}: {comment}"
            count += 1
    assert count > 500

def test_a_method_put_into_a_class_is_no_name_of_its_own(names, tmp_path):
    assert build.defined("@patch\ndef interval(self: A): pass") == build.defined("@patch(as_prop=True)\ndef x(self: A): pass") == []
    path = Path("10_accuracy.ipynb")  # has a function and a method called `interval`
    links = build.Links(Path("nbs")/path, Path("10_accuracy.html"), {}, copied=tmp_path)
    ids = [cell["id"] for cell in build.processed(path, build.read(ROOT/"nbs"/path), links, names, strict=False)["cells"]]
    assert ids.count("api-interval") == 1 and len(ids) == len(set(ids))

def test_an_entry_points_to_the_section_that_derives_it(names):
    assert names.where["rope"]["RopeSpec"] == ("00_rope.html#ropespec", "RopeSpec")

def test_every_command_and_flag_stands_in_the_reference():
    from laid_nb.cli import parser
    top = parser()
    page = plain(reference.cli_page(top))
    for name, command in top._subparsers._group_actions[0].choices.items():
        section = page.split(f"## `laid {name}` {{", 1)[1].split("\n## ", 1)[0]
        for action in command._actions:
            for flag in action.option_strings or [action.metavar or action.dest]: assert re.search(rf"^\| .*`{re.escape(flag)}[ `]", section, re.M), f"laid {name} {flag}"

def test_every_setting_of_our_own_stands_in_the_reference():
    from transformers import TrainingArguments

    from laid_nb.simulate import WindowSimulation
    from laid_nb.train import LaidConfig
    page = plain(reference.settings())
    ours = {f.name for c in (LaidConfig, WindowSimulation) for f in dataclasses.fields(c)}
    for field in ours - {f.name for f in dataclasses.fields(TrainingArguments)}: assert f"| `--{field}` |" in page, field

def test_a_table_of_the_code_is_one_on_the_page():
    @dataclasses.dataclass
    class Row:
        means: str
        methods: tuple
        loss: object = None
    shown = reference.constant("ROWS", {"kl": Row("softened answers", ("kd", "laid"), lambda e: e)})
    assert shown == "|  | means | methods |\n| --- | --- | --- |\n| `kl` | softened answers | kd, laid |\n"
    assert reference.constant("F", {"a": reference.table}) == "```python\nF = {'a': table}\n```"

def test_text_is_escaped_for_a_table(): assert reference.escape("a|b `c|d` [x] <y> *z*") == r"a\|b `c\|d` \[x\] \<y\> \*z\*"
