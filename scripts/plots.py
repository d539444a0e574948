"""Draws the pictures: the ladder that `ladder.py` has climbed, and what `benchmarks/*.csv` holds.

    python scripts/plots.py [--output runs/plots]

Knows how a picture looks and which rows belong on it. Refuses to know how anything is measured, and needs no PyTorch:
matplotlib alone, from the extra [plot].
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are used from the checkout, not installed

from command_line import Parser, begin, ready, refuse

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="plots.py", description="Draw the pictures of benchmarks/*.csv.", allow_abbrev=False)
    p.add_argument("--benchmarks", type=Path, default=ROOT / "benchmarks", metavar="DIR", help="(benchmarks)")
    p.add_argument("--report", type=Path, metavar="FILE", help="a quantization_report.json: its errors layer by layer")
    p.add_argument("--output", type=Path, default=Path("runs/plots"), metavar="DIR", help="(runs/plots)")
    return p.parse_args(argv)


COLOURS = {
    "bfloat16": "#4878a8",
    "float32": "#7898c0",
    "int8": "#d08030",
    "int4": "#58985a",
}  # by format of the weights
PLAIN = "#888888"
PATCH = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind a number, so that no line crosses it
Series = dict[str, list[tuple[float, float]]]  # points by the name of a line

# -- the data ----------------


def records(folder: Path, name: str) -> list[dict[str, str]]:
    """The rows of FOLDER/NAME.csv."""
    path = folder / f"{name}.csv"
    try:
        return list(csv.DictReader(path.read_text("utf-8").splitlines()))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def start(row: dict[str, str]) -> str:
    """Device, model and format of a row, in words."""
    device = row["device"] if row["tp"] == "1" else f"{row['tp']} x {row['device']}"
    weights = {"int4": f"int4 g{row['group_size']}", "bf16": row["dtype"], "checkpoint": row["dtype"]}
    return f"{device}, {row['shape']}, {weights.get(row['mode'], row['mode'])}"


def context_series(rows: list[dict[str, str]]) -> Series:
    """Tokens per second by the tokens that a step attends to, in the middle of a run: the newest row of every setting
    and prompt, where at least two prompts were measured.
    """
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for row in rows:
        if row["batch"] == "1":
            prompt = int(row["prompt_len"])
            point = prompt + int(row["new_tokens"]) / 2, float(row["decode_tok_s"])
            found.setdefault(f"{start(row)}, {row['kernels']}", {})[prompt] = point
    return {name: sorted(points.values()) for name, points in found.items() if len(points) > 1}


def rows_series(rows: list[dict[str, str]]) -> Series:
    """What a step of M rows costs, in steps of one row: the newest run of every setting, which began with one row."""
    found: Series = {}
    for row in rows:
        name = f"{start(row)}, {row['kernels']}"
        if row["rows"] == "1":
            found[name] = []
        found[name].append((float(row["rows"]), float(row["ratio"])))
    return found


def speculation_series(rows: list[dict[str, str]]) -> Series:
    """Speed-up by how many proposals of a round were accepted, simulated and real: the newest row of every setting."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        name = f"{start(row)}, {row['draft']}, K = {row['num_draft_tokens']}"
        rate = f"{row['acceptance']}, {row['temperature']}"
        found.setdefault(name, {})[rate] = float(row["mean_accepted"]), float(row["speedup"])
    return {name: sorted(points.values()) for name, points in found.items()}


def losses(rows: list[dict[str, str]]) -> dict[str, float]:
    """Percent of perplexity that every way to quantize the embedded model costs."""
    found = {}
    for row in rows:
        if row["mode"] != "unquantized":
            order = "" if not row["act_order"] else ", act-order" if row["act_order"] == "True" else ", no act-order"
            search = ", clip search" if row["clip_search"] == "True" else ""
            group = f" g{row['group_size']}" if row["group_size"] != "-1" else ""
            found[f"{row['mode']}{group}{order}{search}, {row['tool']}"] = float(row["loss_percent"])
    return found


TECHNIQUES = {  # as in others.csv -> in words
    "eager": "16-bit, eager",
    "compiled": "16-bit, compiled",
    "kernels": "16-bit, kernels",
    "int8": "int8",
    "int4": "int4",
    "speculation": "16-bit, speculation",
    "int4, speculation": "int4, speculation",
}


