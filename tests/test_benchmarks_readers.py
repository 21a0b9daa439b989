"Benchmarks: rows of the table, and their readers."
import pytest

from laid_nb.benchmarks import BENCHMARKS, read_haystacks
from laid_nb.haystack import picture_haystack
from laid_nb.vhs import export_vhs, read_vhs


def test_files_one_behind_the_other(tmp_path):
    folder = export_vhs([picture_haystack(0, n, 2, "test") for n in (2, 3)], tmp_path/"out")
    files = sorted(folder.glob("VHs_qa/*/*.json"))
    read = read_haystacks(files, folder/"images", "vhs")
    assert read == [h for f in files for h in read_vhs(f, folder/"images")] and len(read) == 4


@pytest.mark.parametrize("image_root, benchmark, word", [(None, "vhs", "--image_root"), (".", "vqa", "one of vhs")])
def test_what_cannot_be_read(image_root, benchmark, word):
    with pytest.raises(ValueError, match=word): read_haystacks(["a.json"], image_root, benchmark)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_are_complete(name):
    row = BENCHMARKS[name]
    assert callable(row.read) and row.means and "\n" not in row.means and row.prompt == row.prompt.lstrip()
