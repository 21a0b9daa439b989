"""Make data/objects from the npm package @lobehub/fluent-emoji-3d 1.1.0 (MIT).

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python data/make_objects.py package/assets coco_fluent_emoji.json
"""
import csv
import json
import sys
from pathlib import Path

from PIL import Image

SIZE = 64
OUT = Path(__file__).parent/"objects"

def main(assets, table):
    OUT.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, source in json.loads(Path(table).read_text()).items():
        image = Image.open(Path(assets)/source).convert("RGBA")
        file = name.replace(" ", "_") + ".png"
        image.resize((SIZE, SIZE), Image.LANCZOS).quantize(128, method=Image.FASTOCTREE).save(OUT/file, optimize=True)
        rows.append((name, file, f"@lobehub/fluent-emoji-3d@1.1.0/assets/{source}"))
    with open(OUT/"objects.csv", "w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([("name", "file", "source"), *rows])

if __name__ == "__main__": main(*sys.argv[1:])
