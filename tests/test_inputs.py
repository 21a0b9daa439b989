"""What a model reads: tokens, batches, features, positions, prompts in parts, and families as rows."""
import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from laid_nb import inputs
from laid_nb.anchors import CHAT_TEMPLATE
from laid_nb.evaluate import ask
from laid_nb.haystack import Haystack, Question, Scene, picture_haystack
from laid_nb.inputs import (
    FAMILIES,
    HaystackCollator,
    SizeSampler,
    encode,
    family_of,
    image_features,
    image_inputs,
    messages,
    n_images,
    pad,
    precompute,
    precompute_prompts,
    prefix_inputs,
    prefix_length,
    prompt_inputs,
    question_ids,
    question_text,
    read_groups,
    read_positions,
)
from laid_nb.simulate import image_groups

STACK = picture_haystack(5, 5, 5, split="test")
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, initializer_range=.3, max_position_embeddings=4096, bos_token_id=None)


def text_of(processor, **more):
    tokenizer = processor.tokenizer
    return TEXT | dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
                       pad_token_id=tokenizer.pad_token_id) | more


@pytest.fixture(scope="module")
def llava(processor):
    "A model and a processor without a row, without M-RoPE, and without names for what delimits an image."
    vision = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                  num_attention_heads=2, image_size=56, patch_size=28, projection_dim=32)
    text = text_of(processor, model_type="llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=image))
    pictures = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    reads = LlavaProcessor(pictures, processor.tokenizer, patch_size=28, vision_feature_select_strategy="default",
                           chat_template=CHAT_TEMPLATE, image_token="<|image_pad|>", num_additional_image_tokens=1)
    return model.double().eval(), reads


@pytest.fixture(scope="module")
def internvl(processor):
    "A model whose processor, not the chat template, writes the tokens around an image."
    tokenizer = copy.deepcopy(processor.tokenizer)
    for name, token in dict(start_image_token="<|vision_start|>", end_image_token="<|vision_end|>",
                            context_image_token="<|image_pad|>", video_token="<|video_pad|>").items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    template = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>")
    pictures = GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=False)
    reads = InternVLProcessor(pictures, tokenizer, InternVLVideoProcessor(), image_seq_length=4, chat_template=template)
    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[56, 56],
                  patch_size=[14, 14])
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(InternVLConfig(
        text_config=text_of(processor, model_type="qwen2"), vision_config=vision, image_seq_length=4,
        image_token_id=tokenizer.context_image_token_id))
    return model.double().eval(), reads


def whole(processor, haystack, turn):
    "The tensors of one question's prompt, as the processor makes them from the conversation."
    return processor.apply_chat_template(messages(haystack, [turn], answers=False), tokenize=True, return_dict=True,
                                         return_tensors="pt", add_generation_prompt=True)


@torch.no_grad()
def asked_alone(model, processor, haystack):
    words = [processor.tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("Yes", "No")]
    return torch.stack([model(**whole(processor, haystack, t)).logits[0, -1].log_softmax(-1)[words]
                        for t in range(len(haystack.questions))])


# --- lightness ----------------------------------------------------------------
LOADED = """
import sys
def heavy(): print(*sorted({"transformers.trainer", "peft", "accelerate"} & set(sys.modules)), sep=",")
import laid_nb.inputs, laid_nb.recompose, laid_nb.accuracy, laid_nb.evaluate
heavy()
import transformers.modeling_utils
heavy()
import laid_nb.baselines, laid_nb.viewer, laid_nb.inspector, laid_nb.mixing_inspector
heavy()
"""

def test_reading_a_model_needs_no_trainer():
    "accelerate is loaded by transformers' own models, and by nothing of ours."
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["", "accelerate", "accelerate", ""]


