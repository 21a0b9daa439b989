"What the haystack viewer reads, against transformers' own eager attention; what it chooses, shows and refuses."
import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from laid_nb.evaluate import ask
from laid_nb.haystack import Question, picture_haystack
from laid_nb.page import embedded
from laid_nb.store import data_path
from laid_nb.viewer import (
    HaystackViewer,
    ImageAttention,
    _mosaic,
    look,
    plot_haystack,
    read_attention,
    telling_question,
)

MODELS = "teacher", "student", "distilled"

@pytest.fixture(scope="module")
def processor(): return AutoProcessor.from_pretrained(data_path("anchors", "student"))

@pytest.fixture(scope="module")
def model(): return AutoModelForImageTextToText.from_pretrained(data_path("anchors", "student")).eval()

@pytest.fixture(scope="module")
def haystack(): return picture_haystack(1, 5, 3, "val")

@pytest.fixture(scope="module")
def reading(model, processor, haystack): return read_attention(model, processor, haystack, "student")

def made(haystack, name="teacher", layers=2, heads=3, words=4, seed=0):
    "A reading of random numbers."
    n, rng = len(haystack.images), torch.Generator().manual_seed(seed)
    shares = torch.rand(len(haystack.questions), words, layers, heads, n + 1, generator=rng).softmax(-1)[..., :n]
    log_p = torch.tensor([[-.1, -3.]]*len(haystack.questions))
    texts = tuple((q.text, *"abcdefgh"[:words - 1]) for q in haystack.questions)
    right = torch.tensor([q.answer for q in haystack.questions])
    return ImageAttention(name, haystack.id, texts, shares, log_p, right)

@pytest.fixture(scope="module")
def stacks(): return [picture_haystack(0, 6, 3, "val"), picture_haystack(0, 9, 2, "val")]

@pytest.fixture
def viewer(stacks):
    models = (0, "teacher", 4), (1, "student", 2)
    return HaystackViewer(stacks, [made(h, name, layers, seed=seed) for h in stacks for seed, name, layers in models])

# ---- reading

@pytest.fixture(scope="module")
def eager(processor, haystack):
    "Attention and log-probabilities of whole prompts by transformers' eager attention, and the image of each token."
    path = data_path("anchors", "student")
    model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()
    start, end, patch = (getattr(model.config, f"{x}_token_id") for x in ("vision_start", "vision_end", "image"))
    images, out = [haystack.image(i) for i in range(len(haystack.images))], []
    for q in haystack.questions:
        content = [{"type": "image"}]*len(haystack.images) + [{"type": "text", "text": q.text}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=images, return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs, output_attentions=True)
        image, at = [], -1
        for token in inputs["input_ids"][0].tolist():
            at += token == start
            image.append(at if token in (start, end, patch) else -1)
        out.append((torch.stack(found.attentions)[:, 0], torch.tensor(image), found.logits[0, -1].log_softmax(-1)))
    return out

def test_attention_is_eager_attention_summed_over_each_image(reading, eager, haystack):
    for turn, (attention, image, _) in enumerate(eager):
        words = len(reading.words[turn])
        shares = [attention[:, :, -words:, image == i].sum(-1) for i in range(len(haystack.images))]
        expected = torch.stack(shares, -1).movedim(2, 0)  # [words, layers, heads, images]
        torch.testing.assert_close(reading.at(turn), expected, rtol=1e-4, atol=1e-5)

def test_answers_are_those_of_the_whole_prompt(reading, eager, processor):
    ids = [processor.tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("Yes", "No")]
    torch.testing.assert_close(reading.log_p, torch.stack([log_p[ids] for *_, log_p in eager]), rtol=1e-4, atol=1e-4)

def test_answers_are_those_of_ask(reading, model, processor, haystack):
    torch.testing.assert_close(reading.log_p, ask(model, processor, haystack)[0], rtol=1e-4, atol=1e-4)

def test_right_is_right(reading, haystack):
    expected = [bool(yes > no) == q.answer for (yes, no), q in zip(reading.log_p, haystack.questions)]
    assert reading.right.tolist() == expected

def test_words_are_the_question(reading, haystack):
    for q, words in zip(haystack.questions, reading.words): assert q.text in "".join(words)

