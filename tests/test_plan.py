"What a run needs, planned without numbers: against what PyTorch's allocator reports, and at the published shapes."
import copy
import gc
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2VLImageProcessor, Qwen3VLConfig

from laid_nb.anchors import anchor_config, build_processor
from laid_nb.cli import main
from laid_nb.haystack import picture_haystack
from laid_nb.inputs import HaystackCollator
from laid_nb.limits import limit_pixels, size_of_images
from laid_nb.mixing import layer_pairs, mixings
from laid_nb.plan import CARDS, Cards, LiveBytes, Sample, advise, limit_sample, plan_training, sample_tokens
from laid_nb.rope import rope_layers, rope_spec
from laid_nb.train import LaidConfig, LaidTrainer

VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, fullatt_block_indexes=[7, 15, 23, 31])
ROPE = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])


def qwen(width, layers, heads, kv_heads, vocabulary, inner, tied=False):
    text = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                vocab_size=vocabulary, intermediate_size=inner, rope_parameters=ROPE, tie_word_embeddings=tied)
    return Qwen2_5_VLConfig(text_config=text, vision_config=VISION | dict(out_hidden_size=width), tie_word_embeddings=tied)


def qwen3(width, layers, heads, inner, tower, deep):
    text = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
                head_dim=128, vocab_size=151936, intermediate_size=inner)
    vision = dict(out_hidden_size=width, depth=tower, deepstack_visual_indexes=deep)
    return Qwen3VLConfig(text_config=text, vision_config=vision)


PAIRS = {
    "3B<-7B": (qwen(2048, 36, 16, 2, 151936, 11008, True), qwen(3584, 28, 28, 4, 152064, 18944)),
    "3B<-32B": (qwen(2048, 36, 16, 2, 151936, 11008, True), qwen(5120, 64, 40, 8, 152064, 27648)),
    "7B<-32B": (qwen(3584, 28, 28, 4, 152064, 18944), qwen(5120, 64, 40, 8, 152064, 27648)),
    "Qwen3-VL 2B<-8B": (qwen3(2048, 28, 16, 6144, 24, [5, 11, 17]), qwen3(4096, 36, 32, 12288, 27, [8, 16, 24])),
}
SIZES = {"3B<-7B": (3.75e9, 8.29e9), "3B<-32B": (3.75e9, 33.45e9), "7B<-32B": (8.29e9, 33.45e9)}  # parameters


@pytest.fixture
def settings(tmp_path): return lambda **given: LaidConfig(output_dir=str(tmp_path), use_cpu=True, **given)


# --- against the allocator ----------------------------------------------------
def cut_down(tokenizer, width, layers, heads, inner):
    "A real Qwen2.5-VL with head_dim 128, small enough for a CPU."
    made = anchor_config("student", tokenizer).to_dict()
    made["text_config"] |= dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=1,
                                intermediate_size=inner, rope_parameters=ROPE, layer_types=None, max_window_layers=layers)
    made["vision_config"] |= dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=width,
                                  fullatt_block_indexes=[1])
    return Qwen2_5_VLConfig(**made)


def allocated_peak(work):
    "Most bytes that the allocator had given out at once since the start of `work`, as the profiler was told."
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("images, checkpointing", [(4, False), (16, False), (16, True)])
def test_the_planned_peak_is_what_a_training_allocates(images, checkpointing, settings, monkeypatch):
    processor = build_processor()
    configs = cut_down(processor.tokenizer, 256, 4, 2, 700), cut_down(processor.tokenizer, 384, 5, 3, 1000)
    collator = HaystackCollator(processor, turns=2, size=112)
    data = [picture_haystack(i, images, 2, "train") for i in range(4)]
    torch.manual_seed(0)
    student, teacher = (AutoModelForImageTextToText.from_config(c, dtype=torch.float32) for c in configs)
    args = settings(gradient_checkpointing=checkpointing, max_steps=2, gradient_accumulation_steps=2, save_strategy="no",
                    report_to="none", disable_tqdm=True)
    trainer = LaidTrainer(student, args, data, processor, teacher, None, data_collator=collator)
    batch = collator(data[:1])
    tokens, replies = batch["input_ids"].shape[1], int(batch["replies"].sum())
    pictures = int((batch["input_ids"] == configs[0].image_token_id).sum())
    sample = Sample(images, 112, 112, tokens - pictures - 2*images, replies)
    weights = sum(p.numel()*4 for p in student.parameters())
    taught = sum(p.numel()*4 for p in teacher.parameters())
    measured = allocated_peak(trainer.train)  # beside the weights of both, which were there
    configs[1].dtype = torch.float32
    planned = plan_training(*configs, args, sample, Cards())
    assert planned.tokens == tokens
    assert planned.bytes["student: weights"] == weights and planned.bytes["teacher: weights"] == taught
    assert planned.total - weights - taught == pytest.approx(measured, rel=0.15)


