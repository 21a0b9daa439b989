"For lmms-eval: what the task files beside this one call. All of it is in laid_nb.lmms."
from functools import partial

from laid_nb.lmms import (  # noqa: F401
    doc_to_messages,
    doc_to_text,
    doc_to_visual,
    drawn_documents,
    file_documents,
    mmlongbench_documents,
    process_results,
    vhs_documents,
)

VHS_SIZES = ("oracle", 2, 3, 5, 10, 20, 50, 100, 150, 200, 500, 1000, 10000)
MMLONGBENCH_LENGTHS = (4, 8, 16, 32, 64, 128)  # thousands of tokens
DRAWN_SIZES = (1, 2, 5, 10, 20, 50, 100, 150)

for size in VHS_SIZES:
    for needles in ("single", "multi"):
        globals()[f"vhs_{needles}_{size}"] = partial(vhs_documents, needles, size)
for size in DRAWN_SIZES:
    for needles in ("single", "multi"):
        globals()[f"drawn_{needles}_{size}"] = partial(drawn_documents, needles, size)
for length in MMLONGBENCH_LENGTHS:
    for needles in ("single", "multi"):
        globals()[f"mmlongbench_{needles}_{length}k"] = partial(mmlongbench_documents, needles, length)
