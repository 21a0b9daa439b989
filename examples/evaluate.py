"""How far a model sees: accuracy by number of images, and the window with its interval.

  python examples/evaluate.py                            # the embedded student and the distilled one, drawn haystacks
  python examples/evaluate.py MODEL data.json images/    # a folder or a hub name, VHs' form
"""
import sys

from laid_nb.accuracy import Results, by_size
from laid_nb.evaluate import evaluate
from laid_nb.haystack import drawn_test
from laid_nb.store import load_model
from laid_nb.vhs import read_vhs


def main(name=None, data=None, images=None, questions=48):
    drawn = dict(sizes=(1, 5, 20, 50), questions=questions, seed=0, split="test")
    haystacks = read_vhs(data, images) if data else drawn_test(**drawn)
    names = [name] if name else ["student", "distilled"]
    found = {name: by_size(evaluate(*load_model(name), haystacks, name=name)) for name in names}
    results = Results(found)
    for name in names:
        right = ", ".join(f"{n}: {100*a:.0f}%" for n, a in zip(results.sizes, results.accuracy[name]))
        print(f"{name}: {right}; window {results.window(name)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
