"Pages made from code: the API from signatures and docments, the command line from its parser."
import argparse, ast, dataclasses, inspect, io, re, textwrap, tokenize
from functools import cached_property

EMPTY = inspect.Parameter.empty

def escape(
    text: str,  # plain text with `code` in it
) -> str:  # Markdown that shows it, fit for a cell of a table
    code = lambda part: part.replace("|", "\\|")
    plain = lambda part: re.sub(r"([\\*_$|\[\]<>{}#])", r"\\\1", part)
    return "".join(code(part) if i % 2 else plain(part) for i, part in enumerate(re.split(r"(`[^`\n]+`)", " ".join(text.split()))))

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

def own_fields(cls):  # of a dataclass, without those of a class that is not ours
    ours = {name for base in cls.__mro__ if base.__module__.startswith("laid_nb") for name in inspect.get_annotations(base)}
    return [f for f in dataclasses.fields(cls) if f.init and f.name in ours]

def comments(
    obj,  # a function or a class of laid_nb
) -> dict:  # name of a parameter or field -> its comment; "return": that on the line which closes the signature
    if inspect.isclass(obj):
        ours = [base for base in reversed(obj.__mro__) if base.__module__.startswith("laid_nb")]
        found = {k: v for base in ours for k, v in beside(base).items()}
        return found | (comments(obj.__init__) if getattr(obj.__init__, "__module__", "").startswith("laid_nb") and inspect.isfunction(obj.__init__) and not dataclasses.is_dataclass(obj) else {})
    return beside(inspect.unwrap(obj))

