"Pages made from code: the API from signatures and docments, the command line from its parser."
import argparse
import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
from functools import cached_property

EMPTY = inspect.Parameter.empty

def escape(
    text: str,  # plain text with `code` in it
) -> str:  # Markdown that shows it, fit for a cell of a table
    def kept(code): return code.replace("|", "\\|")
    def plain(words): return re.sub(r"([\\*_$|\[\]<>{}#])", r"\\\1", words)
    parts = re.split(r"(`[^`\n]+`)", " ".join(text.split()))
    return "".join(kept(part) if i % 2 else plain(part) for i, part in enumerate(parts))

def prose(
    text: str,  # a docstring
) -> str:  # its paragraphs in Markdown
    return "\n\n".join(escape(part) for part in re.split(r"\n\s*\n", inspect.cleandoc(text)))

def table(
    header: list[str],
    rows: list[list[str]],
) -> str:  # without the columns that are empty
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    header, rows = [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
    if not rows: return ""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"]*len(header), *rows]) + "\n"

def code(text): return f"`{text}`".replace("|", "\\|") if text != "" else ""

# --- API ----------------------------------------------------------------------
def short(value):  # a default as a reader would write it
    if inspect.isclass(value) or inspect.isfunction(value): return value.__name__
    return "…" if re.search(r" at 0x|<factory>", repr(value)) or len(repr(value)) > 60 else repr(value)

def is_ours(obj): return getattr(obj, "__module__", "").startswith("laid_nb")

def own_fields(cls):  # of a dataclass, without those of a class that is not ours
    ours = {name for base in cls.__mro__ if is_ours(base) for name in inspect.get_annotations(base)}
    return [f for f in dataclasses.fields(cls) if f.init and f.name in ours]

def comments(
    obj,  # a function or a class of laid_nb
) -> dict:  # name of a parameter or field -> its comment; "return": that on the line which closes the signature
    if not inspect.isclass(obj): return beside(inspect.unwrap(obj))
    ours = [base for base in reversed(obj.__mro__) if is_ours(base)]
    found = {k: v for base in ours for k, v in beside(base).items()}
    own = is_ours(obj.__init__) and inspect.isfunction(obj.__init__) and not dataclasses.is_dataclass(obj)
    return found | (comments(obj.__init__) if own else {})

def comment_lines(source):  # number of a line -> its comment
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    return {line: text.lstrip("# ").removeprefix("->").strip() for line, text in found.items()}

def beside(obj):  # `comments` of one function, or of the fields of one class
    source = textwrap.dedent(inspect.getsource(obj))
    notes, node = comment_lines(source), ast.parse(source).body[0]
    if isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        return {n.target.id: notes[n.lineno] for n in fields if n.lineno in notes}
    first, a = node.body[0].lineno, node.args
    line = next((n for n in (first - 1, node.lineno) if n in notes and n < first), None)
    given = filter(None, [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg])
    own = {p.arg: notes[p.lineno] for p in given if p.lineno in notes and p.lineno > node.lineno}
    return ({} if line is None else {"return": notes[line]}) | own

def parameters(
    obj,  # a function or a class
) -> list[tuple]:  # (name, type, default or EMPTY, comment), the value returned last with the name "returns"
    notes = comments(obj)
    def typed(anno): return "" if anno in (EMPTY, None) else inspect.formatannotation(anno).replace("laid_nb.", "")
    try: shape = inspect.signature(obj)
    except ValueError: return []
    given = [p for p in shape.parameters.values() if p.name != "self"]
    if dataclasses.is_dataclass(obj):
        helps = {f.name: f.metadata.get("help", "") for f in own_fields(obj)}
        given, notes = [p for p in given if p.name in helps], helps | notes
    star = lambda p: {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
    rows = [(star(p), typed(p.annotation), p.default, notes.get(p.name, "")) for p in given]
    back = "" if inspect.isclass(obj) else typed(shape.return_annotation)
    if not inspect.isclass(obj) and (back or "return" in notes):
        rows.append(("returns", back, EMPTY, notes.get("return", "")))
    return rows

def documented(
    obj,  # a function or a class
) -> str:  # the table of its parameters
    rows = parameters(obj)
    if not any(comment for *_, comment in rows): return ""
    def row(name, anno, default, comment):
        shown = "" if default is EMPTY else code(short(default))
        return ["**returns**" if name == "returns" else code(name), code(anno), shown, escape(comment)]
    return table(["Parameter", "Type", "Default", "Meaning"], [row(*r) for r in rows])

def signature(
    name: str,
    obj,  # a function or a class
) -> str:
    try: given = [p for p in inspect.signature(obj).parameters.values() if p.name != "self"]
    except ValueError: return name
    if dataclasses.is_dataclass(obj): given = [p for p in given if p.name in {f.name for f in own_fields(obj)}]
    words, kinds = [], [p.kind for p in given]
    for i, p in enumerate(given):
        if p.kind is p.KEYWORD_ONLY and not {p.KEYWORD_ONLY, p.VAR_POSITIONAL} & set(kinds[:i]): words.append("*")
        default = "" if p.default is EMPTY else f"={short(p.default)}"
        words.append(str(p.replace(annotation=EMPTY, default=EMPTY)) + default)
    if dataclasses.is_dataclass(obj) and len(own_fields(obj)) < len(dataclasses.fields(obj)): words.append("...")
    line, indent = f"{name}({', '.join(words)})", "    "
    if len(line) <= 90: return line
    return f"{name}(\n{textwrap.fill(', '.join(words), 86, initial_indent=indent, subsequent_indent=indent)}\n)"

def comment_of(obj):  # its docstring, but not the one that a dataclass makes for itself
    made = dataclasses.is_dataclass(obj) and (obj.__doc__ or "").startswith(f"{obj.__name__}(")
    return inspect.getdoc(obj) if obj.__doc__ and not made else ""

def methods(cls):  # (name, function or property) of what the class itself defines
    for name, member in vars(cls).items():
        if name.startswith("_"): continue
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if isinstance(member, (property, cached_property)): yield name, member
        elif inspect.isfunction(function): yield name, getattr(cls, name)

def fenced(source): return f"```python\n{source}\n```"

def constant(
    name: str,
    obj,  # neither a class nor a function
) -> str:  # a dictionary of dataclasses as a table, anything else as it is written
    rows = obj.values() if isinstance(obj, dict) else ()
    if rows and all(map(dataclasses.is_dataclass, rows)):
        fields = [f.name for f in dataclasses.fields(next(iter(rows)))]
        cells = [[code(key), *(escape(written(getattr(row, f))) for f in fields)] for key, row in obj.items()]
        return table(["", *fields], cells)
    text = re.sub(r"<(?:function|class) '?([\w.]+|<lambda>)'?(?: at 0x\w+)?>", r"\1", repr(obj))
    return fenced(f"{name} = {textwrap.shorten(text, 300, placeholder=' …')}")

def written(value):  # in a table
    if value is None or getattr(value, "__name__", "").startswith(("_", "<lambda>")): return ""
    if isinstance(value, (tuple, list, dict)): return ", ".join(map(str, value))
    return short(value) if callable(value) else str(value)

def entry(
    name: str,
    obj,  # what the module calls so
) -> str:  # Markdown without a heading
    if not (inspect.isclass(obj) or inspect.isroutine(obj)): return constant(name, obj) + "\n"
    kind = "class " if inspect.isclass(obj) else ""
    parts = [fenced(f"{kind}{signature(name, obj)}"), prose(comment_of(obj)), documented(obj)]
    if inspect.isclass(obj):
        for method, member in methods(obj):
            function = getattr(member, "fget", None) or getattr(member, "func", member)
            line = signature(f"{name}.{method}", function) if function is member else f"{name}.{method}"
            parts += [fenced(line), prose(comment_of(function)), documented(function)]
    return "\n\n".join(part for part in parts if part) + "\n"

def api_page(
    module,  # of laid_nb
    where: dict,  # name -> page and anchor of the section of the notebook that defines it
    notebook: str,  # page of the notebook
) -> str:
    name = module.__name__.split(".")[-1]
    source = f"Derived, shown and checked in [the notebook]({notebook}).\n{{ .laid-source }}"
    parts = [f"# {name}", prose(module.__doc__ or ""), source]
    for public in module.__all__:
        page, section = where[public]
        source = f"[In the notebook: {section}]({page})\n{{ .laid-source }}"
        parts += [f"## `{public}` {{ #{public} }}", entry(public, getattr(module, public)), source]
    return "\n\n".join(parts) + "\n"

FIRST = {  # name -> its module: what most readers come for
    "LaidConfig": "train", "LaidTrainer": "train", "capture": "capture", "WindowSimulation": "simulate",
    "load_model": "store", "read_vhs": "vhs", "evaluate": "evaluate", "Results": "accuracy",
    "distance_response": "spectra", "HaystackViewer": "viewer", "HeadInspector": "inspector"}
HELPERS = (  # modules that the others stand on, listed last
    "store", "folder", "checkpoint", "stop", "shard", "pictures", "limits", "guards", "page", "serve", "script",
    "patch")

def helpers_last(modules: list[str]) -> list[str]:
    return sorted(modules, key=lambda name: HELPERS.index(name) if name in HELPERS else -1)

def api_index(
    modules: list,
) -> str:
    names = {m.__name__.split(".")[-1]: m for m in modules}
    first = [[f"[`{name}`]({home}.md#{name})", escape(inspect.getdoc(getattr(names[home], name)).partition("\n\n")[0]),
              f"[{home}]({home}.md)"] for name, home in FIRST.items() if home in names]
    rows = [[f"[{name}]({name}.md)", escape(names[name].__doc__ or ""), str(len(names[name].__all__))]
            for name in helpers_last(list(names))]
    about = ("Every public name, with what each parameter means. The text comes from the signatures in the notebooks; "
             "each entry links to the section that derives it.")
    return (f"# API\n\n{about}\n\n## To begin with\n\n{table(['Name', 'About', 'Module'], first)}\n\n"
            f"## Modules\n\n{table(['Module', 'About', 'Names'], rows)}")

# --- command line -------------------------------------------------------------
def flag(action):  # as it is written
    choices = action.choices and "{" + ",".join(map(str, action.choices)) + "}"
    name = action.dest.upper() if action.option_strings else action.dest
    value = "" if action.nargs == 0 else f" {action.metavar or choices or name}"
    return [f"{name}{value}" for name in action.option_strings] or [value.strip()]

def command(
    parser,  # of one command
) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=80)  # not the terminal's
    usage = parser.format_usage().removeprefix("usage: ").strip().replace("\n       ", "\n")
    rows = [[", ".join(code(f) for f in flag(action)), escape(action.help or "")] for action in parser._actions]
    return f"{escape(parser.description or '')}\n\n```text\n{usage}\n```\n\n" + table(["Flag", "Meaning"], rows)

def settings() -> str:
    "What `laid train` takes as flags: settings of our own, and those whose default is not that of transformers."
    from transformers import TrainingArguments

    from laid_nb.simulate import WindowSimulation
    from laid_nb.train import LaidConfig
    stock = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    kept = [f for f in dataclasses.fields(LaidConfig) if f.name not in stock or f.default != stock[f.name]]
    rows = [["--output_dir", "laid-runs", "Checkpoints; the distilled student goes to OUTPUT_DIR/model."]]
    notes = comments(WindowSimulation)
    kept += [f for f in dataclasses.fields(WindowSimulation) if f.name not in {f.name for f in kept}]
    for f in kept:
        default = "" if f.default in (None, dataclasses.MISSING) else f.default
        meaning = f.metadata.get("help") or notes.get(f.name, "")
        if f.name != "output_dir": rows.append([f"--{f.name}", default, meaning])
    rows = [[code(name), code(value), escape(text)] for name, value, text in rows]
    return table(["Setting", "Default", "Meaning"], rows)

def cli_page(
    parser,  # laid_nb.cli.parser()
) -> str:
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    parts = ["# The command line", escape(parser.description),
             "`laid COMMAND --help` says the same in a terminal. Every command has an exit code: 0, 2 after bad input "
             "with one line that says what is wrong, 130 when it was stopped."]
    for name, sub in commands.items():
        parts += [f"## `laid {name}` {{ #{name} }}", command(sub)]
        if name == "train":
            parts += ["### Settings { #settings }",
                      "Each is a flag of `laid train` and a field of `laid_nb.train.LaidConfig` or "
                      "`laid_nb.simulate.WindowSimulation`. Every setting of `transformers.TrainingArguments` is a "
                      "flag too; only those with a default of our own are listed.",
                      settings()]
    return "\n\n".join(parts) + "\n"
