"""Results as Markdown tables and as pictures. Nothing here measures anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.contenders import OURS

Result = dict[str, Any]
OURS_COLOUR, PEER_COLOUR = "#1f5fa8", "#b0b0b0"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text."""
    cells = [list(heads), *[list(row) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([f"| {lines[0]}", "|" + "|".join("---" for _ in heads), *(f"| {line}" for line in lines[1:])])


def duration(seconds: float) -> str:
    """With a unit and three digits."""
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def size(count: float | None) -> str:
    """Bytes in MB, or a dash."""
    return f"{count / 1e6:,.0f}" if count else "–"


def spread(found: dict[str, float], digits: int = 2) -> str:
    """Median and quartiles."""
    if found["q1"] == found["q3"]:
        return f"{found['median']:.{digits}f}"
    return f"{found['median']:.{digits}f} ({found['q1']:.{digits}f}–{found['q3']:.{digits}f})"


def cases_table(cases: Sequence[Result]) -> str:
    """A row per contender of each case. The ratio is its time over ours in the same rounds."""
    heads = (
        "case",
        "who",
        "images/s",
        "time per call (quartiles)",
        "times ours",
        "peak MB",
        "first batch",
        "difference, or why not",
    )
    rows: list[tuple[str, ...]] = []
    for case in cases:
        title = f"{case['title']} {case['mode']} {case['dtype']}, batch {case['batch']}"
        for row in case["contenders"]:
            if row["status"] != "ok":
                rows.append((title, row["name"], "–", "–", "–", "–", "–", row["reason"]))
            else:
                time = row["seconds"]
                quartiles = f"{duration(time['median'])} ({duration(time['q1'])}–{duration(time['q3'])})"
                ratio = spread(row["ratio"]) if "ratio" in row else "–"
                first = f"{row['first_batch_s']:.2f} s"
                rows.append((
                    title, row["name"], f"{row['images_per_s']:.4g}", quartiles, ratio, size(row.get("memory_bytes")), first,
                    f"{row['difference']:.1e}",
                ))  # fmt: skip
            title = ""
    return table(heads, rows)


def goals_table(goals: Sequence[Result]) -> str:
    """What was promised, what was found, and whether that is enough."""
    rows = []
    for row in goals:
        wanted = f"{'≤' if row['at_most'] else '≥'} {row['target']:g}"
        if row["found"] is None:
            why = row["detail"].removeprefix("not measured").strip(" :()")
            rows.append((row["goal"], wanted, "–", f"not measured ({why})" if why else "not measured"))
        else:
            digits = 3 if row["at_most"] else 2
            detail = f" ({row['detail']})" if row["detail"] else ""
            rows.append(
                (row["goal"], wanted, spread(row["found"], digits), ("yes" if row["reached"] else "no") + detail)
            )
    return table(("goal", "wanted", "found", "reached"), rows)


def profile_table(profile: Result) -> str:
    """Operations of one call by their own time."""
    rate = f"{profile['flops'] / profile['seconds'] / 1e9:.0f} GFLOP/s over all"
    title = f"{profile['title']}: {duration(profile['seconds'])} under the profiler, {rate}"
    rows = [(r["operation"], duration(r["seconds"]), f"{100 * r['share']:.1f} %") for r in profile["rows"]]
    return table((title, "own time", "share"), rows)


def choices_table(choices: Sequence[Result]) -> str:
    """Time and memory with each choice, and the ratio to the time as it is."""
    rows = [
        (row["choice"], duration(row["seconds"]["median"]), spread(row["ratio"]), size(row["memory_bytes"]))
        for row in choices
    ]
    return table(("V2-T 256/8 inference fp32, batch 8", "time per call", "times as it is", "peak MB"), rows)


def machine(environment: Result) -> str:
    """One sentence: where, when and with what."""
    where = environment["machine"]
    device = where.get("gpu") or f"{where['processor']}, {where['cpus']} cores, {where['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return f"{device}; {environment['date'][:10]}; commit {environment['commit']}; {versions}. Command: `{environment['command']}`."


def ceilings_table(section: Result, **_: Any) -> str:
    rows = [
        (f"bf16 matrix product ({section['matmul_shape']})", f"{section['matmul_flops_per_s'] / 1e12:,.4g} TFLOP/s"),
        (
            f"copy on the device ({section['copy_bytes'] / 2**30:.3g} GiB, read and written)",
            f"{section['copy_bytes_per_s'] / 1e9:,.4g} GB/s",
        ),
    ]
    return table(("measured ceiling", ""), rows)


def check_table(section: Result, **_: Any) -> str:
    """Distances of all back ends from the reference, one row per back end, the largest over the windows."""
    by: dict[str, list[Result]] = {}
    for row in section["rows"]:
        by.setdefault(row["backend"], []).append(row)
    rows: list[tuple[str, ...]] = []
    for backend, found in by.items():
        good = [row for row in found if "distance" in row]
        if not good:
            rows.append((backend, "–", "–", "–", "–", found[0]["reason"]))
            continue
        worst = [f"{max(row['distance'][name] for row in good):.1e}" for name in ("output", "qkv", "bias", "scale")]
        wrong = [str(row["window"]) for row in good if not row["equal"]]
        missing = [f"window {row['window']}: {row['reason']}" for row in found if "reason" in row]
        rows.append(
            (backend, *worst, "; ".join([*(["differs at " + ", ".join(wrong)] if wrong else ["equal"]), *missing]))
        )
    return table(
        ("back end", "output", "gradient of qkv", "of the bias", "of the scale", "in bf16, against fp32"), rows
    )


def of_ceiling(value: float, unit: float, ceilings: Result | None, ceiling: str) -> str:
    """A rate in a unit, with its share of a measured ceiling where there is one."""
    text = f"{value / unit:.4g}"
    return f"{text} ({100 * value / ceilings[ceiling]:.0f} %)" if ceilings and ceiling in ceilings else text


def attention_table(section: Result, ceilings: Result | None = None, **_: Any) -> str:
    """Each back end at each window, with shares of the ceilings."""
    heads = (
        "window", "back end", "forward", "TFLOP/s", "GB/s", "shifted", "forward + backward", "TFLOP/s", "GB/s", "shifted",
    )  # fmt: skip

    rows: list[tuple[str, ...]] = []
    for row in section["rows"]:
        if "shifted" not in row:
            rows.append((str(row["window"]), row["backend"], *["–"] * 7, row.get("reason", "–")))
            continue
        cells = []
        for part in ("forward", "both"):
            plain, shifted = row["regular"], row["shifted"]
            cells += [
                duration(plain[f"{part}_s"]),
                of_ceiling(plain[f"{part}_flops_per_s"], 1e12, ceilings, "matmul_flops_per_s"),
                of_ceiling(plain[f"{part}_bytes_per_s"], 1e9, ceilings, "copy_bytes_per_s"),
                duration(shifted[f"{part}_s"]),
            ]
        rows.append((str(row["window"]), row["backend"], *cells))
    return table(heads, rows)


def efficiency_table(section: Result, ceilings: Result | None = None, **_: Any) -> str:
    """Achieved rates of our models against the matrix product and the copy."""
    rows = []
    for case in section["cases"]:
        for row in case["contenders"]:
            if row["status"] == "ok" and row["project"] == OURS:
                passes = 3 if case["mode"] == "training" else 1
                flops = 2 * passes * case["macs_per_image"] * row["images_per_s"]
                moved = passes * 2 * (case["least_values_per_image"] + case["parameters"] / case["batch"])
                rows.append((
                    f"{case['title']} {case['mode']}", row["name"], of_ceiling(flops, 1e12, ceilings, "matmul_flops_per_s"),
                    of_ceiling(moved * row["images_per_s"], 1e9, ceilings, "copy_bytes_per_s"),
                ))  # fmt: skip
    return table(("model, bf16", "who", "TFLOP/s (of the matrix product)", "least GB/s (of the copy)"), rows)


def models_table(section: Result, ceilings: Result | None = None, **_: Any) -> str:
    return f"{cases_table(section['cases'])}\n\n{efficiency_table(section, ceilings)}"


def vit_table(section: Result, **_: Any) -> str:
    rows = [
        (f"ViT-{name[0].upper()}/16 at {section['image'][name]}", f"{rate / 1e12:.4g}")
        for name, rate in section["rates"].items()
    ]
    rows += [(f"ViT-{name[0].upper()}/16", reason) for name, reason in section["reasons"].items()]
    return table(("timm, compiled, inference in bf16", "TMAC/s"), rows)


def giant_table(section: Result, ceilings: Result | None = None, **_: Any) -> str:
    rows = []
    for row in section["rows"]:
        if "reason" in row:
            rows.append((row["name"], row["reason"], "–", "–", "–"))
            continue
        time = row["seconds"]["median"]
        rates = (
            of_ceiling(row["flops_per_s"], 1e12, ceilings, "matmul_flops_per_s"),
            of_ceiling(section["least_bytes"] / time, 1e9, ceilings, "copy_bytes_per_s"),
        )
        rows.append((row["name"], duration(time), *rates, size(row.get("memory_bytes"))))
    head = f"{section['blocks']} blocks of width {section['width']}, batch {section['batch']}, training step"
    return table((head, "time", "TFLOP/s (of the matrix product)", "least GB/s (of the copy)", "peak MB"), rows)


def training_steps_table(found: Result) -> str:
    """Steps under each technique of the memory recipe (``bench/giant.py``)."""
    gpu = bool(found["environment"]["machine"]["gpu"])
    rows = []
    for place in found["places"]:
        for row in place["rows"]:
            start = (f"{place['size']}/{place['window']}, {place['batch']} images", row["name"])
            if "reason" in row:
                rows.append((*start, row["reason"], "–", "–"))
                continue
            use = row["flops_per_s"] / found["peak"]["flops_per_s"]
            rows.append((*start, duration(row["seconds"]["median"]), f"{use:.0%}", f"{row['peak_bytes'] / 1e9:,.2f}"))
    utilisation = f"model FLOP utilisation ({found['peak']['source']})"
    memory = "peak GB" if gpu else "peak GB beyond model and optimiser"
    return table(("SimMIM, training step", "technique", "time", utilisation, memory), rows)


def losses_line(found: Result) -> str:
    """How the loss went, in one sentence."""
    run = found["training"]
    losses = run["losses"]
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    where = f"{found['parameters']:,} parameters, depths {tuple(found['depths'])}, width {found['width']}"
    return (
        f"{where}, {found['precision']}: in {len(losses)} steps of {run['batch']} photographs at {run['size']} pixels the loss "
        f"went from {first:.3f} to {last:.3f} (means of {tenth} steps); every loss "
        f"{'was finite' if found['finite'] else 'was NOT finite'}, at the other sizes too."
    )


def curve_table(points: Sequence[Result]) -> str:
    """A row per point of a scaling curve."""
    rows = []
    for p in points:
        start = (f"{p['size']}²", str(p["window"]), str(p["batch"]), p["mode"], p["name"])
        if "seconds" not in p:
            rows.append((*start, p.get("reason", "–"), "–", "–"))
            continue
        per_pixel = p["seconds"] / p["batch"] / p["size"] ** 2 * 1e9
        memory = p.get("memory_bytes")
        per_image = f"{memory / p['batch'] / 1e6:,.1f}" if memory else "–"
        rows.append((*start, duration(p["seconds"] / p["batch"]), f"{per_pixel:.4g} ns", per_image))
    return table(("image", "window", "batch", "mode", "who", "time per image", "per pixel", "peak MB per image"), rows)


def scaling_table(section: Result, **_: Any) -> str:
    return "\n\n".join(curve_table(section[kind]) for kind in ("area", "window") if section.get(kind))


SECTION_TABLES: dict[str, Callable[..., str]] = {
    "ceilings": ceilings_table,
    "check": check_table,
    "giant": giant_table,
    "models": models_table,
    "vit": vit_table,
    "attention": attention_table,
    "scaling": scaling_table,
}


def section_table(name: str, sections: Result) -> str:
    """A section of the GPU benchmark, or the reason why there is none."""
    section = sections[name]
    if "reason" in section:
        return f"{name}: {section['reason']}"
    return SECTION_TABLES[name](section, ceilings=sections.get("ceilings"))


def ratio_plot(cases: Sequence[Result], file: Path) -> None:
    """How many times as long as ours each peer takes; whiskers are the quartiles over the rounds."""
    bars = []
    for case in cases:
        for row in case["contenders"]:
            if "ratio" in row and row["project"] != OURS:
                bars.append((f"{case['title']} {case['mode']}, batch {case['batch']}: {row['name']}", row["ratio"]))
    if not bars:
        return
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.27 * len(bars)), layout="constrained")
    medians = [ratio["median"] for _, ratio in bars]
    errors = [[r["median"] - r["q1"] for _, r in bars], [r["q3"] - r["median"] for _, r in bars]]
    axes.barh(range(len(bars)), medians, xerr=errors, color=PEER_COLOUR, ecolor="black", capsize=2)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color=OURS_COLOUR, linewidth=2)
    axes.set_xlabel("time over that of swinscale (blue line); right of it, swinscale is faster")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def scaling_plot(section: Result, file: Path) -> None:
    """Time and peak memory per image, against the side of the image and against the window."""
    plt = _pyplot()
    figure, grid = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained", squeeze=False)
    for column, (kind, x, label) in enumerate(
        (("area", "size", "side of the image, pixels"), ("window", "window", "window, tokens"))
    ):
        for row, (y, axis) in enumerate(
            (("seconds", "time per image, s"), ("memory_bytes", "peak memory per image, MB"))
        ):
            axes = grid[row][column]
            for name in dict.fromkeys((p["name"], p["mode"]) for p in section.get(kind, [])):
                points = [p for p in section[kind] if (p["name"], p["mode"]) == name and p.get("seconds") and p.get(y)]
                values = [p[y] / p["batch"] / (1e6 if y == "memory_bytes" else 1) for p in points]
                colour = OURS_COLOUR if name[0].startswith(OURS) else PEER_COLOUR
                axes.plot([p[x] for p in points], values, "o-", color=colour, label=f"{name[0]} {name[1]}")
            axes.set(xlabel=label, ylabel=axis)
            axes.grid(alpha=0.3, which="both")
            if any(len(line.get_xdata()) for line in axes.lines):
                axes.set(xscale="log", yscale="log" if kind == "area" else "linear")
                axes.set_ylim(bottom=None if kind == "area" else 0)
                axes.legend(fontsize=8)
                ticks = sorted({p[x] for p in section[kind]})
                axes.set_xticks(ticks, [str(t) for t in ticks])
                axes.minorticks_off()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def attention_plot(section: Result, file: Path) -> None:
    """Forward and backward time of attention alone against the window."""
    plt = _pyplot()
    figure, grid = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    rows = [row for row in section["rows"] if "regular" in row]
    for axes, part, title in zip(grid, ("forward_s", "both_s"), ("forward", "forward + backward"), strict=True):
        for backend in dict.fromkeys(row["backend"] for row in rows):
            points = sorted((row["window"], 1e3 * row["regular"][part]) for row in rows if row["backend"] == backend)
            axes.plot(*zip(*points, strict=True), "o-", label=backend)
        axes.set(xlabel="window, tokens", ylabel="ms", title=title, yscale="log")
        axes.grid(alpha=0.3, which="both")
        if rows:
            axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
