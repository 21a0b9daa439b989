"A student is asked as it was trained: the same tokens up to the first reply, in every family; and the prompt goes with it."
import json
from copy import deepcopy

import pytest
import torch

import families
from laid_nb.evaluate import evaluate
from laid_nb.haystack import passage_haystack, picture_haystack
from laid_nb.inputs import (
    PROMPT_FILE,
    HaystackCollator,
    encode,
    precompute,
    prompt_inputs,
    question_ids,
    question_text,
    read_prompt,
    save_prompt,
)
from laid_nb.store import tokenizer_of
from laid_nb.train import LaidConfig, LaidTrainer, quiet_training

PREAMBLE = "Answer in Yes or No. "
QWEN3 = """{%- set last = namespace(query=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.query = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > last.query %}<think>

</think>

{% endif %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{%- endif %}"""  # what Qwen3's template does about thoughts: an empty one before the last answer only


def stack(reads, questions=2):
    return passage_haystack(0, 3, questions) if tokenizer_of(reads) is reads else picture_haystack(0, 3, questions)


def thinking(processor):
    "The processor with a template that closes a thought where it is told to, and drops it from earlier turns."
    thinker = deepcopy(processor)
    thinker.chat_template = QWEN3
    return thinker


def begins(sample): return int(sample["replies"][0].nonzero()[0])  # where the first reply does


@pytest.mark.parametrize("prompt", ["", PREAMBLE])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_training_sample_begins_with_the_evaluated_prompt(name, prompt):
    if name == "smolvlm": pytest.importorskip("num2words", reason="the stock SmolVLMProcessor cannot be made without it")
    reads, _ = families.build(name)
    h = stack(reads)
    trained, asked = HaystackCollator(reads, prompt=prompt).encode(h), prompt_inputs(reads, h, 56, 0, prompt)
    start = begins(trained)
    assert trained["input_ids"][0, :start].tolist() == asked["input_ids"][0].tolist()
    text = tokenizer_of(reads).decode(trained["input_ids"][0])
    assert text.count(PREAMBLE.strip()) == 2*bool(prompt)  # before each question


def test_a_closed_thought_stands_before_every_reply_as_it_does_when_asked(processor):
    thinker, h = thinking(processor), picture_haystack(0, 3, 4)
    plain, trained = processor.tokenizer, encode(thinker, h, [0, 1, 2, 3], prompt=PREAMBLE)
    asked = prompt_inputs(thinker, h, 56, 0, PREAMBLE)["input_ids"][0].tolist()
    assert trained["input_ids"][0, :begins(trained)].tolist() == asked
    assert question_text(thinker, h, 0).endswith("<think>\n\n</think>\n\n")
    ids, turn, replies = (trained[name][0] for name in ("input_ids", "turn", "replies"))
    for t in range(1, 4):  # a later question is asked word for word as it is alone, behind the images
        alone = plain.decode(question_ids(thinker, h, t, PREAMBLE)).removeprefix("<|vision_end|>")
        assert plain.decode(ids[(turn == t) & ~replies]).rstrip("\n").endswith(alone.rstrip("\n"))
        assert plain.decode(ids[(turn == t) & replies]) == h.questions[t].reply + "<|im_end|>"


def test_the_prompt_goes_with_the_student(processor, haystacks, tiny, tmp_path):
    collate = HaystackCollator(processor, turns=1, prompt=PREAMBLE)
    args = LaidConfig(output_dir=str(tmp_path/"run"), method="sft", max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    trained = LaidTrainer(tiny("student"), args, haystacks[:2], processor, data_collator=collate)
    trained.save_student(tmp_path/"student")
    trained.save_model(tmp_path/"model")
    assert read_prompt(tmp_path/"student", processor) == read_prompt(tmp_path/"model", processor) == PREAMBLE
    again = type(trained.model).from_pretrained(tmp_path/"student")  # stock classes pass over the file
    assert type(processor).from_pretrained(tmp_path/"student").chat_template == processor.chat_template
    own, = evaluate(again, processor, [haystacks[0]], prompt=PREAMBLE, progress=False)[:1]
    assert own["mass"] > 0


def test_samples_of_another_prompt_are_refused(processor, haystacks, tiny):
    pool = precompute(haystacks[:2], HaystackCollator(processor, prompt=PREAMBLE), tiny("student"), progress=False)
    with pytest.raises(ValueError, match="sample 0 was encoded with the prompt 'Answer in Yes or No. '.*data_collator"):
        quiet_training(tiny("student"), processor, pool, method="sft", max_steps=1, use_cpu=True)


def test_a_kept_pool_of_another_prompt_is_refused(processor, haystacks, tiny, tmp_path):
    precompute(haystacks[:1], HaystackCollator(processor), tiny("student"), progress=False, folder=tmp_path/"kept")
    with pytest.raises(ValueError, match="prompt"):
        precompute(haystacks[:1], HaystackCollator(processor, prompt=PREAMBLE), tiny("student"), progress=False, folder=tmp_path/"kept")


@pytest.mark.parametrize("said, word", [("[]", "needs the field 'prompt'"), ('{"prompt": 3}', "needs the field 'prompt'"), ("{", "not JSON"),
                                        ('{"prompt": "", "template_options": {"enable_thinking": true}}', "was trained with the options")])
def test_a_broken_prompt_file_is_named(said, word, processor, tmp_path):
    (tmp_path/PROMPT_FILE).write_text(said)
    with pytest.raises(ValueError, match=f"{PROMPT_FILE}.*{word}"): read_prompt(tmp_path, processor)


def test_the_options_of_the_template_are_saved(processor, tmp_path):
    save_prompt(tmp_path, thinking(processor), PREAMBLE)
    assert json.loads((tmp_path/PROMPT_FILE).read_text()) == {"prompt": PREAMBLE, "template_options": {"enable_thinking": False}}
    assert read_prompt(tmp_path, thinking(processor)) == PREAMBLE
    with pytest.raises(ValueError, match="template"): read_prompt(tmp_path, processor)  # another template lies beside it now


def test_a_model_that_was_not_trained_here_says_nothing(processor, tmp_path):
    assert read_prompt(tmp_path, processor) is None and read_prompt("nobody/nothing", processor) is None


def test_recomposed_samples_have_the_prompt(processor, haystacks, tiny):
    from laid_nb.recompose import PieceEncoder
    collate = HaystackCollator(processor, turns=2, prompt=PREAMBLE)
    pool = precompute(haystacks[:4], collate, tiny("student"), progress=False)
    made = PieceEncoder(pool, collate)(haystacks[1])
    assert torch.equal(made["input_ids"], pool[1]["input_ids"]) and made["prompt"] == PREAMBLE
