"""The README holds today: its numbers come from the tree, its commands run.

    python tests/test_readme.py   # brings the generated parts (line counts, measurements) up to date

A command that needs a GPU, the Hub, other packages or torchrun says so in the README (`# needs: gpu`); MARKED lists
those. The others run here, in a copy of the project.
"""

import csv
import json
import re
import shutil
import subprocess
import sys

import pytest
from test_repo import FILES, ROOT, STORY, code_lines

sys.path.insert(0, str(ROOT))  # also when run as a program

import architectures  # noqa: E402
import shapes  # noqa: E402

README, TABLES = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
SOURCE_LINE = re.compile(r"(?m)^([a-z_]+(?:/[a-z0-9_]+)?\.py)( +\d+)(?=  )")
CPU_BUILD = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
INSTALLS = ["pip install -e .", 'pip install -e ".[test]"']  # what a fresh environment runs first; see .ci/run
INTERPRETER = 'pip install -e ".[interpreter]"'  # beside PyTorch's CPU build
THE_TESTS = "python -m pytest"  # this suite itself
CPU = "AMD EPYC (2 threads)"
MARKED = {  # command (its first words) -> what it needs
    "python generate.py --checkpoint Qwen/Qwen3-0.6B": "hub",
    "torchrun --nproc-per-node 2 generate.py": "torchrun",
    "python scripts/benchmark.py --shape llama-2-7b": "gpu",
    "python scripts/evaluate.py checkpoints/tales --tasks": "packages",
    "python scripts/plots.py": "packages",
    "python scripts/ladder.py": "time",
}


# -- the generated parts ----------------


def records(name):
    path = ROOT / "benchmarks" / name
    return list(csv.DictReader(path.read_text("utf-8").splitlines())) if path.is_file() else []


def table(head, rows, left):
    """A Markdown table whose first `left` columns are text."""
    if not rows:
        return "No measurements are recorded yet.\n"
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rows))


def latest(rows, *names):
    """The last row of every setting."""
    names = ("device", "tp", "shape", "mode", "group_size", "dtype", "kernels", *names)
    return list({tuple(row[name] for name in names): row for row in rows}.values())


def start(row):
    """The first columns: device, shape, weights."""
    device = row["device"] if row["tp"] == "1" else f"{row['tp']} x {row['device']}"
    formats, group = {"bf16": row["dtype"], "checkpoint": "as stored"}, row["group_size"]
    groups = f" g{group}" if group not in ("", "-1") and row["mode"] in ("int8", "int4") else ""
    return [device, row["shape"], formats.get(row["mode"], row["mode"] + groups)]


def by_device(head, rows, left):
    """One table for each device: rows begin with it."""
    parts = []
    for device in dict.fromkeys(row[0] for row in rows):
        parts.append(f"{device}:\n\n" + table(head[1:], [row[1:] for row in rows if row[0] == device], left - 1))
    return "\n" + "\n".join(parts) + "\n" if parts else table(head, rows, left)


def short_runs():
    """One sequence, 5 prompt tokens, 200 new ones, in a cache that is no larger than it need be: the newest of each."""
    setting = {"batch": "1", "prompt_len": "5", "new_tokens": "200", "cache_len": "256"}
    return latest([r for r in records("decode.csv") if setting.items() <= r.items()])


def decode_table():
    head = ["device", "shape", "weights", "kernels", "tok/s", "ms/token", "GB/token", "GB/s", "MBU", "commit"]
    body = [
        [*start(r), r["kernels"], f"{float(r['decode_tok_s']):,.1f}", f"{float(r['tpot_ms']):.2f}"]
        + [f"{int(r['bytes_per_token']) / 1e9:.2f}", f"{float(r['read_gb_s']):,.0f}", f"{float(r['mbu']):.0%}"]
        + [r["commit"]]
        for r in short_runs()
    ]
    return by_device(head, body, 4)


