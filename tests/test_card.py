"What is saved beside a student says what it is, and goes to a hub whole."
import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, RepoUrl
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from laid_nb.anchors import build_processor
from laid_nb.card import base_licence
from laid_nb.cli import main
from laid_nb.store import save_model
from shard_worker import tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    for name in ("student", "teacher"): save_model(tiny(name).float(), build_processor(), folder/name)
    (folder/"student"/"README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\nlicense_link: https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE\n---\n# Base\n")
    return folder


@pytest.fixture(scope="module")
def calls():
    "Calls to the hub, in order; a folder's files as they are when it is uploaded."
    made = []
    def create_repo(self, repo_id, **how):
        made.append(("create_repo", repo_id, how))
        return RepoUrl(f"https://huggingface.co/someone/{repo_id.rpartition('/')[2]}")
    def upload_folder(self, *, repo_id, folder_path, **how):
        made.append(("upload_folder", repo_id, how | {p.relative_to(folder_path).as_posix(): p.stat().st_size for p in Path(folder_path).rglob("*") if p.is_file()}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "create_repo", create_repo)
        patch.setattr(HfApi, "upload_folder", upload_folder)
        yield made


@pytest.fixture(scope="module")
def trained(pair, calls, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")/"out"
    line = dict(student=pair/"student", teacher=pair/"teacher", sizes="2,3", haystacks=4, use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2, save_steps=1, method="laid+", gradient_accumulation_steps=1,
                output_dir=out, push_to_hub=True, hub_model_id="someone/long-student", hub_private_repo=True, hub_token="hf_secret", hub_strategy="end", eval_sizes="1,2", eval_questions=12, eval_steps=1)
    assert main(["train", "--pictures", *(str(x) for name, value in line.items() for x in (f"--{name}", value))]) == 0
    return out


def test_the_card_says_what_the_student_is(trained):
    card = ModelCard.load(trained/"model"/"README.md")
    data = card.data.to_dict()
    assert data["license"] == "other" and data["license_name"] == "qwen-research" and data["license_link"].startswith("https://")
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-text-to-text" and "laid" in data["tags"] and "base_model" not in data  # a folder is no name on a hub
    log = json.loads((trained/"checkpoint-2"/"trainer_state.json").read_text())
    for words in ("Made from `student` and the teacher `teacher`", "| `method` | laid+ |", "| `max_steps` | 2 |", f"{log['global_step']} steps on 1 process", "4 haystacks of 2 to 3 images with 48 questions", "a gain of", "torch "):
        assert words in card.text, words
    rows = [h for h in log["log_history"] if "eval_accuracy_2" in h]
    assert rows[0]["step"] == 0 and "| step | 1 images | 2 images | window |" in card.text
    for row in (rows[0], rows[-1]): assert f"| {row['step']} | {100*row['eval_accuracy_1']:.1f} | {100*row['eval_accuracy_2']:.1f} | {row['eval_window']:.1f} |" in card.text
    assert "hf_secret" not in card.content and str(trained) not in card.content and "`learning_rate`" not in card.text  # it is the default


def test_what_is_uploaded_is_the_whole_student_and_nothing_else(trained, calls):
    (made, name, how), (sent, to, files) = calls
    assert (made, name, how["private"], how["token"], how["exist_ok"]) == ("create_repo", "someone/long-student", True, "hf_secret", True)
    assert (sent, to, files.pop("token"), files.pop("run_as_future")) == ("upload_folder", "someone/long-student", "hf_secret", False)
    assert files.pop("commit_message") == "End of training" and files.pop("revision") is None
    assert files == {p.name: p.stat().st_size for p in (trained/"model").iterdir()}
    assert files.keys() >= {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "laid_data.safetensors"}
    assert not any("checkpoint" in name or name.endswith((".bin", ".pt")) for name in files)
    assert AutoModelForImageTextToText.from_pretrained(trained/"model").num_parameters() and AutoProcessor.from_pretrained(trained/"model").tokenizer
    assert load_file(trained/"model"/"model.safetensors")


def test_results_of_laid_eval_go_into_the_card_once(trained, tmp_path):
    where = trained/"model"
    for name, sizes in (("a", "1,2"), ("b", "1,2"), ("c", "3")):
        kind = "multi" if name == "c" else "single"
        assert main(["eval", str(where), "--pictures", "--sizes", sizes, "--questions", "12", "--kind", kind, "--out", str(tmp_path/f"{name}.jsonl")]) == 0
    text = ModelCard.load(where/"README.md").text
    assert text.count("### drawn haystacks, single needle, test") == text.count("### drawn haystacks, multi needle, test") == 1
    results = text[text.index("## Results"):text.index("## Training")]
    assert results.count("| this model |") == 2 and "| images | 1 | 2 |" in results and "## Data" in text and "## Versions" in text
    assert ModelCard.load(where/"README.md").data.license == "other"


def test_a_licence_that_is_not_stated_is_left_out(tmp_path, pair):
    assert base_licence(str(tmp_path)) == {} and base_licence("nobody/nothing") == {}  # offline
    assert base_licence(str(pair/"student"))["license_name"] == "qwen-research"