def test_bytes_come_and_go_with_their_storages():
    a, b = torch.ones(100, 100), torch.ones(100, 100)
    with LiveBytes([a, b]) as live:
        product = a @ b
        view = product[:10].T
        assert live.total == 4*100*100  # a view has no storage of its own
        del product
        assert live.total == 4*100*100  # and keeps the one it looks at
        del view
        assert live.total == 0
    assert live.peak == 4*100*100


# --- published shapes ---------------------------------------------------------
@pytest.mark.parametrize("pair", PAIRS)
def test_published_pairs_are_planned_without_weights(pair, settings):
    student, teacher = PAIRS[pair]
    made = plan_training(student, teacher, settings(bf16=True, gradient_checkpointing=True), Sample(images=20), Cards())
    assert made.tokens == (7_900 if student.model_type == "qwen2_5_vl" else 20*(300 + 2) + 40)
    whole, taught = made.bytes["student: weights"]/4, made.bytes["teacher: weights"]/2
    if pair in SIZES: assert (whole, taught) == pytest.approx(SIZES[pair], rel=.01)
    trained = made.bytes["student: gradients"]/4
    tower = sum(p.numel() for p in _tower(student).parameters())
    assert trained == whole - tower and made.bytes["student: optimizer states"] == 8*trained
    assert made.recomputed > 0
    checkpoints = student.text_config.num_hidden_layers*made.tokens*student.text_config.hidden_size*4
    assert made.bytes["residual stream"] > checkpoints  # float32, one a layer


def _tower(config):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config).get_encoder(modality="image")


def test_checkpointing_trades_work_for_memory(settings):
    plain, thrifty = (plan_training(PAIRS["3B<-7B"][0], None, settings(bf16=True, method="sft", gradient_checkpointing=c), Sample(images=20), Cards())
                      for c in (False, True))
    assert thrifty.total < plain.total and thrifty.flops == plain.flops and thrifty.recomputed > plain.recomputed == 0


@pytest.mark.parametrize("pair, cards, flags", [
    ("7B<-32B", Cards(4, *CARDS["a100"]), "--gradient_checkpointing true --fsdp full_shard --teacher_placement shard"),
    ("3B<-32B", Cards(1, *CARDS["h100"]), "--gradient_checkpointing true --teacher_bits 4 --lora_rank 8"),
    ("3B<-7B", Cards(1, *CARDS["4090"]), "--gradient_checkpointing true --teacher_bits 4 --lora_rank 8"),
])
def test_a_plan_that_does_not_fit_says_what_would(pair, cards, flags, settings):
    args, sample = settings(bf16=True), Sample(images=20)
    made = plan_training(*PAIRS[pair], args, sample, cards)
    better = advise(made, *PAIRS[pair], args)
    assert not made.fits and better.fits and " ".join(made.advice) == flags
    assert made.verdict().endswith(f"it would with {flags}") and better.verdict().startswith("fits ")


def test_the_memory_of_a_longer_sample_grows_with_its_tokens(settings):
    args = settings(bf16=True, gradient_checkpointing=True, method="sft")
    sizes = [plan_training(PAIRS["3B<-7B"][0], None, args, Sample(images=n), Cards()) for n in (150, 200, 250)]
    assert len({s.phase for s in sizes}) == 1  # at fewer images the peak is another moment of the step
    moving = [s.total - sum(v for k, v in s.bytes.items() if k.startswith("student")) for s in sizes]
    assert moving[2] - moving[1] == pytest.approx(moving[1] - moving[0], rel=.02)


def test_a_family_that_cuts_images_in_another_way_is_refused(settings):
    from transformers import LlavaConfig
    with pytest.raises(ValueError, match="a run of llava cannot be planned"):
        plan_training(LlavaConfig(), LlavaConfig(), settings(), Sample(), Cards())


