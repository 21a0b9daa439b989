"""Every row of FAMILIES as a tiny random pair and a stock processor, made offline."""
import json
import string

import torch
import transformers as t
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from laid_nb.haystack import OBJECTS, Question

TURNS = ("{{% for m in messages %}}{open}{{{{ m['role'] }}}}{colon}{{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}"
         "{{% for p in m['content'] %}}{{% if p['type'] == 'image' %}}{image}{{% else %}}{{{{ p['text'] }}}}{{% endif %}}{{% endfor %}}"
         "{{% endif %}}{close}{{% endfor %}}{{% if add_generation_prompt %}}{open}assistant{colon}{{% endif %}}")


def chat(open="<|im_start|>", colon="\n", image="<image>", close="<|im_end|>\n", bos=""):
    "A chat template in which turns follow each other."
    return bos + TURNS.format(open=open, colon=colon, image=image, close=close)


def tokenizer(*specials, named=None, bos=None, eos="<|im_end|>", pad="<|endoftext|>"):
    "A byte-level BPE, trained in code on our questions, with the special tokens of a family."
    texts = [Question(n, n, kind, True, (0,)).text + " Yes No user assistant passage there is here\n" for n in OBJECTS for kind in ("single", "all", "any")]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+"), "isolated"),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    core.add_special_tokens(list(dict.fromkeys([pad, "<|im_start|>", eos, *([bos] if bos else []), *specials])))
    return t.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token=pad, bos_token=bos, model_max_length=32768, extra_special_tokens=named or {})


def metaspace(*specials, named=None, bos="<s>", eos="</s>", pad="<pad>"):
    "As SentencePiece makes them: a Unigram whose words begin with ▁, one put before the text, and bytes for what it does not know."
    texts = [Question(n, n, kind, True, (0,)).text + " Yes No user assistant passage there is here a cup tie" for n in OBJECTS for kind in ("single", "all", "any")]
    texts += list(string.ascii_letters + string.digits + ".,:?!|<>")  # no letter is unknown
    learnt = Tokenizer(models.Unigram())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    learnt.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False))
    pieces = json.loads(learnt.to_str())["model"]["vocab"] + [[f"<0x{byte:02X}>", -20.] for byte in range(256)]
    core = Tokenizer(models.Unigram([tuple(piece) for piece in pieces], unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)])
    core.add_special_tokens(list(dict.fromkeys([pad, bos, eos, *specials])))
    return t.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token=pad, bos_token=bos, unk_token="<unk>", model_max_length=32768,
                                     extra_special_tokens=named or {})


def text_config(name, words, **more):
    "Settings of the text model of a tiny student or teacher."
    layers, heads = {"student": (2, 4), "teacher": (3, 6)}[name]
    token = words.convert_tokens_to_ids
    return dict(hidden_size=8*heads, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2, head_dim=8,
                initializer_range=.3, max_position_embeddings=4096, vocab_size=len(words), tie_word_embeddings=False,
                bos_token_id=words.bos_token_id, eos_token_id=token(words.eos_token), pad_token_id=words.pad_token_id) | more


def plain(theta=1e4): return dict(rope_parameters={"rope_type": "default", "rope_theta": theta})
def sectioned(): return dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]})


WINDOWS = {"student": ["full_attention", "sliding_attention"], "teacher": ["sliding_attention", "full_attention", "sliding_attention"]}  # of Gemma 3: the last looks near
COHERE = {"student": ["sliding_attention", "full_attention"], "teacher": ["sliding_attention", "sliding_attention", "full_attention"]}  # the last has no RoPE
SIGLIP = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
CLIP = SIGLIP | dict(model_type="clip_vision_model", projection_dim=32)


def qwen_words(): return tokenizer("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
                                   named={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})


def qwen_tokens(words):
    token = words.convert_tokens_to_ids
    return dict(image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
                vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=False)


QWEN_CHAT = chat(image="<|vision_start|><|image_pad|><|vision_end|>")


def qwen2_vl():
    words = qwen_words()
    reads = t.Qwen2VLProcessor(t.Qwen2VLImageProcessor(), words, t.Qwen2VLVideoProcessor(), chat_template=QWEN_CHAT)
    def make(name):
        text = text_config(name, words, **sectioned())
        vision = dict(depth=1, embed_dim=32, hidden_size=text["hidden_size"], num_heads=1, mlp_ratio=2)
        return t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(text_config=text, vision_config=vision, **qwen_tokens(words)))
    return reads, make