def first_table():
    """The README's own: six rows, beside others."""
    shown = ("llama-2-7b", "triton"), ("SmolLM2-135M-Instruct", "cpu compiled")
    runs = [r for r in short_runs() if (r["shape"], r["kernels"]) in shown]
    own = {(r["device"], r["tp"], r["mode"]): r for r in runs if r["mode"] != "int8" or not r["group_size"]}
    others = {(r["system"], r["device"], r["technique"]): f"{float(r['tok_s']):,.0f}" for r in records("others.csv")}

    def rate(device, tp, mode):
        row = own[device, tp, mode]
        return f"**{float(row['decode_tok_s']):,.0f}** ({float(row['mbu']):.0%})"

    def beside(technique, device="NVIDIA H200"):
        return [others.get((system, device, technique), "") for system in ("gpt-fast", "llama.cpp")]

    drafted = [
        r
        for r in records("speculative.csv")
        if (r["shape"], r["device"], r["mode"], r["acceptance"]) == ("llama-2-7b", "NVIDIA H200", "bf16", "0.8")
    ][-1]
    rows = [
        ["bf16 (llama.cpp: F16)", rate("NVIDIA H200", "1", "bf16"), *beside("compiled")],
        ["int8 (Q8_0)", rate("NVIDIA H200", "1", "int8"), *beside("int8")],
        ["int4 (Q4_0)", rate("NVIDIA H200", "1", "int4"), *beside("int4")],
        ["bf16 drafted by its own int4 copy, 80% accepted", f"**{float(drafted['tok_s']):,.0f}**", "", ""],
        ["bf16 on two H200s", rate("NVIDIA H200", "2", "bf16"), *beside("compiled", "2 x NVIDIA H200")],
        ["SmolLM2-135M in bf16 on two CPU cores, `--compile`", rate(CPU, "1", "checkpoint"), *beside("compiled", CPU)],
    ]
    return table(["tokens per second, Llama-2-7B's shape, one H200", "this project", "gpt-fast", "llama.cpp"], rows, 1)


def memory_table():
    """GB of weights of public shapes, int4 in groups of 128, and of a cache for 1,000 tokens."""
    import torch

    from model import Transformer

    def gb(shape, bits):
        with torch.device("meta"):
            model = Transformer(shapes.shape_config(shape))
        linears = sum(p.numel() for name, p in model.layers.named_parameters() if name.endswith("_proj.weight"))
        total = sum(p.numel() for name, p in model.named_parameters())
        total -= model.lm_head.weight.numel() * model.config.tie_word_embeddings
        return (linears * (bits + (0.125 if bits == 4 else 0)) + (total - linears) * 16) / 8e9

    def cache(shape):
        c = shapes.shape_config(shape)
        return 4e-6 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim

    names = ("llama-3.2-1b", "llama-3.1-8b", "qwen3-32b", "llama-3.1-70b")
    rows = [[name, *(f"{gb(name, bits):.1f}" for bits in (16, 8, 4)), f"{cache(name):.2f}"] for name in names]
    return table(["", "bf16", "int8", "int4", "1,000 tokens"], rows, 1)


def prefill_table():
    head = [
        "device",
        "shape",
        "weights",
        "prompt",
        "compiled",
        "ms",
        "tok/s",
        "MFU",
        "transformers, bf16, ms",
        "commit",
    ]
    body = [
        [*start(r), r["prompt_len"], "yes" if r["compiled_prefill"] == "True" else "no", f"{float(r['ms']):.1f}"]
        + [f"{float(r['prefill_tok_s']):,.0f}", f"{float(r['mfu']):.0%}"]
        + [f"{float(r['transformers_ms']):.1f}" if r["transformers_ms"] else "", r["commit"]]
        for r in latest(records("prefill.csv"), "batch", "prompt_len", "compiled_prefill")
    ]
    return by_device(head, body, 3)


