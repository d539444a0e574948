"""Tensor parallelism: 2 and 4 gloo processes compute what one does, each from its own slices."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import machine
import shapes
import tp
from engine import Engine
from formats import QuantConfig, Quantized, Scheme, pack
from linear import Int4Linear, Int8Linear, Linear, quantize_rtn
from model import KVCache
from sampling import SamplingParams
from tokenizer import Ids
from tp import TensorParallel

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}
PLAIN = {
    "llama": ("llama", {}),
    "bf16": ("llama", {"dtype": torch.bfloat16}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "few-heads": ("llama", {"num_key_value_heads": 1, "vocab_size": 203}),  # shared by the ranks; padded
}
QUANTIZED = {
    "int8": Scheme("pack-quantized", 8, -1, symmetric=True),
    "int4": Scheme("pack-quantized", 4, 16, symmetric=True),
    "int4-wide-groups": Scheme("pack-quantized", 4, 64, symmetric=True),  # o_proj's slices cut its groups
    "gptq": Scheme("gptq", 4, 16, symmetric=True),
    "few-heads-int8": Scheme("pack-quantized", 8, -1, symmetric=True),
}


def quantize(folder: Path, scheme: Scheme) -> None:
    """Rewrite every Linear of a layer in the folder, rounded to nearest."""
    tensors, out = load_file(folder / "model.safetensors"), {}
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight"):
            out[name] = weight
            continue
        q, scale = quantize_rtn(weight, scheme.bits, scheme.group_size, torch.float32)
        packed = pack(Quantized(q, scale, bits=scheme.bits), scheme)
        out |= {name.removesuffix("weight") + suffix: t.contiguous() for suffix, t in packed.items()}
    save_file(out, folder / "model.safetensors")
    path = folder / "config.json"
    rules = QuantConfig(((("lm_head",), None), (("Linear",), scheme)))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": rules.to_hf()}))


def results(folder: Path, group: TensorParallel) -> dict[str, torch.Tensor]:
    """Logits of a prefill and of cached decode steps, and generated ids, for batches of 1 and 3."""
    dtype = getattr(torch, json.loads((folder / "config.json").read_text())["dtype"])
    model, out = checkpoint.load(str(folder), tp=group, dtype=dtype), {}
    for B in (1, 3):
        tokens = torch.randint(0, 200, (B, 24), generator=torch.Generator().manual_seed(B))
        cache = KVCache(model.config, B, 32, CPU, dtype, group)
        positions = torch.arange(24).expand(B, -1)
        parts = [model(tokens[:, :20], positions[:, :20], cache, end=20)]
        parts += [model(tokens[:, i : i + 1], positions[:, i : i + 1], cache, end=32) for i in (20, 21, 22, 23)]
        out[f"logits {B}"] = torch.cat(parts, 1)
        engine = Engine(model, Ids(200), prefill_chunk=7)
        ids: list[list[int]] = [[] for _ in range(B)]
        sampling = SamplingParams(0.0 if B == 1 else 1.0, 6, 0.9)  # `shortlist` where words divide
        for piece in engine.generate(tokens[:, :9].tolist(), sampling, max_new_tokens=6, seed=3):
            ids[piece.row] += piece.ids
        out[f"ids {B}"] = torch.tensor(ids)
    return out


def worker(folders: list[str], out: Path) -> None:
    """What each process of a group runs; rank 0 and the last rank keep what they have."""
    group = tp.init(CPU)
    kept = {f"{folder} {name}": t for folder in folders for name, t in results(Path(folder), group).items()}
    x = torch.arange(6.0).view(1, 2, 3) + 100 * group.rank
    kept["gathered"], kept["reduced"] = group.all_gather(x), group.all_reduce(x.clone())
    kept["sent"] = group.broadcast(x.clone())
    if group.rank in (0, group.size - 1):
        save_file({k: v.contiguous() for k, v in kept.items()}, out / f"{group.rank}.safetensors")


def launch(n: int, *command: str, input: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """torchrun on a port that it picks itself."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), *command]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(run, capture_output=True, text=True, env=variables, cwd=ROOT, timeout=300, input=input)


@pytest.fixture(scope="module")
def folders(tiny) -> dict[str, Path]:
    made = {name: tiny(kind, **HEADS | changes)[0] for name, (kind, changes) in PLAIN.items()}
    for name, scheme in QUANTIZED.items():
        few = PLAIN["few-heads"][1] if name.startswith("few") else {}
        made[name] = tiny(**HEADS | few, attention_bias=True, intermediate_size=128)[0]
        quantize(made[name], scheme)
    return made


def runs(name: str, size: int) -> bool:
    """Processes take time: of 4 ranks, those folders whose slices differ most from those of 2."""
    return size == 2 or name in ("biases", "mixtral", "int8", "int4-wide-groups", "few-heads", "few-heads-int8")


