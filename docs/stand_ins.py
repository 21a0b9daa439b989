"""Stand-ins of published checkpoints and of Visual Haystacks, made offline: what docs/your_pair.md is tried on.

A stand-in has the files, names and config of the published checkpoint, its heads, width and vocabulary, a tokenizer
with the special tokens at their published ids, and random weights in few layers with narrow MLPs. The haystacks have
the names and folders of Visual Haystacks; their pictures are JPEGs of the sizes that COCO has."""
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, InternVLConfig, PreTrainedTokenizerFast

from laid_nb.haystack import OBJECTS, Question
from laid_nb.store import write_json
from laid_nb.vhs import VHS_PROMPT

ROOT = Path(__file__).resolve().parent.parent
LAYERS, BLOCKS, INNER = 2, 2, 512  # text layers, blocks of the vision tower, width of the MLPs of both
STAND_INS = [
    "Qwen2.5-VL-3B (16 heads of 128, 2 of keys, width 2048, vocabulary 151,936) and 7B (28 heads, 4 of keys, width "
    "3584, vocabulary 152,064), files and special tokens as published",
    "InternVL3-14B (40 heads, 8 of keys, width 5120, vocabulary 151,674) as a teacher of another family",
    f"all of them with random weights, {LAYERS} text layers and MLPs of width {INNER}, and {BLOCKS} blocks in the "
    "vision tower",
    "JPEGs of COCO's sizes with drawn objects, in the folders and files of Visual Haystacks"]
BYTES = 151643  # tokens of Qwen's vocabulary before the special ones
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
           "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]  # at 151643 and on, as published
CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}IMAGE"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")  # Qwen's


# --- checkpoints ----------------------------------------------------------------
def tokenizer(
    *special: str,  # tokens behind the others
    size: int = BYTES,  # tokens before the special ones
    **more,  # further arguments of the tokenizer
) -> PreTrainedTokenizerFast:
    "Byte-level BPE cut as Qwen's is, learnt from our questions; what it does not fill of the vocabulary is never used."
    texts = [VHS_PROMPT, "You are a helpful assistant. system user assistant Yes No"]
    texts += [Question(a, b, kind, True, (0,)).text for a in OBJECTS for b in OBJECTS[:9] for kind in ("single", "any")]
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    learnt.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learnt.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet,
                                                          show_progress=False))
    made = json.loads(learnt.to_str())
    words = made["model"]["vocab"]
    words |= {f"unused {n}": n for n in range(len(words), size)}
    core = Tokenizer.from_str(json.dumps(made))
    core.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=131072, **more)


def narrowed(config: dict) -> dict:
    "A published config with few layers and narrow MLPs."
    made = config | dict(num_hidden_layers=LAYERS, max_window_layers=LAYERS, intermediate_size=INNER)
    tower = dict(depth=BLOCKS, intermediate_size=INNER, fullatt_block_indexes=[BLOCKS - 1])
    return made | dict(vision_config=config["vision_config"] | tower)


def qwen_config(width: int, layers: int, heads: int, kv_heads: int, vocabulary: int, inner: int, tied: bool) -> dict:
    "config.json of Qwen2.5-VL as it is published: the text model's settings stand beside `vision_config`."
    tower = dict(depth=32, hidden_act="silu", hidden_size=1280, intermediate_size=3420, num_heads=16, in_chans=3,
                 out_hidden_size=width, patch_size=14, spatial_merge_size=2, spatial_patch_size=14, window_size=112,
                 fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2, temporal_patch_size=2)
    return dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], attention_dropout=0.0, bos_token_id=151643,
        eos_token_id=151645, vision_start_token_id=151652, vision_end_token_id=151653, vision_token_id=151654,
        image_token_id=151655, video_token_id=151656, hidden_act="silu", hidden_size=width, initializer_range=0.02,
        intermediate_size=inner, max_position_embeddings=128000, max_window_layers=layers, model_type="qwen2_5_vl",
        num_attention_heads=heads, num_hidden_layers=layers, num_key_value_heads=kv_heads, rms_norm_eps=1e-6,
        rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=tied, torch_dtype="bfloat16",
        transformers_version="4.41.2", use_cache=True, use_sliding_window=False, vision_config=tower,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]), vocab_size=vocabulary)


QWEN = {"Qwen2.5-VL-3B-Instruct": qwen_config(2048, 36, 16, 2, 151936, 11008, True),
        "Qwen2.5-VL-7B-Instruct": qwen_config(3584, 28, 28, 4, 152064, 18944, False)}