def qwen2_5_vl():
    words = qwen_words()
    reads = t.Qwen2_5_VLProcessor(t.Qwen2VLImageProcessor(), words, t.Qwen2VLVideoProcessor(), chat_template=QWEN_CHAT)
    def make(name):
        text = text_config(name, words, **sectioned())
        vision = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=1, out_hidden_size=text["hidden_size"], fullatt_block_indexes=[0])
        return t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **qwen_tokens(words)))
    return reads, make


def qwen3_vl(moe=False):
    words = qwen_words()
    reads = t.Qwen3VLProcessor(t.Qwen2VLImageProcessor(patch_size=14), words, t.Qwen3VLVideoProcessor(), chat_template=QWEN_CHAT)
    def make(name):
        text = text_config(name, words, **sectioned()) | (dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16) if moe else {})
        vision = dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=text["hidden_size"], patch_size=14, deepstack_visual_indexes=[0],
                      num_position_embeddings=64)
        config, model = (t.Qwen3VLMoeConfig, t.Qwen3VLMoeForConditionalGeneration) if moe else (t.Qwen3VLConfig, t.Qwen3VLForConditionalGeneration)
        return model(config(text_config=text, vision_config=vision, **qwen_tokens(words)))
    return reads, make


def qwen3_vl_moe(): return qwen3_vl(moe=True)


def qwen3_5():
    words = qwen_words()
    reads = t.Qwen3VLProcessor(t.Qwen2VLImageProcessor(patch_size=14), words, t.Qwen3VLVideoProcessor(), chat_template=QWEN_CHAT)
    def make(name):
        kinds = ["linear_attention"]*{"student": 1, "teacher": 2}[name] + ["full_attention"]
        text = text_config(name, words, layer_types=kinds, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, **sectioned())
        vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=text["hidden_size"], patch_size=14, num_position_embeddings=64)
        return t.Qwen3_5ForConditionalGeneration(t.Qwen3_5Config(text_config=text, vision_config=vision, **qwen_tokens(words)))
    return reads, make


def glm4v():
    marks = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|video|>")
    words = tokenizer(*marks, named={"image_token": "<|image|>", "video_token": "<|video|>"})
    reads = t.Glm4vProcessor(t.Glm4vImageProcessor(size={"shortest_edge": 28*28, "longest_edge": 56*56*2}), words, t.Glm4vVideoProcessor(),
                             chat_template=chat(image="<|begin_of_image|><|image|><|end_of_image|>"))
    def make(name):
        token, text = words.convert_tokens_to_ids, text_config(name, words, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1],
                                                                                             "partial_rotary_factor": 1.})
        vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=text["hidden_size"], patch_size=14, image_size=56)
        return t.Glm4vForConditionalGeneration(t.Glm4vConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=False,
            image_token_id=token("<|image|>"), video_token_id=token("<|video|>"), image_start_token_id=token("<|begin_of_image|>"),
            image_end_token_id=token("<|end_of_image|>"), video_start_token_id=token("<|begin_of_video|>"), video_end_token_id=token("<|end_of_video|>")))
    return reads, make


def internvl():
    words = tokenizer("<img>", "</img>", "<IMG_CONTEXT>", "<video>", named=dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"))
    pictures = t.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=2)
    reads = t.InternVLProcessor(pictures, words, t.InternVLVideoProcessor(), image_seq_length=4, chat_template=chat(image="<IMG_CONTEXT>\n"))
    def make(name):
        vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[56, 56], patch_size=[14, 14])
        return t.InternVLForConditionalGeneration(t.InternVLConfig(
            text_config=text_config(name, words, model_type="qwen2", **plain()), vision_config=vision, image_seq_length=4,
            image_token_id=words.context_image_token_id))
    return reads, make


def llava(spm=False):
    words = metaspace("<image>", "<|im_end|>", eos="<|im_end|>", named={"image_token": "<image>"}) if spm else tokenizer("<image>", bos="<s>", named={"image_token": "<image>"})
    template = ("{% for m in messages %}{{ m['role'] | upper }}: {% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}"
                "{% endif %}{% endfor %}{% if m['role'] == 'user' %} {% else %}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}")
    pictures = t.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    reads = t.LlavaProcessor(pictures, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
                             chat_template=template)
    def make(name):
        return t.LlavaForConditionalGeneration(t.LlavaConfig(
            text_config=text_config(name, words, model_type="llama", **plain()), vision_config=CLIP, image_token_id=words.image_token_id, tie_word_embeddings=False))
    return reads, make


