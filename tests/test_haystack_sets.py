"""Sets of drawn haystacks: as many questions at every size, none twice, and no haystack in two splits."""
import pytest

from laid_nb.haystack import drawn_test, drawn_training


@pytest.mark.parametrize("questions", [1, 7, 24])
def test_as_many_questions_at_every_size_and_none_twice(questions):
    stacks = drawn_test([1, 2, 6, 30], questions, seed=3)
    for n in (1, 2, 6, 30):
        assert sum(len(h.questions) for h in stacks if len(h.images) == n) == questions
    for h in stacks:
        assert len({q.anchor for q in h.questions}) == len(h.questions)
    assert len({h.id for h in stacks}) == len(stacks)


def test_seeds_and_splits_share_no_haystack():
    sets = drawn_test([5], 60), drawn_test([5], 60, seed=1), drawn_test([5], 60, split="val"), drawn_training([5], 12)
    ids = [{h.id for h in stacks} for stacks in sets]
    assert len(set().union(*ids)) == sum(map(len, ids))