@pytest.fixture(scope="module", params=[2, 4])
def group(request, folders, tmp_path_factory) -> tuple[int, list[dict[str, torch.Tensor]]]:
    """(size, what rank 0 and the last rank computed)."""
    out = tmp_path_factory.mktemp("ranks")
    chosen = [str(folders[name]) for name in folders if runs(name, request.param)]
    done = launch(request.param, str(Path(__file__)), str(out), *chosen)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, [load_file(out / f"{rank}.safetensors") for rank in (0, request.param - 1)]


@pytest.mark.parametrize("name", [*PLAIN, *QUANTIZED])
def test_a_group_computes_what_one_process_does(group, folders, name):
    size, ranks = group
    if not runs(name, size):
        pytest.skip("2 ranks cover this one")
    alone, tolerance = results(folders[name], TensorParallel()), 0.03 if name == "bf16" else 1e-4
    assert alone["logits 3"].std() > 0.1
    for got in ranks:  # every rank sees all logits and the same tokens
        for what, want in alone.items():
            if name == "bf16" and "ids" in what:
                continue  # sums in another order, rounded: two nearly equal logits may change places
            have = got[f"{folders[name]} {what}"]
            assert (have - want).abs().max() <= (tolerance if "logits" in what else 0), f"{what} on {size} ranks"


def test_collectives(group):
    size, ranks = group
    base = torch.arange(6.0).view(1, 2, 3)
    for got in ranks:
        assert torch.equal(got["gathered"], torch.cat([base + 100 * r for r in range(size)], -1))
        assert torch.equal(got["reduced"], size * base + 100 * sum(range(size)))
        assert torch.equal(got["sent"], base)


@pytest.mark.parametrize("name", [*PLAIN, *QUANTIZED])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_the_slices_of_the_whole(folders, name, size):
    """No processes: the loader alone. A row-parallel bias belongs to rank 0; a rank holds its share of the weights."""
    whole = checkpoint.load(str(folders[name]))
    ranks = [checkpoint.load(str(folders[name]), tp=TensorParallel(r, size)) for r in range(size)]
    expected = {"int8": Int8Linear, "few-heads-int8": Int8Linear, "gptq": Int4Linear}.get(
        name, Int4Linear if "int4" in name else Linear
    )
    for path, dim in (("mlp.down_proj", -1), ("self_attn.o_proj", -1)):
        if name == "mixtral" and path.startswith("mlp"):
            path = "mlp.experts.down_proj"
        parts = [r.layers[1].get_submodule(path) for r in ranks]
        assert all(type(p) is expected for p in parts)
        full = whole.layers[1].get_submodule(path)
        torch.testing.assert_close(
            torch.cat([p.dequantize(torch.float32) for p in parts], dim), full.dequantize(torch.float32)
        )
        if full.bias is not None:
            assert torch.equal(parts[0].bias, full.bias) and not any(p.bias.any() for p in parts[1:])
    q = 8 * whole.config.head_dim // size  # rows of q in a rank's qkv_proj
    rows = torch.cat([r.layers[0].self_attn.qkv_proj.dequantize(torch.float32)[:q] for r in ranks])
    torch.testing.assert_close(rows, whole.layers[0].self_attn.qkv_proj.dequantize(torch.float32)[: q * size])
    for table in ("embed_tokens", "lm_head"):
        rows = torch.cat([r.get_submodule(table).weight for r in ranks])
        wanted = whole.get_submodule(table).weight
        assert torch.equal(rows[: len(wanted)], wanted) and not rows[len(wanted) :].any()