def test_shorter_questions_have_zeros_in_front(reading):
    longest = reading.attention.shape[1]
    for turn, words in enumerate(reading.words):
        assert not reading.attention[turn, :longest - len(words)].any()
        assert reading.at(turn).sum((1, 2, 3)).min() > 0

def test_questions_without_a_known_answer_are_refused(model, processor, haystack):
    unknown = replace(haystack, questions=(Question("cat", "dog", "single", None, (0,)),))
    with pytest.raises(ValueError, match="has the answer None: the viewer shows yes/no questions"):
        read_attention(model, processor, unknown, "student")

def test_a_file_holds_it_all(reading, tmp_path):
    reading.save(tmp_path/"r.safetensors")
    again = ImageAttention.load(tmp_path/"r.safetensors")
    assert (again.name, again.haystack, again.words) == (reading.name, reading.haystack, reading.words)
    torch.testing.assert_close(again.attention, reading.attention, rtol=1e-3, atol=1e-6)
    assert torch.equal(again.log_p, reading.log_p) and torch.equal(again.right, reading.right)

def test_another_file_is_refused():
    with pytest.raises(ValueError, match="holds no ImageAttention"):
        ImageAttention.load(data_path("spectra", "pair.safetensors"))

@pytest.mark.parametrize("size, seed", [(20, 2), (50, 7)])
def test_shipped_files_are_of_their_haystacks(size, seed):
    h = picture_haystack(seed, size, 6, "val")
    files = [data_path("spectra", f"viewer-{name}-{size}.safetensors") for name in MODELS]
    HaystackViewer([h], [ImageAttention.load(file) for file in files])

def test_a_shipped_file_is_what_the_model_does(model, processor):
    shipped = ImageAttention.load(data_path("spectra", "viewer-student-20.safetensors"))
    again = read_attention(model, processor, picture_haystack(2, 20, 6, "val"), "student")
    torch.testing.assert_close(again.attention, shipped.attention, rtol=1e-2, atol=1e-3)
    assert torch.equal(again.right, shipped.right)

# ---- choosing

@pytest.mark.parametrize("eyes, expected", [
    (dict(token=1, layer=0, head=2), lambda x: x[1, 0, 2]),
    (dict(token="answer", layer="mean", head=1), lambda x: x[-1, :, 1].mean(0)),
    (dict(token=0, layer="mean", head="mean"), lambda x: x[0].mean((0, 1))),
    (dict(token=2, layer=1, head="mean"), lambda x: x[2, 1].mean(0))])
def test_look_takes_what_is_named(stacks, eyes, expected):
    r = made(stacks[0])
    torch.testing.assert_close(look(r, 1, (0,), **eyes)[0], expected(r.attention[1]))

@pytest.mark.parametrize("needles", [(2,), (0, 3)])
def test_the_best_gives_the_needle_most(stacks, needles):
    r = made(stacks[0])
    assert float(look(r, 0, needles)[0][list(needles)].sum()) == float(r.attention[0][..., list(needles)].sum(-1).max())

def test_the_best_of_the_means(stacks):
    r = made(stacks[0])
    assert float(look(r, 0, (1,), layer="mean")[0][1]) == pytest.approx(float(r.attention[0].mean(1)[..., 1].max()))

def test_look_says_what_it_chose(stacks):
    r = made(stacks[0])
    assert look(r, 0, (1,), 1, 1, 2)[1] == "at “a”, layer 1, head 2"
    assert look(r, 0, (1,), "answer", "mean", "mean")[1] == "at the answer, mean of all heads"

def test_look_at_a_layer_that_is_not_there(stacks):
    assert look(made(stacks[0]), 0, (0,), layer=3) == (None, "has no layer 3")

# ---- state

def test_it_opens_on_the_largest_haystack_where_models_differ(stacks):
    right = torch.tensor([True, False])
    readings = [made(stacks[0]), replace(made(stacks[1]), right=right), made(stacks[0], "student"),
                replace(made(stacks[1], "student"), right=~right | torch.tensor([True, False]))]
    viewer = HaystackViewer(stacks, readings)
    assert viewer.haystack == stacks[1].id and viewer.question == 1
    assert telling_question(readings[:1]) == 0

