"""Reads settings.ini, and puts the folder `data` into the wheel as `laid_nb/data`."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


class BuildWithData(build_py):
    "In an editable install the data stay at <repository>/data and nothing is copied."

    def data_copies(self):
        "Every data file and its place in the wheel; hidden files and caches are left out."
        if getattr(self, "editable_mode", False): return []
        files = [p.relative_to(root) for p in sorted((root/"data").rglob("*")) if p.is_file()]
        files = [p for p in files if not any(part.startswith((".", "__")) for part in p.parts)]
        return [(root/p, Path(self.build_lib)/cfg["lib_path"]/p) for p in files]

    def run(self):
        super().run()
        for source, target in self.data_copies():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode=1):
        return super().get_outputs(include_bytecode) + [str(target) for _, target in self.data_copies()]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root/"README.md").read_text(encoding="utf-8") if (root/"README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: " + cfg["audience"],
                 "Natural Language :: " + cfg["language"], "Operating System :: OS Independent",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence", "Typing :: Typed",
                 *(f"Programming Language :: Python :: {v}" for v in ("3", "3.10", "3.11", "3.12", "3.13"))],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Source": cfg["git_url"],
                  "Issues": cfg["git_url"] + "/issues", "Changes": cfg["git_url"] + "/blob/main/CHANGELOG.md"},
    package_data={cfg["lib_path"]: ["py.typed", "web/*"]},
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    python_requires=f">={cfg['min_python']},<{cfg['max_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={x: cfg[f"{x}_requirements"].split() for x in ("dev", "inspect", "smollm")},
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
                  "lmms_eval.models": [f"laid={cfg['lib_path']}.lmms:lmms_models"]},
    cmdclass={"build_py": BuildWithData},
    zip_safe=False,
)