QWEN_PICTURES = dict(  # preprocessor_config.json
    min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2,
    image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
    image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor")
QWEN_WRITES = dict(  # generation_config.json
    bos_token_id=151643, pad_token_id=151643, do_sample=True, eos_token_id=[151645, 151643], repetition_penalty=1.05,
    temperature=0.000001, transformers_version="4.49.0")


def random_weights(
    config,  # of a transformers model
    folder: Path,
    seed: int,
) -> None:
    "A model of a config with random weights in bfloat16, as safetensors of at most 1 GB."
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1GB")


def make_qwen(
    name: str,  # of QWEN
    folder: Path,  # new
) -> None:
    "A stand-in of a Qwen2.5-VL."
    settings = narrowed(QWEN[name])
    write_json(folder/"config.json", settings)
    random_weights(AutoConfig.from_pretrained(folder), folder, len(settings))
    words = tokenizer(*SPECIAL, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    assert words.convert_tokens_to_ids("<|image_pad|>") == settings["image_token_id"]
    words.save_pretrained(folder)
    chat = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    written = dict(config=settings, generation_config=QWEN_WRITES, preprocessor_config=QWEN_PICTURES,
                   chat_template=dict(chat_template=chat))
    for file, content in written.items():
        write_json(folder/f"{file}.json", content)


def make_internvl(
    name: str,  # of the folder
    folder: Path,  # new
) -> None:
    "A stand-in of InternVL3-14B in the form of transformers: 40 heads of 128, 8 of keys, a vocabulary of its own."
    marks = ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    named = dict(start_image_token=marks[0], end_image_token=marks[1], context_image_token=marks[2],
                 video_token=marks[3])
    words = tokenizer(*SPECIAL, *marks, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named)
    text = dict(model_type="qwen2", hidden_size=5120, num_hidden_layers=LAYERS, num_attention_heads=40,
                num_key_value_heads=8, vocab_size=151674, intermediate_size=INNER, max_position_embeddings=32768,
                tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1e6),
                bos_token_id=151643, eos_token_id=151645)
    tower = dict(hidden_size=1024, num_hidden_layers=BLOCKS, num_attention_heads=16, intermediate_size=INNER,
                 image_size=[448, 448], patch_size=[14, 14])
    config = InternVLConfig(text_config=text, vision_config=tower, image_token_id=words.context_image_token_id,
                            tie_word_embeddings=False)
    random_weights(config, folder, 14)
    words.save_pretrained(folder)
    pictures = dict(image_processor_type="GotOcr2ImageProcessor", size=dict(height=448, width=448),
                    crop_to_patches=False, min_patches=1, max_patches=12, do_convert_rgb=True,
                    image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
                    processor_class="InternVLProcessor")
    write_json(folder/"preprocessor_config.json", pictures)
    write_json(folder/"processor_config.json", dict(processor_class="InternVLProcessor", image_seq_length=256))
    write_json(folder/"chat_template.json", dict(chat_template=CHAT.replace("IMAGE", "<IMG_CONTEXT>\n")))


# --- haystacks ------------------------------------------------------------------
SIZES = [(640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (640, 360)]  # width and height, as in COCO


def photograph(
    things: tuple[str, ...],  # of OBJECTS
    rng: random.Random,
) -> Image.Image:  # RGB
    "Things on a noisy ground, in one of COCO's sizes."
    width, height = rng.choice(SIZES)
    noise = np.random.default_rng(rng.randrange(2**31))
    ground = Image.fromarray(noise.integers(0, 256, (height//24, width//24, 3), dtype=np.uint8))
    made = ground.resize((width, height), Image.BICUBIC).filter(ImageFilter.GaussianBlur(2))
    for thing in things:
        side = rng.randrange(120, 240)
        with Image.open(drawing(thing)) as file:
            drawn = file.convert("RGBA").resize((side, side), Image.LANCZOS)
        made.paste(drawn, (rng.randrange(width - side), rng.randrange(height - side)), drawn)
    grain = np.asarray(made, dtype=np.float32) + noise.normal(0, 6, (height, width, 1))
    return Image.fromarray(grain.clip(0, 255).astype(np.uint8))


def drawing(thing: str) -> Path: return ROOT/"data"/"objects"/f"{thing.replace(' ', '_')}.png"


def make_haystacks(
    folder: Path,  # new: `dataset` of Visual Haystacks
    entries: dict[int, int],  # images of a haystack -> number of entries
    pictures: int = 96,  # JPEGs
    seed: int = 0,
) -> None:
    "VHs_qa/single_needle/VHs_large and coco/val2017, as Visual Haystacks has them."
    rng = random.Random(seed)
    things = [thing for thing in OBJECTS if drawing(thing).exists()]
    there = {f"coco/val2017/{rng.randrange(10**6):012d}.jpg": tuple(rng.sample(things, 2)) for _ in range(pictures)}
    (folder/"coco"/"val2017").mkdir(parents=True)
    for name, shown in there.items():
        photograph(shown, rng).save(folder/name, quality=90)
    for size, count in entries.items():
        made = [haystack_entry(there, size, number % 2 == 0, rng) for number in range(count)]
        file = folder/"VHs_qa"/"single_needle"/"VHs_large"/f"visual_haystack_{size}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, made)


def haystack_entry(
    there: dict[str, tuple],  # picture -> the two things on it
    size: int,  # images
    yes: bool,  # the answer
    rng: random.Random,
) -> dict:
    "An entry of a file of Visual Haystacks: one picture shows the first thing, and the second or not."
    needle = rng.choice(list(there))
    anchor, target = there[needle]
    if not yes:
        target = rng.choice([thing for shown in there.values() for thing in shown if thing not in there[needle]])
    others = rng.sample([name for name, shown in there.items() if anchor not in shown], size - 1)
    a, b = (f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}" for thing in (anchor, target))
    said = [{"from": "human", "value": f"For the image with {a}, is there {b}?"},
            {"from": "gpt", "value": "Yes" if yes else "No"}]
    return dict(conversations=said, pos_image=[needle], neg_image=others)


def make_all(
    work: Path,  # folder in which the commands run
) -> None:
    "All that the page names, under the names of the page; what is there stays."
    makers = {f"Qwen/{name}": make_qwen for name in QWEN} | {"OpenGVLab/InternVL3-14B-hf": make_internvl}
    for name, make in makers.items():
        if (work/name).exists(): continue
        part = work/"part"/name.rpartition("/")[2]
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make(part.name, part)
        (work/name).parent.mkdir(parents=True, exist_ok=True)
        part.rename(work/name)
    if not (work/"dataset").exists():
        shutil.rmtree(work/"part"/"dataset", ignore_errors=True)
        make_haystacks(work/"part"/"dataset", {10: 8, 50: 1})
        (work/"part"/"dataset").rename(work/"dataset")
