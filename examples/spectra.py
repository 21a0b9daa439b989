"""What each head of a model does with distance: its mean response by distance, and the power spectrum of that.

  python examples/spectra.py             # the embedded student -> spectra.png
  python examples/spectra.py MODEL OUT   # a folder or a hub name
"""
import sys

import torch

from laid_nb.capture import capture
from laid_nb.haystack import picture_haystack
from laid_nb.inputs import HaystackCollator, image_inputs
from laid_nb.spectra import distance_response, plot_power_spectrum, power_spectrum
from laid_nb.store import load_model


def main(name="student", out="spectra.png"):
    model, processor = load_model(name)
    batch = HaystackCollator(processor)([picture_haystack(seed=0, n_images=20, n_questions=1, split="test")])
    with torch.no_grad(), capture(model) as cache:  # rotated queries and keys of every layer
        model(**image_inputs(model, batch, "student"), logits_to_keep=1, use_cache=False)
    layer = cache.layers[-1]
    response = distance_response(cache["q", layer], cache["k", layer])  # [heads, distances]
    power = power_spectrum(response)[1]
    plot_power_spectrum(power, limits=(-6, 1)).savefig(out)
    print(f"written: {out}, layer {layer} of {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