def llava_metaspace(): return llava(spm=True)


def llava_onevision():
    words = tokenizer("<image>", "<video>", named={"image_token": "<image>", "video_token": "<video>"})
    pictures = t.LlavaOnevisionImageProcessor(size={"height": 56, "width": 56}, image_grid_pinpoints=[[56, 56], [56, 112], [112, 56]])
    reads = t.LlavaOnevisionProcessor(pictures, words, t.LlavaOnevisionVideoProcessor(), num_image_tokens=16, vision_feature_select_strategy="full",
                                      chat_template=chat(image="<image>\n"))
    def make(name):
        return t.LlavaOnevisionForConditionalGeneration(t.LlavaOnevisionConfig(
            text_config=text_config(name, words, model_type="qwen2", **plain()), vision_config=SIGLIP | dict(vision_use_head=False), image_token_id=words.image_token_id,
            video_token_id=words.video_token_id, image_grid_pinpoints=pictures.image_grid_pinpoints, vision_feature_select_strategy="full",
            vision_feature_layer=-1, tie_word_embeddings=False))
    return reads, make


def llava_next():
    words = tokenizer("<image>", bos="<s>", named={"image_token": "<image>"})
    pictures = t.LlavaNextImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=[[56, 112], [112, 56]])
    reads = t.LlavaNextProcessor(pictures, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
                                 chat_template=chat(image="<image>\n", bos="{{ bos_token }}"))
    def make(name):
        return t.LlavaNextForConditionalGeneration(t.LlavaNextConfig(
            text_config=text_config(name, words, model_type="mistral", sliding_window=None, **plain()), vision_config=CLIP, image_token_id=words.image_token_id,
            image_grid_pinpoints=pictures.image_grid_pinpoints, tie_word_embeddings=False))
    return reads, make


def aya_vision():
    tiles = [f"TILE_{i}" for i in range(1, 5)]
    words = tokenizer("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL", *tiles, bos="<BOS_TOKEN>")
    pictures = t.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=2)
    reads = t.AyaVisionProcessor(pictures, words, patch_size=14, img_size=56, downsample_factor=2, chat_template=chat(image="<image>", bos="{{ bos_token }}"))
    def make(name):
        text = text_config(name, words, model_type="cohere2", sliding_window=24, layer_types=COHERE[name], **plain())
        return t.AyaVisionForConditionalGeneration(t.AyaVisionConfig(
            text_config=text, vision_config=SIGLIP | dict(vision_use_head=False), downsample_factor=2, image_token_id=reads.image_token_id, tie_word_embeddings=False))
    return reads, make