def ladder_table():
    """Every climb, newest commit: what each rung gives."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import plots

    names = "rung tok_s speedup ttft_ms mbu memory_gb perplexity mean_accepted".split()
    forms = dict(zip(names[1:], (",.1f", ".2f", ".0f", ".0%", ".2f", ".2f", ".2f")))
    newest = {name: climb["commit"] for name, climb in plots.ladders(records("ladder.csv")).items()}
    body = [
        [f"{r['model']} on {plots.several(int(r['tp']))}{r['device']}", r["rung"]]
        + [format(float(r[name]), form) if r[name] else "" for name, form in forms.items()]
        + [r["commit"]]
        for r in records("ladder.csv")
        if r["commit"] in newest.values()
    ]
    head = ["", "rung", "tok/s", "speed-up", "TTFT ms", "MBU", "memory GB", "perplexity", "accepted", "commit"]
    return by_device(head, body, 2)


def rows_table():
    """Milliseconds of a one-row step, and the cost of more rows in units of it."""
    steps = {}
    for row in records("rows.csv"):
        found = steps.setdefault((*start(row), row["kernels"]), {})
        if row["rows"] == "1":  # a new run: its ratios are to its own one-row step
            found.clear()
        found[row["rows"]] = row
    more = [str(m) for m in range(2, 17) if any(str(m) in found for found in steps.values())]
    head = ["device", "shape", "weights", "kernels", "1 row", *(f"{m} rows" for m in more), "commit"]
    body = [
        [*setting, f"{float(found['1']['ms']):.2f} ms"]
        + [f"{float(found[m]['ratio']):.2f}" if m in found else "" for m in more]
        + [found["1"]["commit"]]
        for setting, found in steps.items()
    ]
    return by_device(head, body, 4)


def contexts_table():
    """Milliseconds of a step and the share of the bandwidth, by position; where transformers ran too, its step with
    a static cache, and ours in that run.
    """
    rows = records("contexts.csv")
    rows = latest([r for r in rows if not r["transformers_ms"]], "position") + [r for r in rows if r["transformers_ms"]]
    positions = sorted({int(r["position"]) for r in rows})
    lines = {}
    for r in rows:
        name = [*start(r), r["commit"]]
        cell = f"{float(r['ms']):.3f} ({float(r['mbu']):.0%})"
        if r["transformers_ms"]:
            name[2], cell = (
                f"{name[2]}, transformers (ours)",
                f"{float(r['transformers_ms']):.3f} ({float(r['ms']):.3f})",
            )
        lines.setdefault(tuple(name), {})[int(r["position"])] = cell
    body = [[*line[:3], *(found.get(p, "") for p in positions), line[3]] for line, found in lines.items()]
    return by_device(["device", "shape", "weights", *(f"{p:,}" for p in positions), "commit"], body, 3)


def speculation_table():
    """Simulated acceptance on random weights, real acceptance on the embedded pair."""
    names = ("draft", "num_draft_tokens", "acceptance", "temperature")
    head = ["device", "target", "weights", "draft", "K", "P", "accepted", "tok/s", "speed-up", "ideal", "of ideal"]
    body = [
        [*start(r), r["draft"], r["num_draft_tokens"], r["acceptance"], f"{float(r['mean_accepted']):.2f}"]
        + [f"{float(r['tok_s']):,.1f}", f"{float(r['speedup']):.2f}"]
        + [f"{float(r['ideal']):.2f}" if r["ideal"] else "", f"{float(r['efficiency']):.0%}" if r["ideal"] else ""]
        + [f"{float(r['ideal_bytes']):.2f}" if r["ideal"] else "", r["commit"]]
        for r in latest(records("speculative.csv"), *names)
    ]
    return by_device([*head, "ideal by bytes", "commit"], body, 6)


def acceptance_table():
    """What drafters' proposals come to on a hundred real prompts."""
    head = ["model", "dtype", "draft", "prompts", "new tokens", "of K", "rounds", "accepted a round", "commit"]
    names = ("new_tokens", "num_draft_tokens", "rounds", "mean_accepted", "commit")
    body = [
        [r["model"], r["dtype"], r["draft"], f"{r['prompts']} {r['kind']}", *(r[name] for name in names)]
        for r in {(r["model"], r["device"], r["draft"], r["kind"]): r for r in records("acceptance.csv")}.values()
    ]
    return table(head, body, 4)


