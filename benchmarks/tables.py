"""The tables of the README: what the other benchmarks left in data/results, as Markdown in data/results/bench.md."""
import json

from measure import RESULTS


def rows(
    name: str,  # of a benchmark
) -> list[dict]:
    "What a benchmark measured."
    return json.loads((RESULTS/f"bench_{name}.json").read_text(encoding="utf-8"))["rows"]


def markdown(
    header: list[str],
    lines: list[list[str]],
) -> str:
    "A table, the first column to the left."
    line = lambda cells: "| " + " | ".join(cells) + " |\n"
    return line(header) + "|:--" + "|--:"*(len(header) - 1) + "|\n" + "".join(map(line, lines))


def steps() -> str:
    "Time and memory of a training step by method."
    by_size = {}
    for r in rows("step"):
        cell = f"{r['time / SFT + KL']:.2f}<br><sub>memory {r['memory / SFT + KL']:.2f}</sub>"
        by_size.setdefault(r["tokens"], {})[r["method"]] = cell
    methods = next(iter(by_size.values()))
    return markdown(["tokens", *methods], [[f"{tokens:,}", *cells.values()] for tokens, cells in by_size.items()])


def parts() -> str:
    "The parts against the best direct version at each size."
    lines = []
    for r in rows("spectra"):
        direct = min(("blocked", "skewed"), key=lambda name: r[f"{name}_over_fft"])  # the faster one
        if (r["kv_heads"], r["head_dim"]) == (2, 64):
            times, share = r[f"{direct}_over_fft"], r["fft_MiB"]/r[f"{direct}_MiB"]
            lines.append(["distance response by FFT, 8 heads", f"{r['tokens']:,}", f"{times:.1f}", f"{share:.2f}"])
    for r in rows("attention"):
        if r["time ratio"]:
            what = "attention match in blocks, 8 heads, forward and backward"
            lines.append([what, f"{r['tokens']:,}", f"{1/r['time ratio']:.1f}", f"{r['memory ratio']:.3f}"])
    return markdown(["part", "tokens", "times as fast", "share of the memory"], lines)


def peers() -> str:
    "Time and memory of a training step beside other libraries'."
    cell = lambda r: f"{r['time / SFT + KL']:.2f}<br><sub>memory {r['memory / SFT + KL']:.2f}</sub>"
    found = rows("peers")
    sizes = list(dict.fromkeys(r["tokens"] for r in found))
    by_method = {r["method"]: [cell(x) for x in found if x["method"] == r["method"]] for r in found}
    return markdown(["method", *(f"{n:,} tokens" for n in sizes)], [[m, *cells] for m, cells in by_method.items()])


def card() -> str:
    "A step at true shapes on a GPU: seconds, share of the peak, memory, and the ratio to SFT + KL."
    found, lines = rows("gpu"), []
    base = {(r["pair"], r["tokens"]): r["seconds"] for r in found if r["method"] == "SFT + KL"}
    for r in found:
        ratio = r["seconds"]/base[r["pair"], r["tokens"]]
        lines.append([r["pair"], f"{r['tokens']:,}", r["method"], f"{r['seconds']:.2f}", f"{ratio:.2f}",
                      f"{r['share of the floor']:.0%}", f"{r['tokens a second']:,.0f}", f"{r['peak GB']:.1f}",
                      f"{r['GB with AdamW']:.1f}"])
    return markdown(["pair", "tokens", "method", "seconds", "/ SFT + KL", "of the bf16 peak", "tokens/s", "GB",
                     "GB with AdamW"], lines)


def aims() -> str:
    "What was aimed at on a GPU beside what was measured."
    from gpu import targets  # brings transformers along, which the other tables do without
    shown = lambda x: "not measured" if x is None else f"{x:.2f}"
    return markdown(["target", "pair", "wanted", "measured"],
                    [[t["target"], t["pair"], t["wanted"], shown(t["measured"])] for t in targets(rows("gpu"))])


def main():
    found = steps(), parts(), peers(), card(), aims()
    (RESULTS/"bench.md").write_text("\n".join(found), encoding="utf-8")


if __name__ == "__main__":
    main()