@pytest.mark.parametrize("name, value", [("question", 2), ("token", "answer"), ("token", 3), ("layer", "mean"), ("layer", 3), ("head", 1)])
def test_a_trait_is_state_of_the_page(viewer, name, value):
    viewer.show(haystack=viewer.view["haystacks"][0]["id"])
    setattr(viewer, name, value)
    assert viewer.state[name] == value and viewer.get_state()[name] == value

def test_another_haystack_keeps_what_it_has(viewer, stacks):
    viewer.show(haystack=stacks[0].id, question=2, layer=1)
    viewer.haystack = stacks[1].id
    assert {name: getattr(viewer, name) for name in viewer.choices} == dict(haystack=stacks[1].id, question=0, token="best", layer=1, head="best")

def test_show_changes_all_at_once(viewer, stacks):
    viewer.show(haystack=stacks[0].id, question=1, head="mean")
    assert (viewer.haystack, viewer.question, viewer.head) == (stacks[0].id, 1, "mean")

# ---- what goes to the page

def unpacked(one):
    kind = {"root": np.uint8, "f2": "<f2"}[one["type"]]
    raw = np.frombuffer(base64.b64decode(one["base64"]), kind).reshape(one["shape"])
    return (raw/255)**2 if one["type"] == "root" else raw

def test_the_page_gets_shares_and_sums(viewer):
    for shown in viewer.view["haystacks"]:
        haystack, readings = viewer.of(shown["id"])
        for i, question in enumerate(shown["questions"]):
            for reading, packed in zip(readings, question["readings"], strict=True):
                x = reading.at(i).numpy()
                np.testing.assert_allclose(unpacked(packed["look"]), x, atol=2.1/255)
                np.testing.assert_allclose(unpacked(packed["needle"]), x[..., list(haystack.questions[i].needles)].sum(-1), rtol=1e-3)
                np.testing.assert_allclose(unpacked(packed["total"]), x.sum(-1), rtol=1e-3)
                assert (packed["name"], packed["right"]) == (reading.name, bool(reading.right[i]))

def test_the_sheet_holds_every_picture(viewer, stacks):
    shown = viewer.view["haystacks"][1]
    sheet = Image.open(io.BytesIO(base64.b64decode(shown["sheet"])))
    assert sheet.size == (9*56, 56) and shown["names"][3] == ", ".join(stacks[1].images[3].objects)
    apart = np.abs(np.asarray(sheet, float)[:, 3*56:4*56] - np.asarray(stacks[1].image(3), float)).mean()
    assert apart < 12  # a JPEG of it

@pytest.mark.parametrize("state, message", [
    (dict(question=3), "question is 3, expected one of 0, 1, 2"), (dict(question=-1), "question is -1"),
    (dict(layer=4), "layer is 4, expected one of best, mean, 0, 1, 2, 3"), (dict(head="worst"), "head is 'worst'"),
    (dict(token=True), "token is True"), (dict(model=1), "no choice 'model': one of haystack"),
    (dict(haystack="x"), "haystack is 'x', expected one of val-single-6-0, val-single-9-0")])
def test_what_is_not_there_is_refused(viewer, state, message):
    viewer.show(haystack=viewer.view["haystacks"][0]["id"])
    before = viewer.state
    with pytest.raises(ValueError, match=message): viewer.show(**state)
    assert viewer.state == before

def test_a_trait_is_refused_alike(viewer):
    with pytest.raises(ValueError, match="layer is 9"): viewer.layer = 9
    assert viewer.layer == "best"

def other_words(haystack):
    "As another tokenizer would cut them."
    read = made(haystack, "other")
    return replace(read, words=tuple((first + "!", *rest) for first, *rest in read.words))

@pytest.mark.parametrize("readings, message", [
    (lambda s: [made(s[0])], "nobody read haystack 'val-single-9-0'"),
    (lambda s: [made(h) for h in s] + [made(s[0])], "have the same name: teacher, teacher"),
    (lambda s: [made(h) for h in s] + [replace(made(s[0]), haystack="y")], "read haystack 'y', which is not among"),
    (lambda s: [made(s[1]), replace(made(s[1]), haystack=s[0].id)], "read other images or questions"),
    (lambda s: [made(s[1]), made(s[0]), other_words(s[0])], "needs one tokenizer")])