def beside(obj):
    source = textwrap.dedent(inspect.getsource(obj))
    notes = {t.start[0]: t.string.lstrip("# ").removeprefix("->").strip() for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    node = ast.parse(source).body[0]
    if isinstance(node, ast.ClassDef): return {n.target.id: notes[n.lineno] for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.lineno in notes}
    a = node.args
    last = {"return": notes[n]} if (n := node.body[0].lineno - 1) in notes or (n := node.lineno) in notes and node.body[0].lineno > n else {}
    return last | {p.arg: notes[p.lineno] for p in filter(None, [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]) if p.lineno in notes and p.lineno > node.lineno}

def parameters(
    obj,  # a function or a class
) -> list[tuple]:  # (name, type, default or EMPTY, comment), the value returned last with the name "returns"
    notes, typed = comments(obj), lambda anno: "" if anno in (EMPTY, None) else inspect.formatannotation(anno).replace("laid_nb.", "")
    try: shape = inspect.signature(obj)
    except ValueError: return []
    given = [p for p in shape.parameters.values() if p.name != "self"]
    if dataclasses.is_dataclass(obj):
        helps = {f.name: f.metadata.get("help", "") for f in own_fields(obj)}
        given, notes = [p for p in given if p.name in helps], helps | notes
    star = lambda p: {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
    rows = [(star(p), typed(p.annotation), p.default, notes.get(p.name, "")) for p in given]
    back = "" if inspect.isclass(obj) else typed(shape.return_annotation)
    return rows + ([("returns", back, EMPTY, notes.get("return", ""))] if not inspect.isclass(obj) and (back or "return" in notes) else [])

def documented(
    obj,  # a function or a class
) -> str:  # the table of its parameters
    rows = parameters(obj)
    if not any(comment for *_, comment in rows): return ""
    return table(["Parameter", "Type", "Default", "Meaning"], [["**returns**" if name == "returns" else code(name), code(anno), "" if default is EMPTY else code(short(default)), escape(comment)] for name, anno, default, comment in rows])

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
        words.append(str(p.replace(annotation=EMPTY, default=EMPTY)) + ("" if p.default is EMPTY else f"={short(p.default)}"))
    if dataclasses.is_dataclass(obj) and len(own_fields(obj)) < len(dataclasses.fields(obj)): words.append("...")
    line = f"{name}({', '.join(words)})"
    return line if len(line) <= 90 else f"{name}(\n" + textwrap.fill(", ".join(words), 86, initial_indent="    ", subsequent_indent="    ") + "\n)"

def comment_of(obj): return "" if dataclasses.is_dataclass(obj) and (obj.__doc__ or "").startswith(f"{obj.__name__}(") else inspect.getdoc(obj) if obj.__doc__ else ""

def methods(cls):  # (name, function or property) of what the class itself defines
    for name, member in vars(cls).items():
        if name.startswith("_"): continue
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if isinstance(member, (property, cached_property)): yield name, member
        elif inspect.isfunction(function): yield name, getattr(cls, name)

def entry(
    name: str,
    obj,  # what the module calls so
) -> str:  # Markdown without a heading
    if not (inspect.isclass(obj) or inspect.isroutine(obj)): return f"```python\n{name} = {textwrap.shorten(repr(obj), 300, placeholder=' …')}\n```\n"
    parts = [f"```python\n{'class ' if inspect.isclass(obj) else ''}{signature(name, obj)}\n```", prose(comment_of(obj)), documented(obj)]
    if inspect.isclass(obj):
        for method, member in methods(obj):
            function = getattr(member, "fget", None) or getattr(member, "func", member)
            line = signature(f"{name}.{method}", function) if function is member else f"{name}.{method}"
            parts += [f"```python\n{line}\n```", prose(comment_of(function)), documented(function)]
    return "\n\n".join(part for part in parts if part) + "\n"

def api_page(
    module,  # of laid_nb
    where: dict,  # name -> page and anchor of the section of the notebook that defines it
    notebook: str,  # page of the notebook
) -> str:
    name = module.__name__.split(".")[-1]
    parts = [f"# {name}", prose(module.__doc__ or ""), f"Derived, shown and checked in [the notebook]({notebook}).\n{{ .laid-source }}"]
    for public in module.__all__:
        parts += [f"## `{public}` {{ #{public} }}", entry(public, getattr(module, public)), f"[In the notebook: {where[public][1]}]({where[public][0]})\n{{ .laid-source }}"]
    return "\n\n".join(parts) + "\n"

def api_index(
    modules: list,
) -> str:
    rows = [[f"[{m.__name__.split('.')[-1]}]({m.__name__.split('.')[-1]}.md)", escape(m.__doc__ or ""), str(len(m.__all__))] for m in modules]
    return "# API\n\nEvery public name, with what each parameter means. The text comes from the signatures in the notebooks; each entry links to the section that derives it.\n\n" + table(["Module", "About", "Names"], rows)

# --- command line -------------------------------------------------------------
def flag(action):  # as it is written
    value = "" if action.nargs == 0 else f" {action.metavar or '{' + ','.join(map(str, action.choices)) + '}' if action.metavar or action.choices else action.dest.upper()}"
    return [f"{name}{value}" for name in action.option_strings] or [value.strip()]

def command(
    parser,  # of one command
) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=80)  # not the terminal's
    usage = parser.format_usage().removeprefix("usage: ").strip().replace("\n       ", "\n")
    rows = [[", ".join(code(f) for f in flag(action)), escape(action.help or "")] for action in parser._actions]
    return f"{escape(parser.description or '')}\n\n```text\n{usage}\n```\n\n" + table(["Flag", "Meaning"], rows)

def settings() -> str:
    "The settings of LaidConfig that `laid train` takes as flags: ours, and those whose default is not that of transformers."
    from transformers import TrainingArguments
    from laid_nb.train import LaidConfig
    stock = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    kept = [f for f in dataclasses.fields(LaidConfig) if f.name not in stock or f.default != stock[f.name]]
    rows = [[code(f"--{f.name}"), "" if f.default in (None, dataclasses.MISSING) else code(f.default), escape(f.metadata.get("help", ""))] for f in kept]
    return table(["Setting", "Default", "Meaning"], [[code("--output_dir"), code("laid-runs"), escape("Checkpoints; the distilled student goes to OUTPUT_DIR/model.")], *(r for r in rows if r[0] != code("--output_dir"))])

def cli_page(
    parser,  # laid_nb.cli.parser()
) -> str:
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    parts = ["# The command line", escape(parser.description), "`laid COMMAND --help` says the same in a terminal. Every command has an exit code: 0, 2 after bad input with one line that says what is wrong, 130 when it was stopped."]
    for name, sub in commands.items():
        parts += [f"## `laid {name}` {{ #{name} }}", command(sub)]
        if name == "train": parts += ["### Settings { #settings }", "Each is a flag of `laid train` and a field of `laid_nb.train.LaidConfig`. Every setting of `transformers.TrainingArguments` is a flag too; only those with a default of our own are listed.", settings()]
    return "\n\n".join(parts) + "\n"
