"""What each recipe of data/recipes needs, by `laid plan`: beside the recipe, and as a table in docs/your_pair.md.

  python docs/recipes.py          # write both anew
"""
import argparse
import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

from laid_nb.cli import plan
from laid_nb.plan import Plan

ROOT = Path(__file__).parent.parent
RECIPES = ROOT/"data"/"recipes"
PAGE = ROOT/"docs"/"your_pair.md"
START, END = "<!-- recipes: python docs/recipes.py -->\n", "<!-- recipes end -->"
HOW = {"LoRA": "lora_rank", "teacher in 4 bits": "teacher_bits: 4", "teacher in 8 bits": "teacher_bits: 8",
       "FSDP2": "fsdp: true"}


def command(recipe: Path) -> list[str]:
    "Words of the command that stands in a recipe, without `laid plan`."
    said, = re.findall(r"^# laid plan (.+)$", recipe.read_text(), re.M)
    return shlex.split(said)


def planned(recipe: Path) -> tuple[Plan, str]:
    "What `laid plan` returns and prints for a recipe; the configs of hub names are those that ship."
    student, teacher, *flags = command(recipe)
    here = [name if name == "self" else str(RECIPES/"configs"/name.partition("/")[2]) for name in (student, teacher)]
    given = {name.removeprefix("--"): x for name, x in zip(flags[::2], flags[1::2])}
    given |= {name: int(given[name]) for name in ("cards", "images") if name in given}
    with redirect_stdout(io.StringIO()) as out:
        made = plan(*here, config=str(recipe), **given)
    return made, f"$ laid plan {' '.join(command(recipe))} --config recipe:{recipe.stem}\n{out.getvalue()}"


def row(recipe: Path, made: Plan) -> str:
    "A line of the table."
    student, teacher = (name.partition("/")[2].removesuffix("-Instruct") or "itself" for name in command(recipe)[:2])
    cards, settings = made.cards, recipe.read_text().splitlines()[2:]
    where = f"{cards.count} × {cards.memory:g} GB" if cards.count > 1 else f"{cards.memory:g} GB"
    kinds = [word for word, start in HOW.items() if any(line.startswith(start) for line in settings)]
    disk, how = sum(made.disk.values())/1e9, ", ".join(kinds) or "all weights"
    return (f"| `{recipe.stem}` | {student} ← {teacher} | {where} | {made.total/1e9:.1f} GB | {disk:.0f} GB | "
            f"{made.hours(.4):.0f} h | {how} |")


def table(plans: dict[Path, Plan]) -> str:
    tokens = max(p.tokens for p in plans.values())
    head = f"| Recipe | Pair | Card | Peak on each, at {tokens:,} tokens | Disk | Time at 40% of the peak | How |\n"
    rows = "".join(row(recipe, made) + "\n" for recipe, made in plans.items())
    return head + "|:--|:--|:--|--:|--:|--:|:--|\n" + rows


def recipes() -> list[Path]: return sorted(RECIPES.glob("*.yaml"))


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = {recipe: planned(recipe) for recipe in recipes()}
    for recipe, (_, said) in found.items():
        recipe.with_suffix(".txt").write_text(said)
    before, rest = PAGE.read_text().split(START)
    made = table({recipe: plan for recipe, (plan, _) in found.items()})
    PAGE.write_text(before + START + made + END + rest.split(END)[1])


if __name__ == "__main__": main()
