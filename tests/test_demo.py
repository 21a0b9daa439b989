"""The demo's folder: begun once, gone on with, refused with other settings."""
import pytest

from laid_nb.accuracy import Results, count
from laid_nb.demo import TRAININGS, _claim, verdict


def test_claim_resumes_refuses_and_starts_anew(tmp_path):
    out = tmp_path/"demo"
    state = _claim(out, {"steps": 1, "sizes": (1, 2)}, False)
    assert _claim(out, {"steps": 1, "sizes": (1, 2)}, False) == state
    with pytest.raises(ValueError, match="another steps: .*--out.*--fresh"): _claim(out, {"steps": 2, "sizes": (1, 2)}, False)
    (out/"records").mkdir()
    (out/"mine.txt").write_text("of the user")
    _claim(out, {"steps": 2, "sizes": (1, 2)}, True)
    assert sorted(p.name for p in out.iterdir()) == ["demo.json", "mine.txt", "records"]
    (tmp_path/"other").mkdir()
    (tmp_path/"other/a.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no demo"): _claim(tmp_path/"other", {}, True)
    assert (tmp_path/"other/a.txt").exists()


def test_the_verdict_says_longer_only_where_intervals_are_apart():
    sizes = [1, 10, 100]
    models = {"teacher": count(sizes, [199, 198, 197], [200]*3), "student": count(sizes, [198, 140, 100], [200]*3)}
    models |= {name: count(sizes, [198, 180, 110], [200]*3) for name in TRAININGS}
    models["SFT"] = models["student"]
    said = verdict(Results(models, "student")).splitlines()
    assert len(said) == 1 + len(TRAININGS)
    assert "not to be told from the student's" in said[1] and "50% right at 50 images and more (student 50%)" in said[1]
    assert all("longer" in line and "55% right at 50 images and more (student 50%)" in line for line in said[2:])