# --- tokens and what they are -------------------------------------------------
@pytest.mark.parametrize("kind, turns, answers", [("single", [0], True), ("single", [0], False), ("single", [5, 2, 9, 2], True), ("single", [5, 2, 9], False), ("multi", [1, 0], True)])
def test_encode_is_the_processor_on_the_whole_conversation(processor, kind, turns, answers):
    h = picture_haystack(4, 6, kind=kind)
    ours = encode(processor, h, turns, answers)
    whole = processor.apply_chat_template(messages(h, turns, answers), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=not answers)
    for name in whole: assert ours[name].shape == whole[name].shape and (ours[name] == whole[name]).all(), name
    assert ours["needles"] == [list(h.questions[t].needles) for t in turns]


def test_labels_and_turns(processor):
    h, turns = picture_haystack(4, 6), [5, 2, 9, 2]
    out = encode(processor, h, turns)
    ids, labels, turn = (out[n][0] for n in ("input_ids", "labels", "turn"))
    say, image = processor.tokenizer.decode, processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    assert (labels[labels >= 0] == ids[labels >= 0]).all() and (turn.diff() >= 0).all() and set(turn.tolist()) == {-1, 0, 1, 2, 3}
    last = (ids == image).nonzero().max().item()
    assert (turn[:last + 1] == -1).all() and (turn[last + 1:] >= 0).all()
    for k, t in enumerate(turns):
        assert say(labels[(turn == k) & (labels >= 0)]) == h.questions[t].reply + "<|im_end|>"
        assert h.questions[t].text in say(ids[turn == k]) and h.questions[t].reply + "<|im_end|>" in say(ids[turn == k])
    waiting = encode(processor, h, turns, answers=False)
    n = (waiting["labels"] >= 0).sum().item()
    assert say(waiting["labels"][waiting["labels"] >= 0]) == "".join(h.questions[t].reply + "<|im_end|>" for t in turns[:-1]) and n == 6
    assert (encode(processor, h, [0], answers=False)["labels"] == -100).all()


def test_a_text_answer_is_labelled(processor):
    h = Haystack((Scene(("dog", "cup", "tie"), 1),), (Question("dog", "", "list", "a cup and a tie", (0,)),), "list")
    labels = encode(processor, h, [0])["labels"]
    assert processor.tokenizer.decode(labels[labels >= 0]) == "a cup and a tie<|im_end|>"


def test_a_template_that_rewrites_turns_is_refused(processor):
    class Rewriting:
        image_token, tokenizer, chat_template = processor.image_token, processor.tokenizer, processor.chat_template
        def __call__(self, *a, **k): return processor(*a, **k)
        def apply_chat_template(self, chat, **named): return f"{len(chat)} messages\n" + processor.apply_chat_template(chat, **named)
    with pytest.raises(ValueError, match="turn 0"): encode(Rewriting(), picture_haystack(0, 2), [0])


def test_no_such_question(processor):
    with pytest.raises(ValueError, match="empty"): messages(picture_haystack(0, 2), [])
    with pytest.raises(ValueError, match="no question 12"): messages(picture_haystack(0, 2), [0, 12])


# --- batches and features -----------------------------------------------------
def test_a_padded_batch_reads_as_its_samples_do(processor, haystacks, tiny):
    model, collate = tiny("student").double().eval(), HaystackCollator(processor)
    batch = collate(haystacks[:3])
    with torch.no_grad():
        together = model(**image_inputs(model, batch, "student"), position_ids=read_positions(model, batch)).logits
        for i, h in enumerate(haystacks[:3]):
            alone = collate([h])
            logits = model(**image_inputs(model, alone, "student")).logits[0]  # positions are the model's own here
            torch.testing.assert_close(together[i, :len(logits)], logits)


def test_collator_keeps_at_most_the_turns_asked_for(processor, haystacks):
    batch = HaystackCollator(processor, turns=2)(haystacks[:2])
    assert [len(n) for n in batch["needles"]] == [2, 2] and batch["turn"].max() == 1


def test_sampler_batches_equal_sizes_and_visits_each_once():
    sizes = [i % 5 for i in range(50)]
    for epoch in range(3):
        order = list(SizeSampler(sizes, 10, 1, lambda: epoch))
        assert sorted(order) == list(range(50)) and all(len({sizes[i] for i in order[b:b + 10]}) == 1 for b in range(0, 50, 10))