def newest(rows: list[dict[str, str]], **wanted: str) -> float | None:
    """Tokens per second in the newest row of one short sequence with these values."""
    short = {"batch": "1", "prompt_len": "5", "new_tokens": "200", "cache_len": "256"} | wanted
    rates = [float(row["decode_tok_s"]) for row in rows if short.items() <= row.items()]
    return rates[-1] if rates else None


def beside(folder: Path, model: str = "llama-2-7b", device: str = "NVIDIA H200") -> dict[str, dict[str, float]]:
    """Tokens per second by system and technique: others' rows for that model, and this project's on that device."""
    found: dict[str, dict[str, float]] = {}
    for row in records(folder, "others"):
        if row["model"] == model and not row["device"].startswith("2 x"):
            name = f"{row['system']} ({row['version']}), {row['device'].removeprefix('NVIDIA ')}"
            found.setdefault(name, {})[row["technique"]] = float(row["tok_s"])
    rungs = {"eager, static cache": "eager", "compiled": "compiled"}
    own = {
        rungs[row["rung"]]: float(row["tok_s"])
        for row in records(folder, "ladder")
        if (row["model"], row["device"], row["tp"]) == (model, device, "1") and row["rung"] in rungs
    }
    modes = {"kernels": "bf16", "int8": "int8", "int4": "int4"}
    for technique, mode in modes.items():
        rate = newest(records(folder, "decode"), shape=model, device=device, mode=mode, kernels="triton", tp="1")
        if rate is not None:
            own[technique] = rate
    for row in records(folder, "speculative"):
        if (row["shape"], row["device"], row["mode"], row["acceptance"]) == (model, device, "bf16", "0.8"):
            own["speculation"] = float(row["tok_s"])
    return found | {f"this project, {device.removeprefix('NVIDIA ')}": own}