def test_readings_must_fit(stacks, readings, message):
    with pytest.raises(ValueError, match=message): HaystackViewer(stacks, readings(stacks))

def test_haystacks_need_ids_of_their_own(stacks):
    with pytest.raises(ValueError, match="ids of their own"): HaystackViewer([stacks[0], stacks[0]], [made(stacks[0])])

# ---- picture

def texts(figure): return [t.get_text() for t in figure.texts]

def test_answers_stand_beside_the_names(stacks):
    no = torch.tensor([[-2., -.2]]*3)
    wrong = replace(made(stacks[0], "student"), log_p=no, right=torch.zeros(3, dtype=torch.bool))
    found = texts(plot_haystack(stacks[0], [made(stacks[0]), wrong]))
    assert "No (82%), wrong" in found and f"Yes (90%), {'right' if stacks[0].questions[0].answer else 'wrong'}" in found

def test_a_model_without_the_layer_says_so(viewer):
    viewer.show(haystack=viewer.view["haystacks"][0]["id"])
    viewer.layer = 3
    assert "has no layer 3" in texts(viewer.draw())
    assert "student says" in viewer.describe() and "has no layer 3" in viewer.describe()

def test_bars_are_roots_of_the_shares(stacks):
    figure = plot_haystack(stacks[0], [made(stacks[0])], 1, 0, 1, 2)
    bars = figure.axes[1].collections[0].get_segments()
    np.testing.assert_allclose([b[1][1]**2 for b in bars], made(stacks[0]).attention[1, 0, 1, 2].numpy(), rtol=1e-5)

def test_the_needle_is_framed(stacks):
    figure, needle = plot_haystack(stacks[0], [made(stacks[0])]), stacks[0].questions[0].needles[0]
    (frame,) = figure.axes[0].patches
    columns = round(figure.axes[0].images[0].get_array().shape[1]/62)
    assert (round(frame.get_y()/62), round(frame.get_x()/62)) == divmod(needle, columns)

def test_thumbnails_fade_with_attention(haystack):
    pictures = [haystack.image(i) for i in range(2)]
    page = _mosaic(pictures, [1., .25], 2)
    np.testing.assert_array_equal(page[3:59, 3:59], np.asarray(pictures[0]))
    np.testing.assert_allclose(255. - page[3:59, 65:121], (255. - np.asarray(pictures[1]))*(.25 + .75*.5), atol=.51)

@pytest.mark.parametrize("images", [1, 5, 20, 50, 100, 150])
def test_thumbnails_stay_legible(images):
    h = picture_haystack(0, images, 1, "val")
    for names in (["teacher"], ["teacher", "student", "distilled"]):
        figure = plot_haystack(h, [made(h, n) for n in names])
        page = figure.axes[0]
        columns = round(page.images[0].get_array().shape[1]/62)
        assert page.bbox.width/columns > 36 and figure.get_figwidth() <= 13 and columns*-(-images//columns) >= images

def test_html_and_words_stand_beside_the_live_view(viewer):
    bundle, _ = viewer._repr_mimebundle_()
    words = bundle["text/plain"]
    assert words.startswith("9 images, For the image with the ") and "teacher says" in words and "student says" in words
    state = json.loads(re.search(r'class="laid-data">(.*?)</script>', bundle["text/html"])[1])
    assert state == json.loads(embedded(viewer.state))

def test_saved_picture(viewer, tmp_path):
    viewer.save(tmp_path/"p.png")
    assert (tmp_path/"p.png").read_bytes()[:4] == b"\x89PNG"

def test_names_and_words_of_the_data_are_never_markup(stacks):
    bad = '</script><img src=x onerror="alert(1)">'
    questions = (replace(stacks[0].questions[0], anchor=bad),)
    haystack = replace(stacks[0], questions=questions)
    html = HaystackViewer([haystack], [made(haystack, bad)]).html()
    assert "<img src=x" not in html and html.count("</script>") == 2
