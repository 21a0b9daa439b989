"""`python tests/lock.py`: constraints.txt, and all that it leaves out, with the hashes of the files -> requirements-lock.txt.

For Linux and Python 3.10 to 3.13 (3.11 from 3.11.5), package and tools. It needs uv (`pip install uv`) and the package index; nothing is installed."""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT/"requirements-lock.txt"
SETTINGS = """[tool.uv]
environments = ["sys_platform == 'linux' and python_version == '3.10'",
                "sys_platform == 'linux' and python_full_version >= '3.11.5' and python_version < '3.14'"]
"""
HEAD = """# constraints.txt with hashes, and the libraries of CUDA that torch pins: `make lock` writes it, after a change of constraints.txt.
# pip install --require-hashes -r requirements-lock.txt && pip install --no-deps --no-build-isolation -e .
"""


def main():
    uv = shutil.which("uv")
    if not uv: sys.exit("uv reads the package index: pip install uv")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pyproject.toml").write_text(SETTINGS, encoding="utf-8")  # uv reads it where it runs
        command = [uv, "pip", "compile", ROOT/"setup.py", "--quiet", "--extra", "dev", "--universal", "--python-version", "3.10",
                   "-c", ROOT/"constraints.txt", "--generate-hashes", "--no-header", "--no-annotate", "-o", Path(folder)/"lock.txt"]
        done = subprocess.run(command, cwd=folder)
        if done.returncode: sys.exit(done.returncode)
        LOCK.write_text(HEAD + Path(folder, "lock.txt").read_text(encoding="utf-8"), encoding="utf-8")
    print(f"{LOCK.name}: {LOCK.read_text(encoding='utf-8').count('; ')} versions")


if __name__ == "__main__": main()
