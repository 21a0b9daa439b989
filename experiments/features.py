"""Haystacks of pictures as a language model reads them: pictures embedded once and kept in WORK/features, read by
position."""
import functools

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicCache

import common
from laid_nb.anchors import patchify
from laid_nb.evaluate import PrefixCache
from laid_nb.haystack import haystack_fingerprint, render
from laid_nb.store import prepare_process, tower_fingerprint


def load_all(named):
    """The embedded pair, and students given as `name=folder`, or as a row of reproduce.json -> name -> (model,
    processor)."""
    prepare_process()
    parts = [(name, folder or name) for name, _, folder in (n.partition("=") for n in ("student", "teacher", *named))]
    return {name: common.load(folder) for name, folder in parts}

DISTILLED = ("SFT + window simulation", "LAid+ + window simulation + recomposed pictures")  # rows of reproduce.json


@functools.lru_cache(32)
def _pictures(haystack):
    "[images, 56, 56, 3] uint8, drawn once for all models."
    return np.stack([np.asarray(render(scene)) for scene in haystack.images])


@torch.no_grad()
def embed(model, processor, haystack):
    """Merged tokens of a haystack of scenes, [images, 4, hidden] float32; drawn and embedded once, then read from disk;
    students distilled with a frozen tower share them."""
    path = common.WORK/"features"/f"{haystack_fingerprint(haystack)}-{tower_fingerprint(model)}.safetensors"
    if not path.exists():
        image, parts = processor.image_processor, []
        for part in np.array_split(_pictures(haystack), -(-len(haystack.images)//50)):
            patches = patchify(part, image.image_mean, image.image_std)
            seen = model.model.get_image_features(patches, torch.tensor([[1, 4, 4]]*len(part))).pooler_output
            parts.append(torch.cat(list(seen)).view(len(part), 4, -1))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.cat(parts).half()}, path)
    return load_file(path)["x"].float()


def _pieces(processor):
    "Ids before the first image, and of one image."
    chat = [{"role": "user", "content": [{"type": "image"}]}]
    opening, _ = processor.apply_chat_template(chat, tokenize=False).split("<|vision_start|>")
    image = "<|vision_start|>" + "<|image_pad|>"*4 + "<|vision_end|>"
    return [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (opening, image)]


def positions(start, images):
    """M-RoPE positions [3, start + 6*images + 1] of a prompt up to the first token after its images, as
    `get_rope_index` counts them: an image of 2 x 2 merged tokens takes 4."""
    block = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])
    placed = (start + 4*torch.arange(images)[None, :, None] + block[:, None]).flatten(1)
    return torch.cat([torch.arange(start).expand(3, -1), placed, torch.full((3, 1), start + 4*images)], 1)


@torch.no_grad()
def read(model, processor, features):
    """Read the images of some prompts, features [batch, images, 4, hidden] -> what a question continues from. Image i
    is tokens start + 6*i to start + 6*i + 5, its first and last being delimiters."""
    opening, image = _pieces(processor)
    batch, n = features.shape[:2]
    ids = torch.tensor(opening + image*n)
    embeds = model.get_input_embeddings()(ids).expand(batch, -1, -1).clone()
    embeds[:, ids == processor.image_token_id] = features.flatten(1, 2)
    place, cache = positions(len(opening), n)[:, None].expand(-1, batch, -1), DynamicCache()
    model.model.language_model(inputs_embeds=embeds, position_ids=place[..., :-1], past_key_values=cache,
                               use_cache=True)
    return PrefixCache(cache, place[:, :1, -1:], len(ids))


def tails(processor, haystack):
    "Token ids of each question, from the images on."
    texts = [f"{q.text}<|im_end|>\n<|im_start|>assistant\n" for q in haystack.questions]
    return [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