@pytest.mark.parametrize(
    "changes, line",
    [
        (
            {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
            "num_attention_heads = 3 cannot .* it can over 1, 3",
        ),
        (
            {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
            "num_attention_heads = 9 cannot be split over 2 ranks",
        ),
        ({"intermediate_size": 111}, "intermediate_size = 111 cannot be split over 2 ranks; it can over 1, 3, 37"),
    ],
)
def test_sizes_that_do_not_divide(tiny, changes, line):
    folder = tiny(**changes)[0]
    with pytest.raises(ValueError, match=line):
        checkpoint.load(str(folder), tp=TensorParallel(1, 2))


@pytest.mark.parametrize("shape", [False, True])
def test_a_rank_needs_memory_for_its_share(tiny, monkeypatch, shape):
    """On a device of its own: ranks on a CPU share the memory."""
    weights = shapes.shape_config("tiny") if shape else tiny()[0]
    whole = checkpoint.random_model(weights, dtype=torch.float32) if shape else checkpoint.load(str(weights))
    need = sum(p.nbytes for p in whole.parameters())
    monkeypatch.setattr(machine, "free_bytes", lambda device: need - 1)
    machine.check_weights_fit(weights, torch.float32, torch.device("cuda"), TensorParallel(0, 2))
    for device, group in (("cuda", TensorParallel()), ("cpu", TensorParallel(0, 2))):
        with pytest.raises(ValueError, match=f"on {device} and"):
            machine.check_weights_fit(weights, torch.float32, torch.device(device), group)


def test_a_rank_waits_for_rank_0_only_so_long(monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        tp.reach(*server.getsockname(), seconds=0)
        port = server.getsockname()[1]
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tp, "reach", partial(tp.reach, seconds=0))
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but the ranks do not meet: .*refused; start with torchrun"):
        tp.init(CPU)
    assert capfd.readouterr() == ("", "")


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone, x = tp.init(CPU), torch.ones(2, 3)
    assert alone == TensorParallel(0, 1)
    assert alone.all_reduce(x) is x and alone.all_gather(x) is x and alone.broadcast(x) is x


def add_tokenizer(folder: Path) -> None:
    """256 bytes after BOS and EOS, in `tokenizers`' format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *bytes_])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


@pytest.mark.parametrize("extra", ["--compile", "--compile --draft ngram --num-draft-tokens 2"])
def test_the_command_under_torchrun_prints_the_same_text_once(tiny, extra):
    folder = tiny(vocab_size=260)[0]
    add_tokenizer(folder)
    command = ["generate.py", "--checkpoint", str(folder), "--prompt", "Once upon", "--max-new-tokens", "30"]
    command += ["--device", "cpu", "--seed", "5", "--json", "--ignore-eos", *extra.split()]
    alone = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    both = launch(2, *command)
    assert alone.returncode == both.returncode == 0, both.stderr[-3000:]
    (want,), (got,) = (list(map(json.loads, done.stdout.splitlines())) for done in (alone, both))
    assert len(want["ids"]) == 30 and want["text"]
    assert {k: got[k] for k in ("text", "ids", "prompt_ids", "stop_reason")} == {
        k: want[k] for k in ("text", "ids", "prompt_ids", "stop_reason")
    }


def lines_of(done) -> list[str]:
    """What our program wrote on standard error; torchrun's own report of a failure is not ours."""
    return [line for line in done.stderr.splitlines() if line.startswith("generate.py: error")]


def test_rank_0_alone_reads_standard_input(tiny):
    folder = tiny(vocab_size=260)[0]
    add_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    base = ["generate.py", "--checkpoint", str(folder), "--device", "cpu", "--max-new-tokens", "6", "--ignore-eos"]
    for more, text in ((["--prompt", "-"], "Once upon"), (["--chat"], "hello\n\nhow are you\n")):
        command = [*base, *more, "--seed", "5"]
        alone = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, input=text)
        both = launch(2, *command, input=text)
        assert alone.returncode == both.returncode == 0, both.stderr[-3000:]
        assert both.stdout == alone.stdout and len(alone.stdout) > 6


def test_one_fault_is_told_once(tiny, tmp_path):
    """By one rank, whether argparse, the loader or a comparison of the ranks' checkpoints finds it."""
    folders = [tiny(vocab_size=260, hidden_size=h)[0] for h in (48, 64)]
    for folder in folders:
        add_tokenizer(folder)
    for argv, match in (
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--checkpoint", str(tmp_path / "nowhere")], "no such folder"),
    ):
        done = launch(2, "generate.py", "--device", "cpu", *argv)
        assert done.returncode != 0 and len(lines_of(done)) == 1 and match in lines_of(done)[0]
    script = tmp_path / "differ.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import generate\n"
        f"mine = {list(map(str, folders))}[int(os.environ['RANK'])]\n"
        "sys.exit(generate.main(['--device', 'cpu', '--checkpoint', mine]))\n"
    )
    done = launch(2, str(script))
    assert len(lines_of(done)) == 1 and "rank 1 has another checkpoint than rank 0" in lines_of(done)[0]
    assert "Traceback" not in done.stderr.split("elastic")[0]


def test_a_rank_that_is_killed_ends_the_run_without_tracebacks_of_ours(tiny, tmp_path):
    folder = tiny(vocab_size=260)[0]
    add_tokenizer(folder)
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import engine, generate\n"
        "real = engine.Engine.decode\n"
        "def decode(self, position, structure):\n"
        "    if os.environ['RANK'] == '1' and position > 40:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, position, structure)\n"
        "engine.Engine.decode = decode\n"
        f"sys.exit(generate.main(['--device', 'cpu', '--checkpoint', {str(folder)!r}, '--prompt', 'Once']))\n"
    )
    done = launch(2, str(script))
    assert done.returncode != 0 and len(lines_of(done)) <= 1  # torchrun may end the survivor first
    assert 'File "' not in done.stderr or 'generate.py", line' not in done.stderr


if __name__ == "__main__":
    worker(sys.argv[2:], Path(sys.argv[1]))
