"""From a click on a head to its picture, and what goes to the browser, by size of the model: one model, and three drawn
over each other. The target is 200 ms at 64 layers, 40 heads and 2,048 distances."""
import argparse
import statistics
import time

import torch

from laid_nb.inspector import HeadInspector, HeadSpectra
from laid_nb.rope import RopeSpec
from measure import table, write

SIZES = [(4, 4, 2, 64), (28, 28, 4, 512), (64, 40, 8, 2048)]  # layers, heads, KV heads, distances


def made(name, layers, heads, kv_heads, distances, frequencies=100):
    "Spectra of a model of that size, from random numbers."
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=generator)
    spec = RopeSpec(1e6**(-torch.arange(64)/64), torch.tensor([0]*16 + [1]*24 + [2]*24), 128)
    edges, wavelength = torch.arange(distances + 1), torch.logspace(3, .3, frequencies)
    response = draw(layers, heads, distances) - .5
    power = draw(layers, heads, frequencies)
    mass = draw(layers, heads, distances)/distances
    energy = draw(layers, heads, 64)/64, draw(layers, kv_heads, 64)/64
    numbers = [draw(layers, heads) for _ in range(5)]
    return HeadSpectra(name, 50, spec, edges, response, mass, edges, response, wavelength, power, wavelength, power,
                       *energy, *numbers)


def run(layers, heads, kv_heads, distances, models, clicks):
    "A row: median and slowest tenth of the clicks."
    drawn = [made(f"model {i}", layers, heads, kv_heads, distances) for i in range(models)]
    inspector, times = HeadInspector(drawn), []
    for click in range(clicks):
        start = time.perf_counter()
        inspector.grid.selected = [click % layers, (7*click + 1) % heads]
        times.append(1000*(time.perf_counter() - start))
    return {
        "layers": layers,
        "heads": heads,
        "distances": distances,
        "models drawn": models,
        "median ms": round(statistics.median(times)),
        "ninth of ten ms": round(statistics.quantiles(times, n=10)[-1]),
        "picture kB": round(len(inspector.picture.value)/1000),
        "grid kB": len(inspector.grid.values)/1000,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model and three clicks, nothing written")
    quick = parser.parse_args().quick
    sizes, clicks = (SIZES[:1], 3) if quick else (SIZES, 40)
    rows = [run(*size, models, clicks) for size in sizes for models in (1, 3)]
    print(table(rows))
    if quick: return
    write("bench_inspector", rows)


if __name__ == "__main__":
    main()
