"""Write a checkpoint folder so that it appears whole or not at all: its shards, the hidden folder in which it is built,
and the lock on that folder.

Knows safetensors files and renames. Refuses to know what the tensors mean and how they are made.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from safetensors.torch import save_file
from torch import Tensor

from checkpoint import Weights, read_json

if os.name == "posix":
    import fcntl

SHARD_BYTES = 1 << 29
REPORT = "quantization_report.json"


class Writer:
    """Collects tensors and writes them to `folder` as safetensors shards of about SHARD_BYTES."""

    def __init__(self, folder: Path, replaced: set[str]) -> None:
        self.folder, self.replaced = folder, replaced  # names of the modules whose `.weight` is not copied
        self.waiting, self.size, self.shards = dict[str, Tensor](), 0, list[list[str]]()

    def add(self, name: str, tensor: Tensor) -> None:
        """ValueError for a tensor with NaN or infinite values."""
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite values: the checkpoint is damaged")
        self.waiting[name] = tensor.cpu().contiguous()
        self.size += tensor.nbytes
        if self.size >= SHARD_BYTES:
            self.flush()

    def copy(self, weights: Weights, prefix: str) -> None:
        """Take over the tensors of the checkpoint whose names begin with `prefix`, unchanged."""
        for name in weights:
            if name.startswith(prefix) and name.removesuffix(".weight") not in self.replaced:
                self.add(name, weights.slice(name)[:])

    def flush(self) -> None:
        if self.waiting:
            self.shards.append(list(self.waiting))
            save_file(self.waiting, self.folder / f"{len(self.shards)}.safetensors", metadata={"format": "pt"})
            self.waiting, self.size = {}, 0

    def finish(self) -> int:
        """Give the shards their final names, and write an index if there are several. Returns their size in bytes."""
        self.flush()
        count, where, total = len(self.shards), dict[str, str](), 0
        for i, names in enumerate(self.shards, 1):
            file = f"model-{i:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
            path = (self.folder / f"{i}.safetensors").rename(self.folder / file)
            path.chmod(0o644)  # safetensors makes files that only their owner can read
            total += path.stat().st_size
            where |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(self.folder / "model.safetensors.index.json", index)
        return total


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def check_output(output: Path, source: Path, force: bool) -> None:
    """ValueError for an output that must not be replaced: one that exists, or, with force, one that holds anything that
    this program did not write.
    """
    if any(output.samefile(folder) for folder in (source, *source.parents) if output.exists()):
        raise ValueError(f"{output} is or holds the checkpoint that is read, {source}: give another --output")
    if not os.path.lexists(output):
        return
    if not force:
        raise ValueError(f"{output} exists: give another --output, or --force to replace it")
    written = read_json(output / REPORT).get("files") if output.is_dir() else []
    found = [path.relative_to(output).as_posix() for path in output.rglob("*")] if output.is_dir() else ["a file"]
    if foreign := sorted(set(found) - set(written if isinstance(written, list) else [])):
        what = f"{output} holds {foreign[0]}" if output.is_dir() else f"{output} is no folder"
        raise ValueError(f"{what}, which this program did not write, and --force replaces only what it wrote")


def lock(folder: Path) -> TextIO:
    """Make `folder` and lock it until the result is closed or this process ends. ValueError when another process holds
    the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir()}
    if names and not {"lock"} <= names <= {"lock", "new", "old"}:
        raise ValueError(f"{folder} is in the way, and not this program's: move it, or give another --output")
    file = open(folder / "lock", "a")  # noqa: SIM115
    try:
        if os.name == "posix":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(file.fileno()).st_nlink:  # the process that held it has just removed it
            raise BlockingIOError
    except BlockingIOError as error:
        file.close()
        raise ValueError(f"another run is at work in {folder}: wait for it, or give another --output") from error
    return file


def settle(hidden: Path, output: Path) -> None:
    """Remove what an earlier run left in its hidden folder, or put it back if no other `output` is left."""
    if (hidden / "old").exists() and (hidden / "new").exists():  # a run was killed between the two renames
        (hidden / "old").rename(output)
    for name in ("new", "old"):
        shutil.rmtree(hidden / name, ignore_errors=True)


@contextlib.contextmanager
def complete_folder(output: Path, source: Path, force: bool) -> Iterator[Path]:
    """Give a new folder, which becomes `output` if the body succeeds. With force it may replace an older one.

    Until then the new folder lies beside `output`, in `.NAME.quantize.partial`, which belongs to the process that holds
    the lock in it. Between two renames the older folder lies there too; if the program is killed at that moment, the
    next run puts it back.
    """
    output, source = (Path(os.path.realpath(path)) for path in (output, source))  # follow a link to its folder
    hidden = output.with_name(f".{output.name}.quantize.partial")
    with lock(hidden):
        new, old = hidden / "new", hidden / "old"
        settle(hidden, output)
        try:
            check_output(output, source, force)
            new.mkdir()
            yield new
            try:
                check_output(output, source, force)
            except ValueError as error:  # keep both what has appeared there meanwhile and the result
                spare = next(path for i in range(1, 1000) if not (path := Path(f"{output}.{i}")).exists())
                new.rename(spare)
                raise ValueError(f"{error}; it came during the run, whose result is in {spare}") from error
            if output.exists():
                output.rename(old)
            new.rename(output)
        finally:
            settle(hidden, output)
            (hidden / "lock").unlink()
            with contextlib.suppress(OSError):  # another run may have locked it already
                hidden.rmdir()