def quantization_table():
    """What quantizing the embedded model costs in held-out perplexity, here and by llm-compressor."""
    rows = records("quantization.csv")
    head = ["weights", "act-order", "clip search", "by", "perplexity", "loss", "KL", "KL 99%", "same first"]
    yes = {"True": "yes", "False": "no"}
    body = [
        [r["mode"] + (f" g{r['group_size']}" if r["group_size"] not in ("", "-1") else "")]
        + [yes.get(r[name], "") for name in ("act_order", "clip_search")]
        + [{"none": ""}.get(r["tool"], r["tool"]), r["perplexity"], f"{float(r['loss_percent']):.2f}%"]
        + [r["kl_mean"], r["kl_p99"], f"{float(r['top1_agreement']):.1%}" if r["top1_agreement"] else ""]
        for r in rows
    ]
    return table(head, body, 4)


def placed(text, name, part):
    """The text with `part` between <!-- name --> and the next <!-- end -->."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    assert len(pattern.findall(text)) == 1, name
    return pattern.sub(lambda m: m[1] + part + m[2], text)


def rendered():
    """Both files with line counts and measurements as they are in the tree."""
    text, tables = README.read_text("utf-8"), TABLES.read_text("utf-8")
    story = sum(code_lines(ROOT / name) for name in STORY if exists(name))
    text, found = re.subn(r"\d+ lines of code(?= in `model\.py`)", f"{story} lines of code", text)
    assert found == 1
    text = SOURCE_LINE.sub(lambda m: f"{m[1]}{code_lines(ROOT / m[1]):>{len(m[2])}}" if exists(m[1]) else m[0], text)
    scripts = sum(code_lines(path) for path in FILES if path.parent.name == "scripts")
    text, found = re.subn(r"(?m)^(scripts/ +)\d+", rf"\g<1>{scripts}", text)
    assert found == 1
    types = ", ".join(f"`{name}`" for name in architectures.SUPPORTED)
    text, found = re.subn(r"(?<=the `model_type`s ).*?(?=\.)", types, text)
    assert found == 1
    text = placed(placed(text, "first", first_table()), "memory", memory_table())
    made = {"decode": decode_table, "prefill": prefill_table, "rows": rows_table, "quantization": quantization_table}
    made |= {"ladder": ladder_table, "speculative": speculation_table, "acceptance": acceptance_table}
    made["contexts"] = contexts_table
    for name, make in made.items():
        tables = placed(tables, f"benchmarks/{name}.csv", make())
    return text, tables


def exists(name):
    return (ROOT / name).is_file()


def test_generated_parts_are_up_to_date():
    assert (README.read_text("utf-8"), TABLES.read_text("utf-8")) == rendered(), "run: python tests/test_readme.py"


def test_one_can_read_it():
    assert len(README.read_text("utf-8").splitlines()) <= 200


def test_qualities_are_measured():
    """Every KL, loss and agreement in the tables of quality.csv, by rounding one of its numbers."""
    names = ("loss_percent", "kl_mean", "kl_99", "top1_agreement")
    known = [float(row[name]) for row in records("quality.csv") for name in names if row[name]]
    section = TABLES.read_text("utf-8").partition("## Quantization\n")[2].partition("### The embedded model")[0]
    cells = re.findall(r"(?<=\| )([+-]?\d+\.\d+)(%?)(?= \|)", section)
    assert len(cells) > 150
    for number, percent in cells:
        digits = len(number.partition(".")[2])
        values = [v * 100 for v in known] if percent and digits == 1 else known
        bits = number in ("8.5", "8.25", "8.03", "4.5", "4.25", "4.125")
        assert bits or any(f"{v:.{digits}f}" == f"{float(number):.{digits}f}" for v in values), number + percent


def test_every_file_is_in_the_tree():
    listed = [name for name, _ in SOURCE_LINE.findall(README.read_text("utf-8"))]
    assert sorted(listed) == sorted(
        path.relative_to(ROOT).as_posix() for path in FILES if path.parent.name != "scripts"
    )


def test_the_first_picture_shows_what_was_measured():
    """Numbers and names of beside.svg, whose words are words, against those that plots.py would draw."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import plots

    words = re.findall(r">([^<>]+)</text>", (ROOT / "benchmarks" / "beside.svg").read_text("utf-8"))
    for system, rates in plots.beside(ROOT / "benchmarks").items():
        assert system in words
        for technique, rate in rates.items():
            assert plots.TECHNIQUES[technique] in words
            assert (f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}") in words