def test_sampler_has_another_order_in_another_epoch_and_with_another_seed():
    draw = lambda seed, epoch: tuple(SizeSampler([i % 5 for i in range(50)], 10, seed, lambda: epoch))
    assert draw(1, 0) == draw(1, 0) and len({draw(1, 0), draw(1, 1), draw(1, 2), draw(9, 0)}) == 4


def test_sampler_leaves_the_short_batch_for_the_end():
    order = list(SizeSampler([1]*6 + [2]*5, 3, 0, lambda: 0))
    assert sorted(order) == list(range(11)) and all(i >= 6 for i in order[-2:])


def test_features_of_another_model_are_refused(pool, tiny):
    wrong = {k: v for k, v in pool[0].items()} | {"student_features": pool[0]["teacher_features"]}
    with pytest.raises(ValueError, match="student_features have shape"): image_inputs(tiny("student"), wrong, "student")


def test_number_of_images_is_that_of_the_haystack(haystacks, pool):
    assert [n_images(h) for h in haystacks] == [n_images(s) for s in pool] == [2, 3, 4]*4


def test_precomputed_samples_and_prompts_have_the_features_of_the_pixels(processor, haystacks, pool, tiny):
    model, h = tiny("student"), haystacks[2]
    prompts = precompute_prompts(model, processor, haystacks[:3], progress=False)
    assert list(prompts) == ["tower", *(x.id for x in haystacks[:3])]
    expected = image_features(model, encode(processor, h, [0]))
    assert expected.shape == (4*4, 64)
    torch.testing.assert_close(pool[2]["student_features"], expected)
    torch.testing.assert_close(prompts[h.id]["features"], expected)
    assert not {"pixel_values"} & (pool[2].keys() | prompts[h.id].keys()) and "image_grid_thw" in prompts[h.id]


def test_a_pool_for_one_model_has_no_features_of_another(processor, haystacks, tiny):
    sample, = precompute(haystacks[:1], HaystackCollator(processor), tiny("student"), progress=False)
    assert "student_features" in sample and "teacher_features" not in sample


def test_deepstack_cannot_be_precomputed(processor):
    token = processor.tokenizer.convert_tokens_to_ids
    vision = dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=14,
                  deepstack_visual_indexes=[0], num_position_embeddings=64)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=text_of(processor, rope_parameters=rope), vision_config=vision,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>")))
    with pytest.raises(ValueError, match="feeds image features to several layers: they cannot be precomputed"):
        image_features(model, encode(processor, STACK, [0]))


def test_features_of_a_prompt_must_fit_the_model(processor, tiny):
    prompt = precompute_prompts(tiny("teacher"), processor, [STACK], progress=False)[STACK.id]
    with pytest.raises(ValueError, match=r"^features have shape \(20, 96\), the model needs \(20, 64\)"):
        image_inputs(tiny("student"), prompt)


def test_positions_without_a_mask(processor, tiny, llava):
    "A whole prompt has no padding, so the mask says nothing."
    for model, reads in ((tiny("student"), processor), llava):
        prompt = prompt_inputs(reads, STACK, 56)
        bare = {name: x for name, x in prompt.items() if name != "attention_mask"}
        assert torch.equal(read_positions(model, prompt), read_positions(model, bare))
    assert torch.equal(read_positions(model, bare), torch.arange(prompt["input_ids"].shape[1])[None])


# --- prompts in parts ---------------------------------------------------------
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_the_parts_of_a_prompt_are_the_whole(processor, tiny, llava, family):
    model, reads = llava if family == "llava" else (tiny("student"), processor)
    first = prompt_inputs(reads, STACK, 56)
    length, positions = prefix_length(first), read_positions(model, first)
    assert first["input_ids"][0, length - 1] == reads.image_token_id
    for turn in range(5):
        tail, full = question_ids(reads, STACK, turn), whole(reads, STACK, turn)
        assert first["input_ids"][0, :length].tolist() + tail == full["input_ids"][0].tolist()
        goes_on = positions[..., length:length + 1] + torch.arange(len(tail))
        assert torch.equal(torch.cat([positions[..., :length], goes_on], -1), read_positions(model, full))


