"""Every program: what it answers before PyTorch is imported, and what Ctrl-C does until then."""

import ast
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import command_line
import engine
import generate
import model
from sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    "benchmark",
    "contexts",
    "download",
    "evaluate",
    "golden",
    "ladder",
    "machine_code",
    "plots",
    "quantize_shape",
]
SCRIPTS += ["selftest", "train_demo"]
PROGRAMS = ["generate.py", "quantize.py", *(f"scripts/{name}.py" for name in SCRIPTS)]
REFUSED = {  # arguments that no machine could take
    "generate.py": ["--max-new-tokens 0", "--temperature -1", "--top-k -1", "--top-p 0", "--min-p 1", "--no-such-flag"],
    "quantize.py": ["--mode int4 --rows 0", "--mode int5", ""],
    "scripts/benchmark.py": ["--shape tiny --batch 0", "--shape tiny --rows-table 1,17", ""],
    "scripts/contexts.py": ["--shape tiny --positions 5,0", "--mode int5 --shape tiny", ""],
    "scripts/evaluate.py": ["--row-length 3"],
    "scripts/golden.py": ["no-such-mode"],
    "scripts/ladder.py": ["--new-tokens 1", "--simulated-acceptance 2"],
    "scripts/plots.py": ["--no-such-flag"],
    "scripts/machine_code.py": ["--sm 70", "--quick --write"],
    "scripts/quantize_shape.py": ["--mode int4"],
    "scripts/selftest.py": ["--num-draft-tokens 99"],
    "scripts/download.py": [""],
    "scripts/train_demo.py": [],  # it uses nothing of ours: argparse's own error, of two lines
}


@pytest.fixture
def environment(tmp_path):
    """environment(source) -> variables of a process that finds this source in the place of PyTorch."""

    def make(source):
        (tmp_path / "torch.py").write_text(source)
        return os.environ | {"PYTHONPATH": str(tmp_path)}

    return make


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_refusals_answer_without_pytorch(program, environment):
    env = environment("raise SystemExit('PyTorch was imported')")
    run = {"capture_output": True, "text": True, "cwd": ROOT, "env": env}
    done = subprocess.run([sys.executable, program, "--help"], **run)
    assert done.returncode == 0 and "usage:" in done.stdout and done.stderr == ""
    for argv in REFUSED[program]:
        done = subprocess.run([sys.executable, program, *argv.split()], **run)
        assert done.returncode == 2 and done.stdout == "", argv
        assert done.stderr.startswith(f"{Path(program).name.replace('selftest', 'generate')}: error: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("program", ["generate.py", "quantize.py --mode int8", "scripts/benchmark.py --shape tiny"])
def test_ctrl_c_during_the_imports_is_quiet(program, environment):
    env = environment("import signal\nprint('importing', flush=True)\nsignal.pause()")
    command, pipes = [sys.executable, *program.split()], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def listen():  # also where this suite runs in a shell's background, which ignores Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(command, cwd=ROOT, env=env, preexec_fn=listen, **pipes) as process:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGINT, b"", b"")


def test_an_ignored_ctrl_c_stays_ignored():
    """A shell starts its background jobs so."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        command_line.begin(lambda argv: None)
        command_line.ready()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_an_exception_again_after_the_imports():
    before = signal.getsignal(signal.SIGINT)
    command_line.begin(lambda argv: None)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    command_line.ready()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_the_constants_of_the_command_are_those_of_the_engine():
    assert command_line.DEFAULT_CHECKPOINT == engine.DEFAULT_CHECKPOINT
    assert tuple(engine.DTYPES) == command_line.DTYPES
    assert model.DECODE_TOKENS == command_line.MAX_ROWS


def test_a_rank_that_nobody_answers_tells_of_its_end(monkeypatch, capfd):
    """In its own line, and without those in which PyTorch's store says that it found nobody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    assert command_line.first_to_fail()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_is_explained(program):
    calls = [n for n in ast.walk(ast.parse((ROOT / program).read_text("utf-8"))) if isinstance(n, ast.Call)]
    flags = [n for n in calls if ast.unparse(n.func).endswith(".add_argument")]
    silent = [ast.unparse(n.args[0]) for n in flags if not any(k.arg == "help" for k in n.keywords)]
    assert not silent


@pytest.mark.parametrize("name", generate.SAMPLING)
@pytest.mark.parametrize("text", ["-1", "-0.5", "0", "0.0005", "0.001", "0.5", "1", "1.0", "1.5", "200", "inf", "nan"])
def test_the_command_refuses_what_sampling_refuses(name, text):
    kind, fits, *_ = generate.SAMPLING[name]
    try:
        value = kind(text)
    except ValueError:
        return  # no number of that kind
    try:
        SamplingParams(**{name: value})
    except ValueError as error:
        assert not fits(value) and generate.SAMPLING[name][2] in str(error)
    else:
        assert fits(value)


MODULES = """
import sys
import torch
known = set(sys.modules)
import architectures, checkpoint, command_line, decode_kernels, engine, formats, generate, gptq, linear, model, quantize
import sampling, speculative, tokenizer, tp
heavy = ("torch._dynamo", "torch._inductor", "sympy", "triton", "transformers")
print([name for name in heavy if name in sys.modules and name not in known])
"""


def test_no_module_imports_a_compiler():
    done = subprocess.run([sys.executable, "-c", MODULES], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("own", "files", "granted"),
    [
        ("0::/a/b\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "250000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),  # half a processor
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, None),  # more than there are
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("0::/../..\n", {"cpu.max": "nonsense\n"}, None),
        ("8:pids:/a\n", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        (None, {}, None),  # no such system
    ],
)
def test_the_quota_of_a_container(tmp_path, monkeypatch, own, files, granted):
    monkeypatch.setattr(command_line.sys, "platform", "linux")
    monkeypatch.setattr(command_line.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(own)
    assert command_line.processors_granted(tmp_path, tmp_path / "own") == granted