def test_without_a_step_only_what_stands_there_is_counted(settings, monkeypatch):
    "As `laid train` does on a CPU, whose memory nobody looks at."
    args, pair = settings(bf16=True), PAIRS["3B<-7B"]
    whole = plan_training(*pair, args, Sample(images=2), Cards())
    monkeypatch.setattr("laid_nb.plan.simulate_step", lambda *_: pytest.fail("a step was run"))
    made = plan_training(*pair, args, Sample(images=2), Cards(), simulate=False)
    assert made.bytes == {k: whole.bytes[k] for k in made.bytes} and {k.split(":")[0] for k in made.bytes} == {"student", "teacher"}
    assert (made.disk, made.flops, made.tokens) == (whole.disk, whole.flops, whole.tokens) and made.total < whole.total


@pytest.mark.parametrize("limits", [{}, dict(max_pixels=200_000), dict(min_pixels=900_000), dict(image_budget=300_000), dict(max_pixels=90_000, image_budget=600_000)])
def test_tokens_are_counted_under_the_limits_of_a_run(limits, settings):
    "As the processor itself makes them, once with the limits in the settings and once saved with the processor."
    processor, photographs = build_processor(), [Image.new("RGB", (1000, 750)) for _ in range(4)]
    own, config = copy.deepcopy(processor.image_processor), PAIRS["3B<-7B"][0]
    limit_pixels(processor, **limits)
    text = "<|vision_start|><|image_pad|><|vision_end|>"*4
    grid = processor(text=[text], images=[photographs], return_tensors="pt", **size_of_images(processor, 4))["image_grid_thw"]
    made = int(grid.prod(1).sum())//4 + 2*4 + 40
    sample = Sample(4, 750, 1000)
    assert sample_tokens(config, limit_sample(sample, settings(**limits), own)) == made
    assert sample_tokens(config, limit_sample(sample, settings(), processor.image_processor)) == made


def test_limits_that_do_not_fit_are_refused_before_a_plan(settings):
    for limits, said in ((dict(max_pixels=-1), "max_pixels is -1"), (dict(max_pixels=1000), "at most 1,000"), (dict(image_budget=20_000), "20 images share")):
        with pytest.raises(ValueError, match=said): limit_sample(Sample(20), settings(**limits))


def test_laid_plan_counts_tokens_under_limits(tmp_path, capsys):
    "By flags, and by the image processor beside the config; where there is none, that is said."
    config, said = PAIRS["3B<-7B"][0], {}
    config.save_pretrained(tmp_path)
    flags = ["plan", str(tmp_path), "self", "--images", "4", "--image_size", "3000:4000", "--method", "sft", "--lora_rank", "8"]
    for way, more in (("the library's", []), ("flag", ["--max_pixels", "401408"])):
        assert main([*flags, *more]) == 0
        out = capsys.readouterr()
        assert "no image processor is read" in out.err
        said[way] = out.out.splitlines()[-1]
    Qwen2VLImageProcessor(min_pixels=56*56, max_pixels=512*784).save_pretrained(tmp_path)
    assert main(flags) == 0
    out = capsys.readouterr()
    assert out.err == "" and out.out.splitlines()[-1] == said["flag"] != said["the library's"]
    assert f"at {sample_tokens(config, Sample(4, 3000, 4000, max_pixels=401408)):,} tokens" in said["flag"]


@pytest.mark.parametrize("given, epochs, kept", [({}, 10, 3), (dict(save_total_limit=None), 10, 10), (dict(save_total_limit=4), 10, 5), ({}, 1, 1), (dict(save_strategy="no"), 10, 0)])
def test_the_disk_holds_the_checkpoints_that_are_kept_and_the_one_that_is_written(settings, given, epochs, kept):
    args = settings(**dict(save_strategy="epoch", num_train_epochs=epochs) | given)
    made = plan_training(*PAIRS["3B<-7B"], args, Sample(images=2), Cards(), simulate=False)
    found, = (n for n in made.disk if "checkpoint" in n)
    assert found == f"disk: {kept} checkpoints"
    weights, states = made.bytes["student: weights"], made.bytes["student: optimizer states"]
    assert made.disk[found] == pytest.approx(kept*(weights + states), rel=1e-6)