def gemma3():
    words = tokenizer("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", bos="<bos>", eos="<end_of_turn>", pad="<pad>", named=dict(
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"))
    pictures = t.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    reads = t.Gemma3Processor(pictures, words, image_seq_length=4,
                              chat_template=chat(open="<start_of_turn>", image="<start_of_image>", close="<end_of_turn>\n", bos="{{ bos_token }}"))
    def make(name):
        token = words.convert_tokens_to_ids
        text = text_config(name, words, layer_types=WINDOWS[name], sliding_window=24,
                           query_pre_attn_scalar=8)
        return t.Gemma3ForConditionalGeneration(t.Gemma3Config(
            text_config=text, vision_config=SIGLIP | dict(vision_use_head=False), mm_tokens_per_image=4, image_token_id=words.image_token_id, tie_word_embeddings=False,
            boi_token_index=token("<start_of_image>"), eoi_token_index=token("<end_of_image>")))
    return reads, make


def paligemma():
    words = tokenizer("<image>", bos="<bos>", eos="<eos>", pad="<pad>", named={"image_token": "<image>"})
    pictures = t.SiglipImageProcessor(size={"height": 56, "width": 56})
    pictures.image_seq_length = 16
    template = ("{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
                "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}")
    reads = t.PaliGemmaProcessor(pictures, words, chat_template=template)
    def make(name):
        text = text_config(name, words, model_type="gemma", **plain()) | dict(num_key_value_heads=1)
        return t.PaliGemmaForConditionalGeneration(t.PaliGemmaConfig(
            text_config=text, vision_config=SIGLIP | dict(vision_use_head=False, projection_dim=text["hidden_size"]), projection_dim=text["hidden_size"],
            image_token_id=words.image_token_id, tie_word_embeddings=False))
    return reads, make


def idefics3(smol=False, tiled=False):
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    words = tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *rows, bos="<|im_start|>")
    made = dict(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}, do_image_splitting=tiled)
    template = chat(colon=":", image="<image>", close="<end_of_utterance>\n")
    if smol: reads = t.SmolVLMProcessor(t.SmolVLMImageProcessor(**made), words, t.SmolVLMVideoProcessor(), image_seq_len=4, chat_template=template)
    else: reads = t.Idefics3Processor(t.Idefics3ImageProcessor(**made), words, image_seq_len=4, chat_template=template)
    config, model, kind = (t.SmolVLMConfig, t.SmolVLMForConditionalGeneration, "smolvlm_vision") if smol else (
        t.Idefics3Config, t.Idefics3ForConditionalGeneration, "idefics3_vision")
    def make(name):
        return model(config(text_config=text_config(name, words, model_type="llama", **plain()), vision_config=SIGLIP | dict(model_type=kind), scale_factor=2,
                            image_token_id=reads.image_token_id, tie_word_embeddings=False))
    return reads, make


def smolvlm(): return idefics3(smol=True)
def idefics3_tiled(): return idefics3(tiled=True)


def mistral3():
    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", bos="<s>", eos="</s>", pad="<pad>")
    template = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]{% for p in m['content'] %}{% if p['type'] == 'image' %}[IMG]"
                "{% else %}{{ p['text'] }}{% endif %}{% endfor %}[/INST]{% else %}{{ m['content'][0]['text'] }}</s>{% endif %}{% endfor %}")
    reads = t.PixtralProcessor(t.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14}), words, patch_size=14,
                               spatial_merge_size=2, chat_template=template)
    def make(name):
        vision = dict(model_type="pixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16, image_size=112, patch_size=14)
        return t.Mistral3ForConditionalGeneration(t.Mistral3Config(
            text_config=text_config(name, words, model_type="mistral", sliding_window=None, **plain()), vision_config=vision, spatial_merge_size=2,
            image_token_id=reads.image_token_id, tie_word_embeddings=False))
    return reads, make


def mllama():
    words = tokenizer("<|image|>", "<|python_tag|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|pad|>",
                      named={"image_token": "<|image|>"})
    reads = t.MllamaProcessor(t.MllamaImageProcessor(size={"height": 56, "width": 56}, max_image_tiles=2), words,
                              chat_template=chat(open="<|start_header_id|>", colon="<|end_header_id|>\n\n", image="<|image|>", close="<|eot_id|>", bos="{{ bos_token }}"))
    def make(name):
        text = text_config(name, words, cross_attention_layers=[1], **plain())
        text |= dict(num_hidden_layers=text["num_hidden_layers"] + 1, vocab_size=len(words))
        vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=2, image_size=56, patch_size=14, vision_output_dim=64,
                      max_num_tiles=2, intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]])
        return t.MllamaForConditionalGeneration(t.MllamaConfig(text_config=text, vision_config=vision, image_token_index=words.image_token_id))
    return reads, make


def language_model(model, config, bos=None, words=None, **settings):
    "A text model, with a tokenizer for a processor."
    words = words or tokenizer(bos=bos)
    words.chat_template = chat(bos="{{ bos_token }}" if bos else "")
    def make(name): return model(config(**text_config(name, words, **plain()) | {k: x[name] if isinstance(x, dict) else x for k, x in settings.items()}))
    return words, make


