"""Settings for all tests: CPU, offline, no window."""
import os
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores it


@pytest.fixture(autouse=True)
def seeded():
    "Every test starts from the same random state, whichever tests ran before it."
    if "torch" in sys.modules: sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def processor():
    "The stock Qwen2.5-VL processor of the embedded pair. Read only."
    from laid_nb.anchors import build_processor
    return build_processor()


@pytest.fixture(scope="session")
def haystacks():
    "Twelve haystacks of 2 to 4 drawn pictures and 3 questions."
    from laid_nb.haystack import picture_haystack
    return [picture_haystack(i, n_images=2 + i % 3, n_questions=3) for i in range(12)]


@pytest.fixture(scope="session")
def tiny(processor):
    "tiny(name): a random model of a few heads; the same weights for the same name."
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
    )

    from laid_nb.anchors import anchor_config
    def make(name, family=Qwen2_5_VLForConditionalGeneration, head_dim=32, theta=1e6, **top):
        layers, heads = {"student": (2, 2), "teacher": (3, 3)}[name]
        config = anchor_config(name, processor.tokenizer).to_dict() | top
        config["text_config"] |= dict(hidden_size=head_dim*heads, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=1, layer_types=None)
        config["text_config"]["rope_parameters"] = dict(rope_type="default", rope_theta=theta, mrope_section=[head_dim//8, head_dim//8, head_dim//4])
        config["vision_config"] |= dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=1, out_hidden_size=head_dim*heads, fullatt_block_indexes=[0])
        if family is Qwen2VLForConditionalGeneration:
            vision = dict(depth=1, embed_dim=32, hidden_size=head_dim*heads, num_heads=1, mlp_ratio=2)
            config = Qwen2VLConfig(**{k: v for k, v in config.items() if k not in ("model_type", "vision_config", "text_config")}, vision_config=vision,
                                   text_config={k: v for k, v in config["text_config"].items() if k != "model_type"})
        else: config = Qwen2_5_VLConfig(**config)
        torch.manual_seed(len(name))
        return family(config)
    return make


@pytest.fixture(scope="session")
def pool(processor, haystacks, tiny):
    "The haystacks, encoded with the features of a tiny student and a tiny teacher. Read only."
    from laid_nb.inputs import HaystackCollator, precompute
    return precompute(haystacks, HaystackCollator(processor), tiny("student"), tiny("teacher"), progress=False)