def ladders(rows: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    """What ladder.json holds, by a file's name: of every model, device and number of ranks its newest climb."""
    climbs: dict[str, dict[str, Any]] = {}
    for row in rows:
        of_ranks = f"-{ranks}-ranks" if (ranks := row["tp"]) != "1" else ""
        name = re.sub(r"[^a-z0-9.]+", "-", f"ladder-{row['model']}{of_ranks}-on-{row['device']}".lower()).strip("-")
        setting = {key: row[key] for key in ("model", "device", "commit")} | {"ranks": int(ranks)}
        if name not in climbs or climbs[name]["commit"] != row["commit"]:
            climbs[name] = setting | {"rungs": [], "roofline": {}}
        rung = {"rung": row["rung"], "weights": row["weights"]}
        climbs[name]["rungs"].append(rung | {key: float(row[key]) for key in ("tok_s", "speedup")})
        if row["bytes_per_token"]:
            roof = 1e9 * float(row["bandwidth_gb_s"]) / float(row["bytes_per_token"])
            climbs[name]["roofline"][row["weights"]] = roof
    return climbs


def layer_series(report: dict[str, Any]) -> Series:
    """The relative error of every Linear by its block, one line a kind: of outputs, without calibration of weights."""
    found: Series = {}
    for row in report["layers"]:
        block, _, kind = row["name"].removeprefix("layers.").partition(".")
        if block.isdecimal():
            found.setdefault(kind, []).append((float(block), row.get("output_error", row["weight_error"])))
    return found


# -- the pictures ----------------


def figure(width: float = 8.0, height: float = 4.5) -> "Figure":
    """An empty picture. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('pictures need matplotlib: pip install -e ".[plot]"') from error
    return Figure((width, height), layout="constrained")


def save(picture: "Figure", folder: Path, name: str) -> None:
    """NAME.png and NAME.svg in the folder; without the date, so that the same data are the same file."""
    from matplotlib import rc_context

    picture.savefig(folder / f"{name}.png", dpi=150)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # words stay words
        picture.savefig(folder / f"{name}.svg", metadata={"Date": None})


def several(ranks: int) -> str:
    """What comes before a device's name."""
    return f"{ranks} x " if ranks > 1 else ""


def ladder(found: dict[str, Any]) -> "Figure":
    """A bar a rung, the first at the bottom, and the roofline of each format of the weights as a line. found: what
    ladder.json holds.
    """
    rungs, picture = found["rungs"], figure(9, 1.5 + 0.5 * len(found["rungs"]))
    axes = picture.subplots()
    rates = [rung["tok_s"] for rung in rungs]
    bars = axes.barh(
        [rung["rung"] for rung in rungs], rates, color=[COLOURS.get(rung["weights"], PLAIN) for rung in rungs]
    )
    axes.bar_label(
        bars, [f"{rate:,.1f} ({rung['speedup']:.2f}x)" for rate, rung in zip(rates, rungs)], padding=3, bbox=PATCH
    )
    for name, rate in found["roofline"].items():
        label = f"{name} at the bandwidth: {rate:,.0f}"
        axes.axvline(rate, color=COLOURS.get(name, PLAIN), linestyle="--", label=label)
    axes.set_xlim(0, 1.2 * max([*rates, *found["roofline"].values()]))
    axes.set_xlabel("tokens per second, one sequence")
    axes.set_title(f"{found['model']} on {several(found['ranks'])}{found['device']}")
    axes.invert_yaxis()
    if found["roofline"]:
        axes.legend(loc="best")
    return picture


def lines(series: Series, title: str, x: str, y: str, logarithmic: bool = False) -> "Figure":
    """A line for every name. ValueError when there is nothing to draw."""
    if not series:
        raise ValueError(f"there is nothing to draw of: {title}")
    picture = figure(9, 4.5 + 0.16 * len(series))
    axes = picture.subplots()
    for name, points in series.items():
        axes.plot(*zip(*points), marker="o", markersize=4, label=name)
    if logarithmic:
        axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    picture.legend(loc="outside lower center", fontsize=8)
    return picture


def groups(values: dict[str, dict[str, float]], title: str) -> "Figure":
    """A group of bars for every technique, in it a bar for every system that has it."""
    techniques = [name for name in TECHNIQUES if any(name in rates for rates in values.values())]
    picture = figure(9, 1.2 + 0.22 * sum(map(len, values.values())) + 0.15 * len(techniques))
    axes, at, middles = picture.subplots(), 0.0, []
    colours = dict(zip(values, ("#c0c0c0", "#a0a0a0", "#808080", *COLOURS.values())))
    colours[list(values)[-1]] = COLOURS["bfloat16"]
    labelled: set[str] = set()
    for technique in techniques:
        here = [(name, rates[technique]) for name, rates in values.items() if technique in rates]
        middles.append(at + (len(here) - 1) / 2)
        for name, rate in here:
            bar = axes.barh(at, rate, 0.9, color=colours[name], label=None if name in labelled else name)
            axes.bar_label(bar, [f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"], padding=3, fontsize=8)
            labelled.add(name)
            at += 1
        at += 0.7
    axes.set_yticks(middles, [TECHNIQUES[name] for name in techniques])
    axes.margins(x=0.08)
    axes.set(title=title, xlabel="tokens per second, one sequence")
    axes.invert_yaxis()
    axes.legend(loc="best", fontsize=8)
    return picture


def bars(values: dict[str, float], title: str, x: str) -> "Figure":
    """A bar for every name, the first on top."""
    picture = figure(9, 1.5 + 0.4 * len(values))
    axes = picture.subplots()
    drawn = axes.barh(list(values), list(values.values()), color=[COLOURS.get(name[:4], PLAIN) for name in values])
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.margins(x=0.1)
    axes.set(title=title, xlabel=x)
    axes.invert_yaxis()
    return picture


def pictures(folder: Path, report: Path | None) -> dict[str, "Figure"]:
    """Every picture by its file's name."""
    x = "tokens that a step attends to"
    found = {
        "beside": groups(beside(folder), "Llama-2-7B, one sequence"),
        "context": lines(context_series(records(folder, "decode")), "Decoding", x, "tokens per second", True),
        "rows": lines(rows_series(records(folder, "rows")), "Cost of rows", "rows of a step", "steps of one row"),
        "speculation": lines(
            speculation_series(records(folder, "speculative")), "Speculation", "accepted a round", "speed-up"
        ),
        "quantization": bars(losses(records(folder, "quantization")), "Quantization", "loss of perplexity, percent"),
    }
    found |= {name: ladder(climb) for name, climb in ladders(records(folder, "ladder")).items()}
    if report:
        try:
            layers = layer_series(json.loads(report.read_text("utf-8")))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{report} is no report of quantize.py: {error}") from error
        found["layers"] = lines(layers, "Quantization, layer by layer", "block", "relative error")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 bad input (one line)."""
    ready()
    args = parse(argv)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures(args.benchmarks, args.report).items():
            save(picture, args.output, name)
            print(f"{args.output / name}.png, .svg")
    except KeyError as error:
        print(f"plots.py: error: a file lacks the column or field {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        return refuse("plots.py", error)
    return 0


if __name__ == "__main__":
    begin(parse)
    sys.exit(main())
