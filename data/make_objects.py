"""Make data/objects from npm packages. Fluent Emoji 3D (MIT) is there as pictures:

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python data/make_objects.py package/assets coco_fluent_emoji.json

The same emoji of other sets are there as SVG and go into folders of their own; VERSION as in SETS
(needs `pip install resvg-py==0.5.0`):

    npm pack @iconify-json/noto@VERSION && tar xzf iconify-json-noto-*.tgz
    python data/make_objects.py package noto
"""
import csv
import io
import json
import sys
from pathlib import Path

from PIL import Image

SIZE = 64
OUT = Path(__file__).parent/"objects"
SETS = {  # folder -> npm package
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29"}

def save(picture, path):
    "A picture, reduced to 64 pixels and a palette of 128 colours with alpha."
    picture.resize((SIZE, SIZE), Image.LANCZOS).quantize(128, method=Image.FASTOCTREE).save(path, optimize=True)

def write_table(folder, rows):
    with open(folder/"objects.csv", "w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([("name", "file", "source"), *rows])

def from_pictures(assets, table):
    "The first set, and which emoji stands for which object."
    OUT.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, source in json.loads(Path(table).read_text()).items():
        file = name.replace(" ", "_") + ".png"
        save(Image.open(Path(assets)/source).convert("RGBA"), OUT/file)
        rows.append((name, file, f"@lobehub/fluent-emoji-3d@1.1.0/assets/{source}"))
    write_table(OUT, rows)

def from_icons(package, art):
    "The same emoji in another set: found by code point, drawn four times as large and reduced."
    import resvg_py
    icons, chars = (json.loads((Path(package)/f"{part}.json").read_text()) for part in ("icons", "chars"))
    size, rows, folder = icons["width"], [], OUT/art
    folder.mkdir(exist_ok=True)
    with open(OUT/"objects.csv", newline="") as f:
        emoji = {r["name"]: (r["file"], Path(r["source"]).stem) for r in csv.DictReader(f)}
    for name, (file, code) in emoji.items():
        icon = chars.get(code) or chars[code.removesuffix("-fe0f")]
        svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
               f'viewBox="0 0 {size} {size}">{icons["icons"][icon]["body"]}</svg>')
        drawn = resvg_py.svg_to_bytes(svg_string=svg, width=4*SIZE, height=4*SIZE)
        save(Image.open(io.BytesIO(bytes(drawn))).convert("RGBA"), folder/file)
        rows.append((name, file, f"{SETS[art]}/icons.json#{icon}"))
    write_table(folder, rows)

if __name__ == "__main__": (from_icons if sys.argv[2] in SETS else from_pictures)(*sys.argv[1:])
