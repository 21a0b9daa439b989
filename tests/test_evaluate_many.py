"Many haystacks at once against one by one, in every family; what padding must not do; and work that grows with the records alone."
import json
import sys
from dataclasses import replace

import pytest
import torch

import families
from laid_nb import evaluate as module
from laid_nb.evaluate import ask, ask_many, evaluate, read_records
from laid_nb.haystack import picture_haystack
from laid_nb.inputs import family_of, precompute_prompts
from test_evaluate import tiny
from test_families import Built

TEXTS = ("a cup", "a tie", "a cup and a tie")  # they begin alike: the whole answer is scored


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    made, folder = {}, tmp_path_factory.mktemp("pictures")
    return lambda name: made.setdefault(name, Built(name, folder))


def worded(stacks):
    "One question about each haystack, of unequal length."
    return [replace(h, id=f"{h.id}-{i}", questions=(replace(h.questions[i % 3], wording="Look. "*(2*i % 5) + h.questions[i % 3].text),))
            for i, h in enumerate(stacks)]


def chosen(h): return replace(h, questions=tuple(replace(q, kind="choice", wording=q.text, answer=TEXTS[0], choices=TEXTS) for q in h.questions))


def passes(model, work):
    "What `work` returns, and the rows of every call of the model."
    rows = []
    hook = model.register_forward_pre_hook(lambda m, args, given: rows.append(len(given["position_ids"].reshape(-1, *given["position_ids"].shape[-2:])[0])),
                                           with_kwargs=True)
    try: return work(), rows
    finally: hook.remove()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_many_haystacks_are_asked_as_each_alone(built, name):
    if name == "smolvlm": pytest.importorskip("num2words", reason="the stock SmolVLMProcessor cannot be made without it")
    made = built(name)
    model, reads, windows = made.exact, made.reads, module._has_windows(made.model())
    stacks = worded([*made.haystacks, made.haystacks[0]])
    stacks[1] = chosen(stacks[1])  # its choices are scored as whole answers
    one_by_one = [ask(model, reads, h)[0] for h in stacks]
    together, rows = passes(model, lambda: ask_many(model, reads, stacks, [None]*4))
    assert abs(one_by_one[0] - one_by_one[3]).max() > 1e-4  # the questions matter
    for (found, _), alone in zip(together, one_by_one): torch.testing.assert_close(found, alone, atol=made.error, rtol=0)
    if family_of(reads).whole or module._keeps_state(model): assert rows == [6]  # whole prompts: one for each, and one more for each further choice
    elif windows: assert max(rows) < 4  # only what is of one length
    else: assert rows[:2] == [4, 4] and sum(rows[2:]) == 3  # images, questions, and the three choices of one of them


def test_float32_and_what_is_written(built):
    made = built("qwen2_5_vl")
    model, stacks = made.model(), worded([*made.haystacks, made.haystacks[0]])
    for h, (log_p, (said,)) in zip(stacks, ask_many(model, made.reads, stacks, [None]*4, max_new_tokens=5)):
        alone, (text,) = ask(model, made.reads, h, max_new_tokens=5)
        torch.testing.assert_close(log_p, alone, atol=1e-5, rtol=0)
        assert said == text


def test_features_serve_many_haystacks(built):
    made = built("qwen2_5_vl")
    model, stacks = made.exact, worded(made.haystacks)
    seen = precompute_prompts(model, made.reads, stacks, progress=False)
    for h, (log_p, _) in zip(stacks, ask_many(model, made.reads, stacks, [None]*3, features=[seen[h.id] for h in stacks])):
        torch.testing.assert_close(log_p, ask(model, made.reads, h)[0], atol=1e-10, rtol=0)


# --- what padding must not do ---------------------------------------------------

def start_behind_pads(prefix): return prefix._replace(start=prefix.start + (prefix.length - prefix.real.sum(1))[:, None])  # positions count the pads
def show_pads(prefix): return prefix._replace(real=None)
def start_of_the_first(prefix): return prefix._replace(start=prefix.start[..., :1, :].expand_as(prefix.start))


@pytest.mark.parametrize("spoil", [start_behind_pads, show_pads, start_of_the_first])
def test_what_padding_between_must_not_do_is_noticed(built, monkeypatch, spoil):
    made, real = built("qwen2_5_vl"), module.read_prefix
    model, stacks = made.exact, worded(made.haystacks)
    right = torch.cat([ask(model, made.reads, h)[0] for h in stacks])
    monkeypatch.setattr(module, "read_prefix", lambda *a: spoil(real(*a)))
    off = (torch.cat([log_p for log_p, _ in ask_many(model, made.reads, stacks, [None]*3)]) - right).abs().amax(1)
    same = 0 if spoil is start_of_the_first else 2  # the longest has no padding
    assert off[same] < 1e-10 < 1e-6 < off[[i for i in range(3) if i != same]].min()


