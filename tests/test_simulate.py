"Window simulation against repeated keys, and against the positions which Qwen2.5-VL itself computes."
import math

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2Model

from laid_nb.capture import capture
from laid_nb.simulate import (
    WindowSimulation,
    asked_rows,
    gap_positions,
    image_groups,
    multiplicity_bias,
    multiplicity_factors,
    thinned_factors,
)

START, END, IMAGE, PAD = 1, 2, 3, 0


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def prompt(sizes, question=6, lead=2):
    "Token ids of images of h x w merged tokens with a word before each, then a question."
    ids = [10]*lead
    for h, w in sizes:
        ids += [11, START, *[IMAGE]*(h*w), END]
    return ids + [20]*question


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=40,
                         bos_token_id=None, eos_token_id=None, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[0]),
        vision_start_token_id=START, vision_end_token_id=END, image_token_id=IMAGE, video_token_id=4)
    model = Qwen2_5_VLForConditionalGeneration(config).double().eval()
    for p in model.model.language_model.parameters():
        if p.ndim > 1: torch.nn.init.normal_(p, std=.3)
    return model


@pytest.fixture
def sample():
    "Two rows of six and four images (the second padded left), two questions each: input_ids, groups, asked."
    rows = [prompt([(2, 2)]*6, 8), prompt([(2, 3)]*4, 6)]
    S = max(map(len, rows))
    input_ids = torch.tensor([[PAD]*(S - len(r)) + r for r in rows])
    turn = torch.full_like(input_ids, -1)
    for row, n in enumerate((4, 3)):
        turn[row, -2*n:-n], turn[row, -n:] = 0, 1
    groups = image_groups(input_ids, IMAGE, START, END)
    return input_ids, groups, asked_rows(turn, [[[1], [3, 4]], [[0], [3]]], groups)


# -- image_groups

def test_groups_of_ragged_rows(sample):
    input_ids, groups, _ = sample
    for row, (images, tokens) in enumerate(((6, 6), (4, 8))):
        assert [(groups[row] == g).sum().item() for g in range(-1, 7)][1:] == [tokens]*images + [0]*(7 - images)
    assert (groups[input_ids == IMAGE] >= 0).all() and (groups[input_ids == 20] == -1).all() and (groups[input_ids == PAD] == -1).all()


def test_groups_of_text_only_are_empty():
    assert (image_groups(torch.tensor([[10, 11, 12]]), IMAGE, START, END) == -1).all()


@pytest.mark.parametrize("ids, message", [
    ([START, IMAGE, IMAGE], "do not alternate"),
    ([IMAGE, END, 10], "do not alternate"),
    ([START, IMAGE, START, IMAGE, END, END], "do not alternate"),
    ([10, IMAGE, START, IMAGE, END], "outside"),
    ([START, IMAGE, END, START, 4, 4, END], "1 hold image tokens"),
])
def test_groups_refuse_broken_prompts(ids, message):
    with pytest.raises(ValueError, match=message):
        image_groups(torch.tensor([ids]), IMAGE, START, END)


def test_groups_refuse_a_flat_prompt():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        image_groups(torch.tensor([START, IMAGE, END]), IMAGE, START, END)


# -- gap_positions

def positions_of(model, ids, sizes):
    ids = torch.tensor([ids])
    grid = torch.tensor([[1, 2*h, 2*w] for h, w in sizes])
    return model.model.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=grid)[0]


@pytest.mark.parametrize("sizes, gaps", [
    ([(2, 2)]*3, [0, 0, 0]),
    ([(2, 2)]*3, [0, 5, 100]),
    ([(2, 3), (5, 2), (1, 1), (4, 4)], [7, 0, 0, 31]),
    ([(3, 1)], [12]),
])
def test_gaps_are_the_positions_of_inserted_words(model, sizes, gaps):
    ids = prompt(sizes)
    longer, kept, image = [], [], 0
    for token in ids:
        if token == START:
            longer += [30]*gaps[image]
            image += 1
        kept.append(len(longer))
        longer.append(token)
    groups = image_groups(torch.tensor([ids]), IMAGE, START, END)
    gapped = gap_positions(positions_of(model, ids, sizes), groups, torch.tensor([gaps]))
    assert torch.equal(gapped, positions_of(model, longer, sizes)[:, :, kept])