def test_a_prompt_before_the_question(processor):
    text = question_text(processor, STACK, 1, "Look closely. ")
    assert "Look closely. " + STACK.questions[1].text in text and text.count(processor.image_token) == 5
    assert "Look closely" in processor.tokenizer.decode(question_ids(processor, STACK, 1, "Look closely. "))


def test_a_prefix_is_read_by_pixels_and_by_features(processor, tiny, llava):
    for model, reads in ((tiny("student").double(), processor), llava):
        first, known = prompt_inputs(reads, STACK, 56), precompute_prompts(model, reads, [STACK], progress=False)
        length = prefix_length(first)
        with torch.no_grad():
            plain = model(**whole(reads, STACK, 3)).logits[:, :length]
            for prompt in (first, known[STACK.id]):
                read = prefix_inputs(model, prompt, length)
                assert not {"attention_mask", "labels"} & read.keys()
                positions = read_positions(model, prompt)[..., :length]
                torch.testing.assert_close(model(**read, position_ids=positions).logits, plain)


def test_a_question_that_is_joined_with_the_images_shares_no_prefix(processor, monkeypatch):
    monkeypatch.setattr(inputs, "question_ids", lambda *_: [0, 1])
    with pytest.raises(ValueError, match="not told apart by its tokenizer: only whole prompts can be read"):
        prefix_length(prompt_inputs(processor, STACK, 56))


# --- families -----------------------------------------------------------------
def test_rows_name_what_the_processors_make(processor):
    other = Qwen2VLProcessor(processor.image_processor, processor.tokenizer, processor.video_processor,
                             chat_template=processor.chat_template)
    for name, reads in (("qwen2_5_vl", processor), ("qwen2_vl", other)):
        row = family_of(reads)
        assert row is FAMILIES[name]
        assert whole(reads, STACK, 0).keys() == {"input_ids", *row.tokens, *row.images, *row.samples}
        assert {*row.pixels, *row.features} <= {*row.images, *row.samples} and row.pixels


def test_families_of_models_and_processors(processor, tiny, llava):
    class Mine(type(processor)): pass
    assert family_of(tiny("student")) is family_of(processor) is FAMILIES["qwen2_5_vl"]
    assert family_of(Mine.__new__(Mine)) is FAMILIES["qwen2_5_vl"]
    assert family_of(llava[0]) is family_of(llava[1]) is FAMILIES["llava"]


def test_a_row_and_shapes_say_the_same(haystacks, processor):
    for sample in (encode(processor, h, [0, 1]) for h in haystacks[:3]):
        by_row, by_shape = (inputs.token_fields(sample, row) for row in (FAMILIES["qwen2_5_vl"], inputs.OTHER))
        assert set(by_row) == set(by_shape) and by_row[0] == by_shape[0] == "input_ids"


def test_a_field_that_no_row_names_is_refused(processor, monkeypatch):
    row = FAMILIES["qwen2_5_vl"]
    monkeypatch.setitem(FAMILIES, "qwen2_5_vl", replace(row, tokens=("attention_mask",)))
    for read in (lambda: encode(processor, STACK, [0]), lambda: prompt_inputs(processor, STACK, 56)):
        with pytest.raises(ValueError, match="Qwen2_5_VLProcessor makes mm_token_type_ids: its row in FAMILIES"): read()