# --- recipes --------------------------------------------------------------------
DOCS = Path(__file__).parents[1]/"docs"


@pytest.fixture(scope="module")
def recipes():
    "The generator of what lies beside the recipes, and what it would write now of one; all of them take minutes."
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        import recipes as made
    return made, {recipe: made.planned(recipe) for recipe in made.recipes() if "itself" in recipe.stem}


def test_a_recipe_fits_and_what_lies_beside_it_is_not_stale(recipes):
    "Else: python docs/recipes.py"
    made, planned = recipes
    pairs = [tuple(made.command(recipe)[:2]) for recipe in made.recipes()]
    assert len(planned) == 1 and len(set(pairs)) == 5 and sum(teacher == "self" for _, teacher in pairs) == 1
    for recipe, (plan, said) in planned.items():
        assert plan.fits and not plan.advice, recipe.stem
        assert recipe.with_suffix(".txt").read_text() == said, recipe.stem
    page = made.PAGE.read_text()
    written = page.split(made.START)[1].split(made.END)[0]
    assert made.table({recipe: plan for recipe, (plan, _) in planned.items()}).strip().splitlines()[-1] in written


def test_a_recipe_is_a_config_by_name(tmp_path):
    from laid_nb.cli import _training_settings, _yaml_settings
    args, simulation = _training_settings({"use_cpu": True, "output_dir": str(tmp_path)} | _yaml_settings("recipe:qwen2.5-vl-3b-from-itself-24gb"))
    assert (args.lora_rank, args.method, simulation.thin, args.bf16) == (8, "kd", -3, True)
    args, _ = _training_settings({"use_cpu": True, "output_dir": str(tmp_path)} | _yaml_settings("recipe:qwen2.5-vl-7b-from-32b-4x80gb"))
    assert args.fsdp is True and args.fsdp_plugin_args["fsdp_version"] == 2 and args.teacher_placement == "shard"
    with pytest.raises(ValueError, match="no recipe is called 'x': there are qwen2.5-vl-3b-from-32b-80gb, "): _yaml_settings("recipe:x")


@pytest.mark.parametrize("name, parameters, text", [("Qwen2.5-VL-3B-Instruct", 3.75e9, (2048, 36, 16, 2, 128, 151936)), ("Qwen2.5-VL-7B-Instruct", 8.29e9, (3584, 28, 28, 4, 128, 152064)),
                                                    ("Qwen2.5-VL-32B-Instruct", 33.45e9, (5120, 64, 40, 8, 128, 152064)), ("Qwen3-VL-2B-Instruct", 2.13e9, (2048, 28, 16, 8, 128, 151936)),
                                                    ("Qwen3-VL-8B-Instruct", 8.77e9, (4096, 36, 32, 8, 128, 151936))])
def test_published_configs_on_the_meta_device(name, parameters, text):
    "Every published pair is built without weights: its sizes, its RoPE, its layers under capture and its mixing."
    config = AutoConfig.from_pretrained(DOCS.parent/"data"/"recipes"/"configs"/name)
    with torch.device("meta"): model = AutoModelForImageTextToText.from_config(config)
    own = config.get_text_config()
    assert (own.hidden_size, own.num_hidden_layers, own.num_attention_heads, own.num_key_value_heads, getattr(own, "head_dim", None) or own.hidden_size//own.num_attention_heads, own.vocab_size) == text
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=.01)
    assert model.lm_head.weight.shape == (text[5], text[0]) and len(rope_layers(model)) == text[1]
    spec = rope_spec(model, text[1] - 1)
    assert len(spec.inv_freq) == 64 and sorted(torch.bincount(spec.axis).tolist()) == ([16, 24, 24] if "2.5" in name else [20, 20, 24])
    teacher = AutoConfig.from_pretrained(DOCS.parent/"data"/"recipes"/"configs"/("Qwen2.5-VL-32B-Instruct" if "2.5" in name else "Qwen3-VL-8B-Instruct"))
    mixing = mixings(config, teacher, layer_pairs("last", config, teacher))
    (key, mix), = mixing.items()
    other = teacher.get_text_config()
    assert key == f"{text[1] - 1}-{other.num_hidden_layers - 1}" and mix.sizes == (text[2], other.num_attention_heads, text[3], other.num_key_value_heads)