def test_gaps_are_the_positions_of_cut_images(model):
    "Kept images of a longer prompt stand where gaps as wide as the cut images put them; each cut takes a word and two delimiters along."
    sizes = [(2, 2), (3, 5), (4, 1), (2, 2), (6, 6), (1, 2)]
    keep = [1, 4, 5]
    ids = prompt(sizes)
    groups = image_groups(torch.tensor([ids]), IMAGE, START, END)[0]
    image_or_word = torch.cat([groups[1:], groups[-1:]]).maximum(groups)  # the word before an image goes with it
    stays = (image_or_word < 0) | torch.isin(image_or_word, torch.tensor(keep))
    short = torch.tensor(ids)[stays]
    width = lambda cut: sum(3 + max(sizes[i]) for i in cut)
    gaps = torch.tensor([[width([0]), width([2, 3]), 0]])
    gapped = gap_positions(positions_of(model, short.tolist(), [sizes[i] for i in keep]), image_groups(short[None], IMAGE, START, END), gaps)
    full = positions_of(model, ids, sizes)[:, :, stays]
    is_word = (short == 11).nonzero().flatten()[:2]  # a gap opens at vision_start, so the word before it keeps its place
    gapped[:, :, is_word], full[:, :, is_word] = 0, 0
    assert torch.equal(gapped, full)


def test_gaps_of_a_padded_batch_fit_each_row(model, sample):
    input_ids, groups, _ = sample
    grid = torch.tensor([[1, 4, 4]]*6 + [[1, 4, 6]]*4)
    positions = model.model.get_rope_index(input_ids, (input_ids == IMAGE).int(), image_grid_thw=grid, attention_mask=(input_ids != PAD).long())[0]
    gaps = torch.tensor([[1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 900, 900]])
    moved = gap_positions(positions, groups, gaps) - positions
    assert (moved[:, 0, -1] == 63).all() and (moved[:, 1, -1] == 15).all()
    assert (moved[:, 1][:, input_ids[1] == PAD] == 0).all()
    for g in range(4):
        assert (moved[:, 1][:, groups[1] == g] == gaps[1, :g + 1].sum()).all()


def test_gaps_of_plain_positions(sample):
    _, groups, _ = sample
    positions = torch.arange(groups.shape[1]).expand(2, -1)
    gaps = torch.randint(0, 50, (2, 6), generator=rng())
    assert torch.equal(gap_positions(positions, groups, gaps), gap_positions(positions.expand(3, -1, -1), groups, gaps)[0])


