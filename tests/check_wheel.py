"""Usage: check_wheel.py FILE.whl. Installs the wheel in an empty environment and uses it from another directory.

The environment borrows the other packages from the running one through a .pth file; laid_nb itself must be the wheel's.
"""
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

LIMIT_MB = 48
INSIDE = """
import sys, pathlib, laid_nb
home = pathlib.Path(laid_nb.__file__).resolve()
assert home.is_relative_to(pathlib.Path(sys.prefix).resolve()), f'laid_nb is not the one of the wheel: {home}'
assert 'torch' not in sys.modules, 'import laid_nb imports torch'
from laid_nb.store import data_path
assert data_path().resolve() == home.parent/'data', f'data are not those of the wheel: {data_path()}'
assert 'torch' not in sys.modules, 'import laid_nb.haystack imports torch'
print('imported from', home.parent)
"""


def data_files(root):
    "Names of the files below the folder `root` that the wheel should hold."
    names = [path.relative_to(root) for path in Path(root).rglob("*") if path.is_file()]
    return {name.as_posix() for name in names if not any(part.startswith((".", "__")) for part in name.parts)}


def check(wheel):
    "Size, contents, import and command of the wheel; AssertionError or CalledProcessError when one is wrong."
    size = wheel.stat().st_size/1e6
    assert size < LIMIT_MB, f"{wheel.name} has {size:.1f} MB, the limit is {LIMIT_MB} MB"
    packed = {name.removeprefix("laid_nb/data/") for name in zipfile.ZipFile(wheel).namelist() if name.startswith("laid_nb/data/")}
    here = data_files(Path(__file__).resolve().parent.parent/"data")
    assert packed == here, f"data in the wheel and in the repository differ: {sorted(packed ^ here)}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        site = Path(sysconfig.get_path("purelib", "venv" if "venv" in sysconfig.get_scheme_names() else "posix_prefix",
                                       vars={"base": folder, "platbase": folder}))
        bin_ = Path(folder)/"bin"
        pip = [sys.executable, "-m", "pip", "--python", bin_/"python", "install", "-q", "--no-deps", "--no-index", wheel.resolve()]
        subprocess.run(pip, check=True, env=env)
        (site/"borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([bin_/"python", "-c", INSIDE], check=True, cwd=folder, env=env)
        help_ = subprocess.run([bin_/"laid", "--help"], check=True, cwd=folder, env=env, capture_output=True, text=True).stdout
        assert "demo" in help_, f"laid --help does not name the demo: {help_!r}"
    print(f"{wheel.name}: {size:.1f} MB, {len(packed)} data files, installs, imports and runs")


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(f"check_wheel.py takes one wheel, got {len(sys.argv) - 1} arguments")
    check(Path(sys.argv[1]))
