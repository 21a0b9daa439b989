"Every example of docs/your_data.md: its files are written and its command is run."
import re
import shlex
from pathlib import Path

import pytest

from laid_nb.cli import main
from laid_nb.evaluate import read_records
from laid_nb.haystack import Scene, render

PAGE = (Path(__file__).parents[1]/"docs/your_data.md").read_text()
FILES = dict(re.findall(r'```json title="(\S+)"\n(.*?)```', PAGE, re.S))
COMMANDS = re.findall(r"```sh\nlaid (.*?)\n```", PAGE)


def test_the_page_has_an_example_for_each_reader():
    assert len(COMMANDS) == len(FILES) == 5 and all(any(name in c for c in COMMANDS) for name in FILES)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_example_runs_as_it_stands(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"images").mkdir()
    for n, name in enumerate(("dog", "cup")): render(Scene((name,), n)).save(tmp_path/f"images/{name}.png")
    for name, text in FILES.items(): (tmp_path/name).write_text(text)
    assert main(shlex.split(command)) == 0
    header, records = read_records(tmp_path/"results.jsonl")
    assert records and all(r["size"] == 2 for r in records)


def test_readers_name_the_file_and_the_field(tmp_path, capsys, monkeypatch):
    "One line that says which file, entry and field, for every reader."
    monkeypatch.chdir(tmp_path)
    (tmp_path/"images").mkdir()
    for name, text in FILES.items():
        broken = re.sub(r'"(image|images|ctxs|pos_image)": \[', r'"\1": [7, ', text)
        (tmp_path/name).write_text(broken)
    for command in COMMANDS:
        assert main(shlex.split(command)) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("laid: error: ") and any(name in said for name in FILES), said