def test_what_belongs_to_a_sample_is_stacked_and_filled_up():
    "Blocks of images as SmolVLM's processor makes them, beside tokens with more dimensions as Mllama's makes them."
    def sample(tokens, images):
        ones = torch.ones(1, tokens)
        return dict(input_ids=ones.long(), attention_mask=ones, cross_attention_mask=torch.ones(1, tokens, images, 4),
                    pixel_values=torch.ones(1, images, 3, 8, 8), needles=[[0]])
    batch = pad([sample(5, 2), sample(3, 4)], 9)
    assert batch["pixel_values"].shape == (2, 4, 3, 8, 8) and batch["pixel_values"][0, 2:].eq(0).all()
    assert batch["cross_attention_mask"].shape == (2, 5, 4, 4) and batch["cross_attention_mask"][1, 3:].eq(0).all()
    assert batch["input_ids"].tolist() == [[1]*5, [1]*3 + [9]*2] and batch["attention_mask"][1].tolist() == [1]*3 + [0]*2


def test_which_image_a_token_belongs_to_is_found(llava, internvl, tiny, processor):
    "Delimiters included, whoever writes them and whatever a config calls them."
    batch = HaystackCollator(processor)([STACK])
    c = tiny("student").config
    by_hand = image_groups(batch["input_ids"], c.image_token_id, c.vision_start_token_id, c.vision_end_token_id)
    assert torch.equal(read_groups(tiny("student"), batch), by_hand) and by_hand.max() == 4
    for model, reads in (llava, internvl):
        sample = encode(reads, STACK, [0])
        for i in range(5):
            own = sample["input_ids"][sample["image"] == i].tolist()
            assert reads.tokenizer.decode(own) == "<|vision_start|>" + "<|image_pad|>"*4 + "<|vision_end|>"


def test_a_family_without_a_row_is_exact_too(internvl):
    "The end of the last image, which this processor writes itself, is not dropped."
    model, reads = internvl
    alone = asked_alone(model, reads, STACK)
    assert (alone - alone[0]).abs().max() > 1e-3  # the questions matter, or nothing is shown
    known = precompute_prompts(model, reads, [STACK], progress=False)[STACK.id]
    for features in (None, known):
        torch.testing.assert_close(ask(model, reads, STACK, features=features)[0], alone, atol=1e-10, rtol=0)
    sample, prompt = encode(reads, STACK, [0, 1]), prompt_inputs(reads, STACK, 56)
    assert (sample["turn"] >= 0).int().argmax() == prefix_length(prompt)
    batch = HaystackCollator(reads)([STACK, picture_haystack(1, 2, 2)])
    assert batch["pixel_values"].shape == (7, 3, 56, 56) and batch["attention_mask"].shape == batch["turn"].shape


# --- what LLaVA's files have ---------------------------------------------------
@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("wording", ["What is new?", "First <image>, then <image>: what is new?"])
def test_a_system_turn_and_images_between_words_are_read_as_the_template_writes_them(processor, system, wording):
    "Against the processor on the whole conversation as one text."
    scenes = picture_haystack(3, 2).images
    asked = (Question("", "", "free", "A cup.", (), wording, ()), Question("", "", "free", "A dog.", (), "And before?", ()))
    h = Haystack(scenes, asked, "talk", system)
    made = encode(processor, h, [0, 1])
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    words = wording.replace("<image>", place) if "<image>" in wording else 2*place + wording
    chat = [("system", system)]*bool(system) + [("user", words), ("assistant", "A cup."), ("user", "And before?"), ("assistant", "A dog.")]
    text = processor.apply_chat_template([dict(role=role, content=[dict(type="text", text=said)]) for role, said in chat], tokenize=False)
    whole = processor(text=[text], images=[h.image(i, 56) for i in range(2)], return_tensors="pt")
    assert made["input_ids"].tolist() == whole["input_ids"].tolist()
    said = processor.tokenizer.decode(made["input_ids"][made["labels"] != -100])
    assert "A cup." in said and "A dog." in said and "new" not in said and "brief" not in said
    assert made["image"].unique().tolist() == [-1, 0, 1]


def test_as_many_places_as_images(processor):
    h = Haystack(picture_haystack(3, 2).images, (Question("", "", "free", "A cup.", (), "Only <image>?", ()),), "talk")
    with pytest.raises(ValueError, match="2 images and a question with 1 places"): encode(processor, h, [0])