FAMILIES = {f.__name__: f for f in (qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, glm4v, internvl, llava, llava_metaspace, llava_next, llava_onevision, aya_vision, gemma3, paligemma, idefics3,
                                    idefics3_tiled, smolvlm, mistral3, mllama)} | {
    "llama": lambda: language_model(t.LlamaForCausalLM, t.LlamaConfig, bos="<s>"),
    "smollm2": lambda: language_model(t.LlamaForCausalLM, t.LlamaConfig, tie_word_embeddings=True),
    "qwen2": lambda: language_model(t.Qwen2ForCausalLM, t.Qwen2Config),
    "qwen3": lambda: language_model(t.Qwen3ForCausalLM, t.Qwen3Config),
    "llama_metaspace": lambda: language_model(t.LlamaForCausalLM, t.LlamaConfig, bos="<s>", words=metaspace("<|im_start|>", eos="<|im_end|>")),
    "mistral": lambda: language_model(t.MistralForCausalLM, t.MistralConfig, bos="<s>", sliding_window=24),
    "gemma3_text": lambda: language_model(t.Gemma3ForCausalLM, t.Gemma3TextConfig, bos="<bos>", sliding_window=24, query_pre_attn_scalar=8, rope_parameters=None,
                                          layer_types=WINDOWS),
}


# --- without a row of their own -----------------------------------------------
def idefics2():
    words = tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", bos="<s>")
    reads = t.Idefics2Processor(t.Idefics2ImageProcessor(size={"shortest_edge": 28, "longest_edge": 56}), words, image_seq_len=4,
                                chat_template=chat(colon=":", image="<image>", close="<end_of_utterance>\n", bos="{{ bos_token }}"))
    def make(name):
        text = text_config(name, words, model_type="mistral", sliding_window=None, **plain())
        looks = dict(hidden_size=text["hidden_size"], resampler_n_latents=4, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8, num_key_value_heads=1)
        vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
        return t.Idefics2ForConditionalGeneration(t.Idefics2Config(text_config=text, vision_config=vision, perceiver_config=looks, image_token_id=reads.image_token_id))
    return reads, make


def gemma4():
    words = tokenizer("<|image>", "<image|>", "<|image|>", "<|audio|>", "<|audio>", "<audio|>", "<|video|>", bos="<bos>", eos="<turn|>", pad="<pad>", named=dict(
        boi_token="<|image>", eoi_token="<image|>", image_token="<|image|>", audio_token="<|audio|>", boa_token="<|audio>", eoa_token="<audio|>"))
    reads = t.Gemma4Processor(t.Gemma4AudioFeatureExtractor(), t.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70), words, t.Gemma4VideoProcessor(patch_size=4),
                              chat_template=chat(image="<|image|>", bos="{{ bos_token }}"))
    def make(name):
        token, kinds = words.convert_tokens_to_ids, ["sliding_attention"]*{"student": 1, "teacher": 2}[name] + ["full_attention"]
        text = text_config(name, words, layer_types=kinds, sliding_window=24, vocab_size_per_layer_input=len(words), hidden_size_per_layer_input=8, global_head_dim=8)
        vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16, patch_size=4, position_embedding_size=256)
        return t.Gemma4ForConditionalGeneration(t.Gemma4Config(
            text_config=text, vision_config=vision, audio_config=None, image_token_id=reads.image_token_id, video_token_id=token("<|video|>"),
            boi_token_id=token("<|image>"), eoi_token_id=token("<image|>"), audio_token_id=token("<|audio|>"), tie_word_embeddings=True))
    return reads, make


def ovis2():
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    words = tokenizer("<image>", "<IMG_ATOM>", *marks)
    pictures = t.Ovis2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=2)
    reads = t.Ovis2Processor(pictures, words, chat_template=chat(image="<image>\n"), image_seq_length=16)
    def make(name):
        token, text = words.convert_tokens_to_ids, text_config(name, words, model_type="qwen2", **plain())
        vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14, vocab_size=40)
        return t.Ovis2ForConditionalGeneration(t.Ovis2Config(
            text_config=text, vision_config=vision, image_token_id=token("<IMG_ATOM>"), visual_indicator_token_ids=[token(m) for m in marks], vocab_size=len(words),
            hidden_size=text["hidden_size"], tie_word_embeddings=False))
    return reads, make


UNNAMED = {f.__name__: f for f in (idefics2, gemma4, ovis2)}


def build(family):
    "(processor, make): make(name) gives a tiny random student or teacher, the same weights for the same name."
    reads, make = (FAMILIES | UNNAMED)[family]()
    def seeded(name):
        torch.manual_seed(len(name))
        return make(name).eval()
    return reads, seeded


def checkpointing(model):
    "What turns activation checkpointing on: older versions of transformers know one name, newer ones the other."
    return getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
