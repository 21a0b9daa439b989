"""A model that teaches itself, without labels and without a bigger model: frozen, it reads a haystack thinned to the
images that a question is about; trained, it reads all of them.

  python examples/self_anchor.py             # the embedded student, a few steps
  python examples/self_anchor.py MODEL OUT   # a folder or a hub name
"""
import copy
import sys

from laid_nb.haystack import drawn_training
from laid_nb.recompose import unlabelled
from laid_nb.simulate import WindowSimulation
from laid_nb.store import load_model
from laid_nb.train import LaidConfig, LaidTrainer


def main(name="student", out="self-anchored-run", steps=10):
    student, processor = load_model(name)
    teacher = copy.deepcopy(student)
    config = LaidConfig(out, method="kd", alpha=1.0, gain=True, recompose=1.0, max_steps=steps, learning_rate=5e-4,
                        mixing_learning_rate=.1, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                        report_to="none")
    simulation = WindowSimulation(max_gap=600, max_multiplicity=16, thin=-3.0)  # log of how often a bystander counts
    haystacks = unlabelled(drawn_training(range(1, 21), 32, seed=0))
    LaidTrainer(student, config, haystacks, processor, teacher=teacher, simulation=simulation).train()
    student.save_pretrained(f"{out}/model")
    processor.save_pretrained(f"{out}/model")


if __name__ == "__main__":
    main(*sys.argv[1:])