def test_the_second_picture_shows_the_ladder_on_a_cpu():
    import plots

    words = re.findall(r">([^<>]+)</text>", (ROOT / "benchmarks" / "ladder-cpu.svg").read_text("utf-8"))
    [climb] = [c for c in plots.ladders(records("ladder.csv")).values() if c["device"] == CPU]
    for rung in climb["rungs"]:
        assert rung["rung"] in words and f"{rung['tok_s']:,.1f} ({rung['speedup']:.2f}x)" in words


# -- the commands ----------------


def commands():
    """(command, what it needs or "") of every line of every ```sh block."""
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
        for line in block.splitlines()
    ]
    found = []
    for line in lines:
        command, _, comment = line.partition("  # ")
        if command.strip():
            need = re.search(r"needs: (gpu|hub|torchrun|packages|time)", comment)
            found += [(part.strip(), need[1] if need else "") for part in command.split("&&")]
    return found


def test_marked_commands_are_known():
    marked = {command: need for command, need in commands() if need}
    unknown = {c: need for c, need in marked.items() if not any(c.startswith(k) and MARKED[k] == need for k in MARKED)}
    assert not unknown
    assert all(any(c.startswith(k) for c in marked) for k in MARKED), "MARKED names a command that is not there"


def test_ci_installs_and_tests_as_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text("utf-8").replace("pip install --quiet", "pip install")
    assert INSTALLS[1] in script
    assert INTERPRETER in script and INTERPRETER in README.read_text("utf-8")
    lists = dict(re.findall(r"(?ms)^(\w+) = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text("utf-8")))
    holders = {name for name, packages in lists.items() if re.search(r'"triton\b[^.]', packages)}
    assert holders == {"interpreter"}, "an extra that pins Triton may replace the PyTorch that is installed"
    assert script.rstrip().endswith(THE_TESTS)
    assert {c for c, _ in commands() if c.startswith("pip")} == {CPU_BUILD, *INSTALLS}


RUN = [c for c, need in commands() if not need and c not in (CPU_BUILD, *INSTALLS, THE_TESTS)]
EXAMPLES = re.findall(
    r"```python\n(?!# loader\.py)(.*?)```", README.read_text("utf-8"), re.DOTALL
)  # test_parts.py: the loader
DRIVER = """
import io, json, runpy, shlex, sys, traceback
from contextlib import redirect_stderr, redirect_stdout

sys.path.insert(0, "")
results = {}
for command in json.loads(sys.argv[1]):
    out, err, status = io.StringIO(), io.StringIO(), 0
    words = shlex.split(command) if command.startswith("python ") else []
    sys.argv, sys.stdin = words[1:], io.StringIO()
    sys.path[0] = words[1].rpartition("/")[0] if words else ""
    try:
        with redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(words[1], run_name="__main__") if words else exec(command, {})
    except SystemExit as end:
        status = end.code or 0
    except Exception:
        status = traceback.format_exc()
    results[command] = [status, out.getvalue(), err.getvalue()]
with open("results.json", "w") as file:
    json.dump(results, file)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Status, output and errors of every command, run one after the other in a copy of the project as a visitor gets
    it, by one interpreter (importing PyTorch takes longer than most of them).
    """
    copy = tmp_path_factory.mktemp("readme") / "copy"
    hidden = shutil.ignore_patterns(".*", "__pycache__", "local", "runs", "*.egg-info", "tests")
    shutil.copytree(ROOT, copy, ignore=hidden)
    argv = [sys.executable, "-c", DRIVER, json.dumps([*RUN, *EXAMPLES])]
    subprocess.run(argv, cwd=copy, check=True, timeout=600, stdout=subprocess.DEVNULL)
    return json.loads((copy / "results.json").read_text("utf-8"))


@pytest.mark.parametrize("command", [*RUN, *EXAMPLES])
def test_command(results, command):
    status, out, err = results[command]
    assert status == 0, err
    assert out.strip() or "--selftest" in command  # a program of its own


def test_there_are_commands():
    assert len(RUN) > 5
    assert len(EXAMPLES) == 1


if __name__ == "__main__":
    for file, content in zip((README, TABLES), rendered()):
        file.write_text(content, "utf-8")