def test_pads_before_questions_of_several_haystacks_are_not_counted(built, monkeypatch):
    made, real = built("qwen2_5_vl"), module._continued
    model, stacks = made.exact, worded(made.haystacks)
    right = torch.cat([ask(model, made.reads, h)[0] for h in stacks])
    def shifted(prefix, tails, owners):
        pads = torch.tensor([max(map(len, tails)) - len(t) for t in tails])
        given = real(prefix, tails, owners)
        return given | {"position_ids": given["position_ids"] + pads[:, None]}
    monkeypatch.setattr(module, "_continued", shifted)
    off = (torch.cat([log_p for log_p, _ in ask_many(model, made.reads, stacks, [None]*3)]) - right).abs().amax(1)
    assert off.min() < 1e-10 < 1e-6 < off.sort().values[1]


# --- what is read together ------------------------------------------------------

@pytest.fixture(scope="module")
def model(processor): return tiny("qwen2_5", processor)


SMALL = [picture_haystack(seed, n, 1, split="test") for n in (1, 2) for seed in range(3)]  # as VHs: one question each


@pytest.mark.parametrize("batch, tokens, rows", [(6, 10_000, [6, 6]), (4, 10_000, [4, 4, 2, 2]), (6, 1, [1, 1]*6), (1, 10_000, [1, 1]*6)])
def test_batches_keep_to_their_limits(model, processor, batch, tokens, rows):
    records, found = passes(model, lambda: evaluate(model, processor, SMALL, batch=batch, max_batch_tokens=tokens, progress=False))
    assert found == rows and [r["haystack"] for r in records] == [h.id for h in SMALL]


def test_a_limit_counts_padding(model, processor):
    sizes = [module._tokens(module._asked(processor, h, None, 56, None)) for h in SMALL]
    assert sizes[0] < sizes[3]  # one image, two images
    limit = 3*sizes[3] - 1  # the third row of two images is too much, and so is a fourth of one beside it
    _, rows = passes(model, lambda: evaluate(model, processor, SMALL, batch=6, max_batch_tokens=limit, progress=False))
    assert rows == [3, 3, 2, 2, 1, 1] and 4*sizes[3] > limit >= 3*max(sizes[:3])


def test_what_is_read_together_does_not_depend_on_what_is_there(model, processor, tmp_path):
    evaluate(model, processor, SMALL, tmp_path/"a", batch=4, progress=False)
    whole = (tmp_path/"a").read_bytes()
    first = whole.split(b"\n")[0:5]  # the header and one group
    (tmp_path/"a").write_bytes(b"\n".join(first) + b'\n{"hay')
    evaluate(model, processor, SMALL, tmp_path/"a", batch=4, progress=False)
    assert (tmp_path/"a").read_bytes() == whole


def test_the_modes_of_all_parts_are_restored(model, processor):
    model.train()
    model.model.visual.eval()
    before = {name: part.training for name, part in model.named_modules()}
    evaluate(model, processor, SMALL[:1], progress=False)
    assert {name: part.training for name, part in model.named_modules()} == before and len(set(before.values())) == 2
    model.eval()


# --- the file says how it was made ------------------------------------------------

def test_another_dtype_or_attention_is_not_the_same_evaluation(processor, tmp_path):
    model, path = tiny("qwen2_5", processor), tmp_path/"a.jsonl"
    evaluate(model, processor, SMALL[:1], path, progress=False)
    assert (read_records(path)[0]["dtype"], read_records(path)[0]["attention"]) == ("float64", "sdpa")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="another attention"): evaluate(model, processor, SMALL[:1], path, progress=False)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="another model, dtype"): evaluate(model.float(), processor, SMALL[:1], path, progress=False)


def test_a_file_that_does_not_say_its_dtype_goes_on(model, processor, tmp_path):
    evaluate(model, processor, SMALL[:1], tmp_path/"a", progress=False)
    header, *rows = (tmp_path/"a").read_text().splitlines()
    older = {k: v for k, v in json.loads(header).items() if k not in ("dtype", "attention")}
    (tmp_path/"a").write_text("\n".join([json.dumps(older), *rows]) + "\n")
    assert len(evaluate(model, processor, SMALL[:2], tmp_path/"a", progress=False)) == 2


# --- work ---------------------------------------------------------------------------

def calls(work):
    "How many functions are called, generators' steps among them."
    count = 0
    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")
    sys.setprofile(profile)
    try: work()
    finally: sys.setprofile(None)
    return count


def test_work_grows_with_the_number_of_haystacks(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "fsync", lambda file: None)  # 6 ms each
    def asking(model, processor, haystack, turns, *rest): return torch.tensor([[-1., -2.]]*len(turns)), None
    def cost(n, path):
        stacks = [replace(SMALL[0], id=str(i)) for i in range(n)]
        return calls(lambda: evaluate(model, processor, stacks, path, asking=asking, progress=False))
    cost(1, None)  # what is done once
    for again in range(2):  # fresh, and all found in the file
        few, twice, four = (cost(n, tmp_path/str(n)) for n in (100, 200, 400))
        assert 1.9 < (four - twice)/(twice - few) < 2.1
