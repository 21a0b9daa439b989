"""A loss of your own beside the package's: entropy of attention, so that the student looks as sharply as the teacher.

  python examples/add_loss.py [OUT]

A `Term` is a function of what both models made of a batch (`Evidence`); registered, it has a weight of its own,
`lambda_entropy`, in LaidConfig, in `laid train` and in the log."""
import sys

import torch

from laid_nb.haystack import drawn_training
from laid_nb.losses import TERMS, Evidence, Term
from laid_nb.store import load_model


def entropy(query, key, mask, scaling):
    "Mean entropy of attention over heads and real tokens, in nats; query [batch, heads, tokens, head_dim]."
    mask = mask.bool()
    key = key.repeat_interleave(query.shape[1]//key.shape[1], 1)
    causal = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
    seen = causal & mask[:, None, None]
    log_p = (query@key.mT*scaling).masked_fill(~seen, -1e4).log_softmax(-1)
    return -(log_p.exp()*log_p).sum(-1).transpose(1, 2)[mask].mean()


def entropy_gap(e: Evidence):
    "Squared difference of mean entropies of student and teacher."
    student, teacher = e.heads[:2], e.heads[2:]
    gap = entropy(*student, e.mask, e.scalings[0]) - entropy(*teacher, e.mask, e.scalings[1]).detach()
    return gap**2


TERMS["entropy"] = Term(entropy_gap, "how sharply heads look", sees="attention", methods=(), colour="C7", per="samples")

from laid_nb.train import LaidConfig, LaidTrainer  # noqa: E402, settings are made of the terms that there are by now


def main(out="entropy-run", steps=5):
    (student, processor), (teacher, _) = load_model("student"), load_model("teacher")
    config = LaidConfig(out, method="laid", lambda_entropy=.1, max_steps=steps, logging_steps=1,
                        per_device_train_batch_size=2, gradient_accumulation_steps=1, report_to="none")
    haystacks = drawn_training(range(1, 6), 16, seed=0)
    LaidTrainer(student, config, haystacks, processor, teacher=teacher).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
