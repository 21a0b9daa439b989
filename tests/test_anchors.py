"The embedded pair: loads without laid_nb, keeps the family's structure, and can do what it was trained for."
import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from laid_nb import anchors
from laid_nb.accuracy import by_size
from laid_nb.anchors import (
    _TRAINING,
    SIZES,
    Conversations,
    Namer,
    anchor_config,
    build_processor,
    looking_loss,
    make_varied,
    naming_loss,
    patchify,
    take_varied,
)
from laid_nb.evaluate import evaluate
from laid_nb.haystack import ART, BACKGROUNDS, OBJECTS, Scene, picture_haystack
from laid_nb.inputs import encode
from laid_nb.rope import rope_spec, shared_rope
from laid_nb.store import data_path
from refusals import refused


@pytest.fixture(scope="module")
def pair():
    folders = {name: data_path("anchors", name) for name in ("teacher", "student")}
    return {name: AutoModelForImageTextToText.from_pretrained(folder).eval() for name, folder in folders.items()}


@pytest.fixture(scope="module")
def processor(): return AutoProcessor.from_pretrained(data_path("anchors", "student"))


def test_stock_classes(pair, processor):
    assert all(type(m) is Qwen2_5_VLForConditionalGeneration for m in pair.values())
    assert type(processor) is Qwen2_5_VLProcessor


def test_structure_of_the_family(pair):
    teacher, student = (pair[n].config.text_config for n in ("teacher", "student"))
    for c in (teacher, student):
        assert c.num_attention_heads > c.num_key_value_heads and len(c.rope_parameters["mrope_section"]) == 3
    assert teacher.hidden_size//teacher.num_attention_heads == student.hidden_size//student.num_attention_heads
    assert teacher.num_hidden_layers > student.num_hidden_layers
    assert teacher.num_attention_heads > student.num_attention_heads
    vision = pair["student"].config.vision_config
    assert 0 < len(vision.fullatt_block_indexes) < vision.depth


def test_shipped_tokenizer_is_the_one_built(processor):
    built = build_processor().tokenizer
    assert built.get_vocab() == processor.tokenizer.get_vocab()


def test_both_read_two_images(pair, processor):
    haystacks = [picture_haystack(s, 2, 2, "val") for s in range(24)]
    for model in pair.values():
        assert by_size(evaluate(model, processor, haystacks, progress=False)).accuracy[0] > .85


def test_teacher_sees_further(pair, processor):
    haystacks = [picture_haystack(s, 150, 12, "val") for s in range(4)]
    right = {n: by_size(evaluate(m, processor, haystacks, progress=False)).correct[0] for n, m in pair.items()}
    assert right["teacher"] >= right["student"] + 6 and right["teacher"] > .75*48


def test_conversation_is_what_the_stock_processor_makes(processor):
    row = Conversations(processor.tokenizer).row(np.random.default_rng([9, 6, 0, 0]), 6, 5, 0., False)
    stock = encode(processor, picture_haystack(9, 6, 5), range(5))
    assert row[0] == stock["input_ids"][0].tolist() and row[1] == stock["labels"][0].tolist()


def test_gaps_stay_in_range(processor):
    conversations = Conversations(processor.tokenizer, max_position=400)
    for seed in range(20):
        *_, positions, _, _ = conversations.batch(np.random.default_rng(seed), 5, 2, n_questions=3)
        assert positions.max() < 400 and (positions[0].diff(dim=1) >= 0).all()


def test_without_room_there_are_no_gaps(processor):
    longest = {room: 0 for room in (0, 400)}
    for room in longest:
        conversations = Conversations(processor.tokenizer, max_position=room)
        for seed in range(5):
            *_, positions, _, _ = conversations.batch(np.random.default_rng(seed), 5, 2, n_questions=3)
            longest[room] = max(longest[room], int(positions[0].diff(dim=1).max()))
    assert longest[0] == 2 < longest[400]  # from the last row of an image to its end


def test_patchify_is_the_image_processor(processor):
    haystack = picture_haystack(0, 3)
    images = [haystack.image(i) for i in range(3)]
    stock = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    arrays, settings = np.stack([np.asarray(i) for i in images]), processor.image_processor
    ours = patchify(arrays, settings.image_mean, settings.image_std)
    torch.testing.assert_close(ours, stock, atol=1e-6, rtol=0)


def test_naming_loss_gradient():
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1., 0, 0, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: naming_loss(x, target), logits)


