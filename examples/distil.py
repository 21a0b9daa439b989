"""Distil a pair: a student beside its bigger sibling, on your haystacks.

  python examples/distil.py                                    # the embedded pair, drawn haystacks, a few steps
  python examples/distil.py STUDENT TEACHER data.json images/  # yours: folders or hub names, VHs' form
"""
import sys

from laid_nb.haystack import drawn_training
from laid_nb.simulate import WindowSimulation
from laid_nb.store import load_model
from laid_nb.train import LaidConfig, LaidTrainer
from laid_nb.vhs import read_vhs


def main(student="student", teacher="teacher", data=None, images=None, out="distilled-run", steps=10):
    haystacks = read_vhs(data, images) if data else drawn_training(range(1, 21), 32, seed=0)
    (student, processor), (teacher, _) = load_model(student), load_model(teacher)
    config = LaidConfig(out, method="laid+", max_steps=steps, per_device_train_batch_size=2, learning_rate=5e-4,
                        mixing_learning_rate=.1, gradient_accumulation_steps=1, report_to="none")
    simulation = WindowSimulation(max_gap=600, max_multiplicity=16)  # short samples, read as if they were long
    LaidTrainer(student, config, haystacks, processor, teacher=teacher, simulation=simulation).train()
    student.save_pretrained(f"{out}/model")
    processor.save_pretrained(f"{out}/model")


if __name__ == "__main__":
    main(*sys.argv[1:])
