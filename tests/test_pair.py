"""Whether two processors read the same: every field that can differ is found and named."""
import copy
import json

import pytest
from tokenizers import Tokenizer
from transformers import CLIPImageProcessor, LlavaProcessor

from laid_nb.anchors import CHAT_TEMPLATE, build_processor
from laid_nb.pair import check_same_reading


@pytest.fixture(scope="module")
def qwen(): return build_processor()


@pytest.fixture(scope="module")
def llava(qwen):
    pictures = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return LlavaProcessor(pictures, qwen.tokenizer, patch_size=28, vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
                          image_token="<|image_pad|>", num_additional_image_tokens=1)


def changed(processor, **settings):
    "A copy whose image processor is set otherwise."
    other = copy.deepcopy(processor)
    for name, value in settings.items():
        assert getattr(other.image_processor, name) != value
        setattr(other.image_processor, name, value)
    return other


COMMON = [dict(image_mean=[.5]*3), dict(image_std=[.5]*3), dict(rescale_factor=1/128), dict(do_convert_rgb=False), dict(do_normalize=False), dict(do_rescale=False), dict(resample=0)]
QWEN = [dict(size={"shortest_edge": 56*56, "longest_edge": 28*28*4}), dict(size={"shortest_edge": 112*112, "longest_edge": 1003520}), dict(patch_size=16), dict(merge_size=1), dict(temporal_patch_size=1)]
LLAVA = [dict(size={"shortest_edge": 84}), dict(crop_size={"height": 84, "width": 84}), dict(do_center_crop=False)]


def told(student, teacher):
    with pytest.raises(ValueError, match="student and teacher do not read the same") as e: check_same_reading(student, teacher)
    return str(e.value)


@pytest.mark.parametrize("settings", COMMON + QWEN, ids=str)
def test_a_setting_of_images_that_differs_is_named(qwen, settings):
    words = told(qwen, changed(qwen, **settings))
    assert f"image_processor.{next(iter(settings))} is" in words and "of a " in words  # the setting, and what it does to a picture


@pytest.mark.parametrize("settings", COMMON + LLAVA, ids=str)
def test_likewise_in_a_family_of_one_size(llava, settings): assert f"image_processor.{next(iter(settings))} is" in told(llava, changed(llava, **settings))


def test_a_limit_that_no_small_picture_meets(qwen):
    other = changed(qwen, size={"shortest_edge": 56*56, "longest_edge": 12845056})
    assert "image_processor.size is" in told(qwen, other) and "of a " not in told(qwen, other)


def test_what_a_processor_itself_counts_with(llava):
    other = copy.deepcopy(llava)
    other.patch_size = 14
    assert "patch_size is 28 for the student, 14 for the teacher" in told(llava, other) and "input_ids of a small picture" in told(llava, other)


@pytest.mark.parametrize("old, new", [("helpful", "able"), ("<|im_start|>assistant", "<|im_start|>model"), ("<|vision_end|>", "<|vision_end|>\n")])
def test_templates(qwen, old, new):
    other = copy.deepcopy(qwen)
    other.chat_template = qwen.chat_template.replace(old, new)
    assert other.chat_template != qwen.chat_template and "chat template" in told(qwen, other)


def test_one_without_a_template(qwen):
    other = copy.deepcopy(qwen)
    other.chat_template = None
    assert "chat template" in told(qwen, other)


def test_merges_that_no_short_text_meets(qwen):
    whole, other = json.loads(qwen.tokenizer.backend_tokenizer.to_str()), copy.deepcopy(qwen)
    whole["model"]["merges"] = whole["model"]["merges"][:-1]
    other.tokenizer = type(qwen.tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(whole)), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    assert "tokenizer.merges is" in told(qwen, other)


def test_another_family(qwen, llava): assert "image_grid_thw" in told(qwen, llava) or "patch_size" in told(qwen, llava)


def test_copies_read_the_same(qwen, llava, tmp_path):
    for processor in (qwen, llava):
        check_same_reading(processor, processor)
        check_same_reading(processor, copy.deepcopy(processor))
        processor.save_pretrained(tmp_path)
        check_same_reading(processor, type(processor).from_pretrained(tmp_path))  # lists for tuples, defaults written out
        check_same_reading(processor.tokenizer, copy.deepcopy(processor.tokenizer))  # a pair of models of text alone