@pytest.mark.parametrize("change, message", [
    (dict(position_ids=torch.zeros(4, 2, 52, dtype=torch.long)), "position_ids has shape"),
    (dict(gaps=torch.zeros(2, 5, dtype=torch.long)), "gaps has shape"),
    (dict(gaps=torch.zeros(2, 6)), "gaps has shape"),
    (dict(gaps=torch.tensor([[0, 1, -2, 0, 0, 0]]*2)), "not be negative, found -2"),
    (dict(groups=torch.full((2, 52), -1)), "row 0 has no image"),
    (dict(groups=torch.zeros(52, dtype=torch.long)), "groups has shape"),
])
def test_gaps_refuse_bad_input(sample, change, message):
    _, groups, _ = sample
    good = dict(position_ids=torch.zeros(3, *groups.shape, dtype=torch.long), groups=groups, gaps=torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        gap_positions(**{**good, **change})


def test_jumps_of_plain_positions_need_an_attention_mask():
    "The trap the notebook names: without a mask transformers takes a gap in plain positions for a packed sequence's border."
    torch.manual_seed(0)
    text = Qwen2Model(Qwen2Config(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)).eval()
    ids, jump = torch.arange(12)[None], torch.arange(12)[None] + 50*(torch.arange(12) >= 6)
    read = lambda ids, **kw: text(input_ids=ids, use_cache=False, **kw).last_hidden_state[0, -1]
    other = ids.clone()
    other[0, 0] = 30
    assert torch.equal(read(ids, position_ids=jump), read(other, position_ids=jump))
    mask = torch.ones_like(ids)
    assert not torch.equal(read(ids, position_ids=jump, attention_mask=mask), read(other, position_ids=jump, attention_mask=mask))


# -- asked_rows and multiplicity_bias

def test_asked_marks_the_rows_of_each_question(sample):
    _, groups, asked = sample
    S = groups.shape[1]
    expected = torch.zeros(2, S, 6, dtype=torch.bool)
    expected[0, S - 8:S - 4, 1] = expected[0, S - 4:, 3] = expected[0, S - 4:, 4] = True
    expected[1, S - 6:S - 3, 0] = expected[1, S - 3:, 3] = True
    assert torch.equal(asked, expected)


@pytest.mark.parametrize("turn, needles, message", [
    (0, [[[0]], [[4]]], "row 1, question 0: image 4 is not among the row's 4"),
    (0, [[[-1]], [[0]]], "image -1"),
    (1, [[[0]], [[0]]], "counts to 1 but needles has 1"),
    (0, [[[0]]], "needles of 1 rows"),
])
def test_asked_refuses_bad_input(sample, turn, needles, message):
    _, groups, _ = sample
    with pytest.raises(ValueError, match=message):
        asked_rows(torch.full_like(groups, turn), needles, groups)


@pytest.mark.parametrize("per_image", [False, True])
def test_bias_by_its_definition(sample, per_image):
    _, groups, asked = sample
    c = torch.rand(2, 6, generator=rng(), dtype=torch.float64)*9 + 1 if per_image else torch.tensor([2.5, 7.])
    bias = multiplicity_bias(groups, asked, c, torch.float64)
    assert bias.shape == (2, 1, groups.shape[1], groups.shape[1]) and bias.dtype == torch.float64
    for b in range(2):
        for row, own in enumerate(groups[b].tolist()):
            for key, g in enumerate(groups[b].tolist()):
                counts = g >= 0 and g != own and not asked[b, row, g]
                expected = math.log(c[b, g] if per_image else c[b]) if counts else 0
                assert bias[b, 0, row, key].item() == pytest.approx(expected, abs=1e-12)


def test_factors_are_of_tokens_by_images(sample):
    "rows @ keys^T is the bias to the last bit (each product is log c times 1), and nothing larger than tokens x images is made."
    _, groups, asked = sample
    c = torch.rand(2, 6, generator=rng())*9 + 1
    rows, keys = multiplicity_factors(groups, asked, c, torch.bfloat16)
    assert rows.shape == keys.shape == (*groups.shape, 6) and rows.dtype == keys.dtype == torch.bfloat16
    assert torch.equal((rows @ keys.mT)[:, None], multiplicity_bias(groups, asked, c, torch.bfloat16))
    assert torch.equal(keys.sum(-1), (groups >= 0).bfloat16())


@pytest.mark.parametrize("c", [1, 2, 7])
def test_attention_with_repeated_keys(model, sample, c):
    "One attention of the real class: the bias against keys and values repeated c times, each row for itself."
    input_ids, groups, asked = (x[:1] for x in sample)
    S = input_ids.shape[1]
    attn, text = model.model.language_model.layers[0].self_attn, model.model.language_model
    x = torch.randn(1, S, 64, generator=rng(), dtype=torch.float64)
    positions = model.model.get_rope_index(input_ids, (input_ids == IMAGE).int(), image_grid_thw=torch.tensor([[1, 4, 4]]*6))[0]
    position_embeddings = text.rotary_emb(x, positions)
    causal = torch.full((S, S), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
    bias = multiplicity_bias(groups, asked, torch.tensor([c]), torch.float64)
    with torch.no_grad():
        fast = attn(x, attention_mask=causal + bias, position_embeddings=position_embeddings)[0][0]
        for row in range(2, S):
            copies = torch.tensor([1 if g < 0 or g == groups[0, row] or asked[0, row, g] else c for g in groups[0, :row + 1]])
            source = torch.arange(row + 1).repeat_interleave(copies)
            slow = attn(x[:, source], attention_mask=None, position_embeddings=tuple(e[:, source] for e in position_embeddings))[0]
            # the last token's row attends to all the copies before it
            torch.testing.assert_close(fast[row], slow[0, -1], rtol=1e-10, atol=1e-10)


def test_whole_model_with_repeated_images(model, sample):
    "All layers: c copies of every image, each blind to its own siblings, one copy shown to the rows that ask about it."
    input_ids, groups, asked = (x[:1] for x in sample)
    S, c = input_ids.shape[1], torch.tensor([[3, 1, 4, 2, 5, 2]])
    copies = torch.cat([torch.ones(1, 1, dtype=torch.long), c], 1)[0, groups[0] + 1]
    source = torch.arange(S).repeat_interleave(copies)
    copy_of = torch.cat([torch.arange(n) for n in copies])
    g = groups[0, source]
    image = g >= 0
    sees = source[None] <= source[:, None]
    sees &= ~((g[:, None] == g) & image) | (copy_of[:, None] == copy_of)
    sees &= ~(asked[0, source][:, g.clamp(min=0)] & image) | (copy_of == 0)
    lowest = torch.finfo(torch.float64).min
    x = torch.randn(1, S, 64, generator=rng(), dtype=torch.float64)
    positions = model.model.get_rope_index(input_ids, (input_ids == IMAGE).int(), image_grid_thw=torch.tensor([[1, 4, 4]]*6))[0]
    positions = gap_positions(positions, groups, torch.tensor([[0, 9, 0, 0, 70, 5]]))
    read = lambda x, p, mask: model.model.language_model(inputs_embeds=x, position_ids=p, attention_mask=mask).last_hidden_state
    with torch.no_grad():
        long = read(x[:, source], positions[:, :, source], torch.zeros(sees.shape, dtype=x.dtype).masked_fill(~sees, lowest)[None, None])
        causal = torch.full((S, S), lowest, dtype=x.dtype).triu(1)
        short = read(x, positions, causal + multiplicity_bias(groups, asked, c, torch.float64))
        plain = read(x, positions, causal[None, None])
    torch.testing.assert_close(short[:, source], long, rtol=1e-6, atol=1e-6)
    assert (plain - short).abs().max() > .1


@pytest.mark.parametrize("change, message", [
    (dict(multiplicity=torch.tensor([2., .5])), "at least 1"),
    (dict(multiplicity=torch.tensor([2., math.nan])), "at least 1"),
    (dict(multiplicity=torch.tensor([2., math.inf])), "finite"),
    (dict(multiplicity=torch.tensor(2.)), "multiplicity has shape"),
    (dict(multiplicity=torch.ones(2, 5)), "multiplicity has shape"),
    (dict(asked=torch.zeros(2, 52, 5, dtype=torch.bool)), "asked has shape"),
    (dict(asked=torch.zeros(2, 52, 6)), "asked has shape"),
    (dict(groups=torch.full((2, 52), -1)), "no image"),
])
def test_bias_refuses_bad_input(sample, change, message):
    _, groups, asked = sample
    for function in (multiplicity_bias, multiplicity_factors):
        with pytest.raises(ValueError, match=message):
            function(**{**dict(groups=groups, asked=asked, multiplicity=torch.tensor([2., 2.])), **change})


def test_capture_adds_the_bias_in_every_layer(model, sample):
    "Through the attention interface, on a padded batch: equal to the same bias inside a mask, and gone afterwards."
    input_ids, groups, asked = sample
    S = input_ids.shape[1]
    real = input_ids != PAD
    x = torch.randn(2, S, 64, generator=rng(), dtype=torch.float64)
    positions = gap_positions(torch.arange(S).expand(3, 2, -1), groups, torch.randint(0, 30, (2, 6), generator=rng()))
    bias = multiplicity_bias(groups, asked, torch.tensor([9., 4.]), torch.float64)
    lowest = torch.finfo(x.dtype).min
    visible = torch.ones(S, S, dtype=torch.bool).tril() & real[:, None, None]
    read = lambda mask: model.model.language_model(inputs_embeds=x, position_ids=positions, attention_mask=mask).last_hidden_state[real]
    with torch.no_grad():
        with capture(model, layers=[], bias=bias):
            captured = read(real.long())
        by_mask, after, plain = read(torch.where(visible, bias, lowest)), read(real.long()), read(torch.where(visible, 0*bias, lowest))
    torch.testing.assert_close(captured, by_mask, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after, plain, rtol=1e-6, atol=1e-6)
    assert (captured - after).abs().max() > .1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("wide_from", [0, 1024])
def test_factors_equal_the_dense_bias(model, sample, padded, wide_from, monkeypatch):
    "A sample of the simulation in the whole text model: wide heads without padding if the prompt is long enough, else the mask."
    monkeypatch.setattr("laid_nb.capture._wide_from", wide_from)
    input_ids, groups, asked = sample if padded else (x[:1] for x in sample)
    positions = torch.arange(groups.shape[1]).expand(3, len(groups), -1)
    positions, (rows, keys) = WindowSimulation(40, 9, 0).sample(groups, asked, positions, 1, rng(), torch.float64)
    real = input_ids != PAD
    x = torch.randn(*groups.shape, 64, generator=rng(), dtype=torch.float64)
    read = lambda: model.model.language_model(inputs_embeds=x, position_ids=positions, attention_mask=real.long()).last_hidden_state[real]
    with torch.no_grad(), capture(model, layers=[], bias=(rows @ keys.mT)[:, None]) as cache:
        dense = read()
        cache.bias = rows, keys
        factors = read()
        cache.bias = None
        plain = read()
    torch.testing.assert_close(factors, dense, rtol=1e-6, atol=1e-6)  # the family's RMSNorm is float32
    assert (plain - dense).abs().max() > .1


# -- WindowSimulation

def test_ramp_is_linear_then_full():
    sim = WindowSimulation(max_gap=100, max_multiplicity=5, ramp=.4)
    assert [sim.limits(p) for p in (0, .1, .2, .4, 1)] == [(0, 1), (25, 2), (50, 3), (100, 5), (100, 5)]
    assert WindowSimulation(100, 5, ramp=0).limits(0) == (100, 5)


def test_samples_stay_within_the_limits(sample):
    _, groups, asked = sample
    positions = torch.arange(groups.shape[1]).expand(3, 2, -1)
    sim, generator = WindowSimulation(max_gap=40, max_multiplicity=6, ramp=.5), rng()
    for progress, gap, c in ((0, 0, 1), (.25, 20, 3.5), (.9, 40, 6)):
        shifts, counts = [], []
        for _ in range(200):
            gapped, bias = sim.sample(groups, asked, positions, progress, generator)
            shift = gapped - positions
            assert (shift.diff(dim=-1) >= 0).all() and (shift[0] == shift[1]).all() and (shift[0] == shift[2]).all()
            shifts.append(shift[0, :, -1])
            counts.append(bias[0].amax((1, 2)).exp())
        shifts, counts = torch.stack(shifts), torch.stack(counts)
        assert shifts.min() >= 0 and gap*.9 <= shifts.max() <= gap
        assert counts.min() >= 1 and c*.9 <= counts.max() <= c + 1e-4


def test_teacher_and_student_read_one_sample(sample):
    "Same generator state, same reading, whatever the dtype; the next draw is another."
    _, groups, asked = sample
    positions = torch.arange(groups.shape[1]).expand(3, 2, -1)
    sim = WindowSimulation(max_gap=40, max_multiplicity=6, ramp=0)
    generator = rng(5)
    state = generator.get_state()
    one = sim.sample(groups, asked, positions, 1, generator)
    two = sim.sample(groups, asked, positions, 1, generator)
    generator.set_state(state)
    again = sim.sample(groups, asked, positions, 1, generator, dtype=torch.bfloat16)
    assert torch.equal(one[0], again[0]) and all(torch.equal(a.bfloat16(), b) for a, b in zip(one[1], again[1]))
    assert not torch.equal(one[0], two[0]) and not torch.equal(one[1][0], two[1][0])


def test_off_changes_nothing(sample):
    _, groups, asked = sample
    positions = torch.arange(groups.shape[1]).expand(3, 2, -1)
    gapped, bias = WindowSimulation().sample(groups, asked, positions, 1, rng())
    assert torch.equal(gapped, positions) and bias is None


def test_switching_one_part_off_leaves_the_other(sample):
    _, groups, asked = sample
    positions = torch.arange(groups.shape[1]).expand(3, 2, -1)
    both = WindowSimulation(40, 6, 0).sample(groups, asked, positions, 1, rng())
    assert torch.equal(WindowSimulation(max_gap=40, ramp=0).sample(groups, asked, positions, 1, rng())[0], both[0])
    assert all(map(torch.equal, WindowSimulation(max_multiplicity=6, ramp=0).sample(groups, asked, positions, 1, rng())[1], both[1]))


@pytest.mark.parametrize("settings, message", [
    (dict(max_gap=-1), "max_gap"), (dict(max_multiplicity=.5), "max_multiplicity"), (dict(max_multiplicity=math.nan), "max_multiplicity"),
    (dict(ramp=1.5), "ramp"), (dict(ramp=-.1), "ramp"),
])
def test_settings_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WindowSimulation(**settings)


def test_progress_outside_training_refused():
    with pytest.raises(ValueError, match="progress"):
        WindowSimulation(10).limits(1.2)


# --- thinned --------------------------------------------------------------------
def test_a_thinned_question_sees_only_the_images_it_asks_about(model):
    "log c far below 0 is a mask that hides the others from the rows of the question, and from these rows alone."
    ids = torch.tensor([prompt([(1, 2), (2, 2), (1, 1)])])
    groups = image_groups(ids, IMAGE, START, END)
    turn = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - 6, 0, -1)[None]
    asked = asked_rows(turn, [[[1]]], groups)
    rows, keys = thinned_factors(groups, asked, turn, -80., torch.float64)
    n, low = ids.shape[1], torch.finfo(torch.float32).min
    causal = torch.full((n, n), -torch.inf).triu(1)
    sees_not = (turn[0] >= 0)[:, None] & (groups[0] >= 0) & (groups[0] != 1)
    text = model.model.language_model.float()
    embeds = torch.randn(1, n, 64, generator=rng(3))
    how = dict(inputs_embeds=embeds, position_ids=torch.arange(n).expand(3, 1, n))
    with torch.no_grad():
        thin, hidden, plain = (text(attention_mask=mask[None, None].clamp(min=low).float(), **how).last_hidden_state
                               for mask in (causal + (rows @ keys.mT)[0], causal.masked_fill(sees_not, -torch.inf), causal))
    torch.testing.assert_close(thin, hidden, rtol=1e-5, atol=1e-5)
    assert torch.equal(thin[:, :-6], plain[:, :-6]) and not torch.allclose(thin[:, -6:], plain[:, -6:], atol=1e-3)


def test_thinned_factors_refuse_what_does_not_fit():
    groups = torch.tensor([[0, 0, 1, -1]])
    with pytest.raises(ValueError, match="asked has shape"):
        thinned_factors(groups, torch.zeros(1, 4, 3, dtype=torch.bool), torch.tensor([[-1, -1, -1, 0]]), -3.)


@pytest.mark.parametrize("thin", [.1, -math.inf, math.nan])
def test_thin_is_the_logarithm_of_a_count_below_one(thin):
    with pytest.raises(ValueError, match="thin is the logarithm"): WindowSimulation(thin=thin)