def test_looking_loss_gradient():
    class Fake(dict): scaling = {0: .5}
    def loss(q, k):
        cache = Fake({("q", 0): q, ("k", 0): k})
        return looking_loss(cache, (0,), torch.tensor([0, 1]), torch.tensor([4, 5]), torch.tensor([1, 2]), 2)
    q, k = (torch.randn(2, h, 6, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    assert torch.autograd.gradcheck(loss, (q, k))


def test_codes_are_orthogonal(processor):
    namer = Namer({n: anchor_config(n, processor.tokenizer) for n in ("teacher", "student")})
    for name in ("teacher", "student"):
        gram = namer.codes(name) @ namer.codes(name).T
        torch.testing.assert_close(gram, torch.eye(len(OBJECTS) + 1)*gram[0, 0], atol=1e-3, rtol=0)


def test_small_is_smaller_and_sees_as_the_student_does(pair):
    small = AutoModelForImageTextToText.from_pretrained(data_path("anchors", "small"))
    text = small.config.text_config
    assert {k: getattr(text, k) for k in SIZES["small"]} == SIZES["small"]
    theirs, here = pair["student"].state_dict(), small.state_dict()
    assert all(torch.equal(here[k], theirs[k]) for k in here if "visual." in k)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in pair["student"].parameters())


@pytest.mark.parametrize("name", SIZES)
def test_sections_fill_the_heads(name, processor):
    config = anchor_config(name, processor.tokenizer)
    spec = rope_spec(config)
    sections = config.text_config.rope_parameters["mrope_section"]
    assert sum(sections) == spec.head_dim//2 == len(spec.inv_freq)
    assert [s*8 for s in sections] == [spec.head_dim//2*part for part in (2, 3, 3)]  # the real models' 16, 24, 24
    assert spec.axis.bincount().tolist() == sections


def test_foreign_alone_has_other_heads(processor):
    specs = {name: rope_spec(anchor_config(name, processor.tokenizer)) for name in SIZES}
    own = specs.pop("foreign")
    assert all(shared_rope(spec, specs["student"]) for spec in specs.values())
    assert not shared_rope(own, specs["student"]) and own.head_dim == 2*specs["student"].head_dim
    torch.testing.assert_close(own.inv_freq, 1e4**(-torch.arange(64)/64))


def test_three_sizes_and_foreign_are_one_recipe(processor):
    assert all(_TRAINING[name] == _TRAINING["teacher"] for name in ("medium", "small", "foreign"))
    texts = {name: anchor_config(name, processor.tokenizer).text_config for name in SIZES}
    assert texts["medium"].to_dict() == texts["student"].to_dict()
    own = texts["foreign"].to_dict() | {k: texts["student"].to_dict()[k] for k in ("num_attention_heads", "rope_parameters")}
    assert own == texts["student"].to_dict()


def test_near_is_a_student_of_another_training(pair):
    near = AutoModelForImageTextToText.from_pretrained(data_path("anchors", "near"))
    theirs, here = pair["student"].state_dict(), near.state_dict()
    assert {k: v.shape for k, v in here.items()} == {k: v.shape for k, v in theirs.items()}
    same = {k for k in here if torch.equal(here[k], theirs[k])}
    assert {k for k in here if "visual." in k} <= same and not any("proj.weight" in k for k in same if "visual." not in k)


# other drawings

def test_a_varied_tower_reads_art_that_the_shipped_one_does_not(pair, processor):
    for name, model in pair.items():
        varied = take_varied(copy.deepcopy(model))
        same = {k: torch.equal(v, varied.state_dict()[k]) for k, v in model.state_dict().items()}
        assert all(kept != (".visual." in k) or "inv_freq" in k for k, kept in same.items())
        haystacks = [picture_haystack(s, 2, 2, "val", art="twemoji", background="plain") for s in range(24)]
        right = [by_size(evaluate(m, processor, haystacks, progress=False)).correct[0] for m in (model, varied)]
        assert right[1] >= right[0] + 8, name


def test_a_varied_tower_fits_embedded_models_alone(pair, tmp_path):
    config = copy.deepcopy(pair["student"].config)
    config.vision_config.depth = 1
    with refused(ValueError, "model.visual"): take_varied(Qwen2_5_VLForConditionalGeneration(config))
    with refused(ValueError, "Linear", "model.visual"): take_varied(torch.nn.Linear(1, 1))


def test_what_is_held_out_is_never_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(anchors, "render", lambda scene: drawn.append(scene) or np.zeros((56, 56, 3), np.uint8))
    rng = np.random.default_rng(0)
    for _ in range(400): anchors._varied_picture(rng, (3, 14))
    assert {s.art for s in drawn} == set(ART[:-1]) and {s.background for s in drawn} == set(BACKGROUNDS[:-1])
    assert {s.split for s in drawn} == {"train"}
    usual = sum(s == Scene(s.objects, s.seed) for s in drawn)
    assert .25 < usual/400 < .40  # a quarter, and one of sixteen of the others


def test_towers_go_on_learning_where_they_were_stopped(tmp_path, monkeypatch):
    labels, how = anchors._content_labels(), dict(steps=(1, 1), batch=4)
    monkeypatch.setattr(anchors, "_content_labels", lambda: labels)
    monkeypatch.setattr(anchors, "_solve_mergers", lambda namer, batches: None)  # has its test in the notebook
    whole = make_varied(tmp_path/"whole", tmp_path/"a", **how)
    make_varied(tmp_path/"parts", tmp_path/"b", **how | dict(steps=(1,)))
    assert sorted(p.name for p in (tmp_path/"parts").glob("varied-*")) == ["varied-0.safetensors"]
    assert make_varied(tmp_path/"parts", tmp_path/"b", **how).read_bytes() == whole.read_bytes()
