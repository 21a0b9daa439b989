"""`python docs/licences.py`: licences of everything that `pip install laid_nb` brings -> docs/licences.md, from the metadata of what is installed."""
import re
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT/"docs/licences.md"


def needs() -> list[str]:
    "Names of the direct requirements."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    return [re.match(r"[\w.-]+", need)[0] for need in settings["DEFAULT"]["requirements"].split()]


def brought(names) -> dict:  # name -> distribution
    "The requirements, and what they require in turn, without extras."
    found, left = {}, list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found: continue
        try: found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError: continue  # for another system or Python
        left += [re.match(r"[\w.-]+", need)[0] for need in found[name].requires or () if "extra ==" not in need]
    return found


def licence(distribution) -> str:
    "As the metadata say: the expression, else the classifiers, else the first line of the text."
    about = distribution.metadata
    if about.get("License-Expression"): return about["License-Expression"]
    named = [c.split("::")[-1].strip() for c in about.get_all("Classifier") or () if c.startswith("License ::") and "OSI Approved" != c.split("::")[-1].strip()]
    text = (about.get("License") or "").strip()
    return " or ".join(named) or (text.splitlines()[0][:60] if text else "not said")


def page() -> str:
    rows = sorted((name, d.version, licence(d)) for name, d in brought(needs()).items())
    return ("# Licences\n\nWhat an installation of the package brings along, and under which licence, as the metadata of each package say. Written by `python docs/licences.py` in an installation of `constraints.txt`. "
            "The licence of the package itself is Apache-2.0; those of pictures and models that ship are in [data/README.md](../data/README.md).\n\n| package | version | licence |\n|:--|:--|:--|\n" + "".join(f"| {n} | {v} | {x.replace('|', '/')} |\n" for n, v, x in rows))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{page().count(chr(10))} lines in {PAGE.relative_to(ROOT)}\n")
