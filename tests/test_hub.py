"""`--checkpoint org/name[@revision]`: the Hub's behaviour, played by a local HTTP server through HF_ENDPOINT.

Each look-up runs in its own process because huggingface_hub reads the environment when it is imported.
"""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHA = "0123456789abcdef0123456789abcdef01234567"
WANTED = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256))
    * (24 << 12),  # 24 MiB: huggingface_hub keeps what broke off in chunks of 10 MiB
    "tokenizer.model": b"sentencepiece",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"terms",
}
UNWANTED = {"pytorch_model.bin": b"pickle", "model.gguf": b"gguf", "original/params.json": b"{}", "x.pth": b"pickle"}
FILES = WANTED | UNWANTED | {"consolidated.safetensors": b"a second copy"}
RESOLVE = """
import sys
from checkpoint import resolve
for text in sys.argv[1:]:
    try:
        print(resolve(text))
    except FileNotFoundError as error:
        print("error:", error)
"""


class Hub(http.server.ThreadingHTTPServer):
    """Repositories acme/{tiny,gated,private}; `cut` large files break off in the middle; `requests`: what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.cut = 0
        self.broken = False
        self.requests: list[tuple[str, str, str | None]] = []


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        token = self.headers.get("Authorization")
        authorized = token == "Bearer hf_good"
        if token and not authorized:
            self.reply(401, X_Error_Message="Invalid credentials in Authorization header")
        elif authorized and repo == "acme/missing":
            self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif not repo.startswith("acme/"):
            self.reply(404)
        elif repo == "acme/missing" or (repo == "acme/private" and not authorized):
            self.reply(401, X_Error_Message="Invalid username or password.")  # the Hub does not tell which of the two
        elif parts[0] == "api" and parts[4] == "revision":
            known = parts[5] in ("main", "v1", SHA)
            info = {"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in FILES]}
            self.reply(200, json.dumps(info).encode()) if known else self.reply(404, X_Error_Code="RevisionNotFound")
        elif parts[0] == "api":
            tree = [{"type": "file", "path": n, "size": len(b), "oid": etag(b)} for n, b in FILES.items()]
            self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif repo == "acme/gated" and not authorized:
            self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="Access to model acme/gated is restricted.")
        else:
            self.file(FILES["/".join(parts[4:])])

    def file(self, body):
        start = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") :].split("-")[0])
        rest = body[start:]
        headers = {
            "ETag": f'"{etag(body)}"',
            "X_Repo_Commit": SHA,
            "Content_Length": len(rest),
            "Accept_Ranges": "bytes",
        }
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if self.command == "HEAD" or len(body) < 1 << 20:
            self.reply(206 if start else 200, rest, **headers)
        elif self.server.broken and start:
            self.reply(500)
        elif self.server.cut:
            self.server.cut -= 1
            self.reply(200, rest[: len(rest) // 2], **headers)
            self.close_connection = True
        else:
            self.reply(206 if start else 200, rest, **headers)


def etag(body):
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def resolve(hub, tmp_path):
    """resolve(*texts, **environment) -> one printed line per text, from one process with this environment."""

    def run(*texts, command=("-c", RESOLVE), **environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        kept |= {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
        kept |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        (tmp_path / "cwd").mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, *command, *texts],
            cwd=tmp_path / "cwd",
            env=kept | environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert "Traceback" not in done.stderr, done.stderr
        if done.returncode:
            return [done.stderr.splitlines()[-1]]
        assert len(done.stdout.splitlines()) == len(texts), done.stdout  # an error is one line, always
        return done.stdout.splitlines()

    return run


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_downloads_only_what_a_checkpoint_needs(hub, resolve):
    main, tag, commit = resolve("acme/tiny", "acme/tiny@v1", f"acme/tiny@{SHA}")
    assert main == tag == commit and Path(main).name == SHA
    assert files(main) == WANTED
    assert {path.rsplit("/", 1)[1] for method, path, _ in hub.requests if "/resolve/" in path} == set(WANTED)
    bodies = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    assert len(bodies) == len(WANTED)  # three look-ups, each file fetched once


def test_an_existing_folder_wins(hub, resolve, tmp_path):
    (tmp_path / "cwd" / "acme" / "tiny").mkdir(parents=True)
    (tmp_path / "cwd" / "weights.gguf").touch()
    relative, absolute, file = resolve("acme/tiny", str(tmp_path), "weights.gguf")
    assert relative == "acme/tiny" and absolute == str(tmp_path)
    assert file == "error: checkpoint 'weights.gguf' is a file: give the folder that holds it"
    assert hub.requests == []


def test_what_is_neither_a_folder_nor_a_hub_id_gets_one_line(hub, resolve):
    texts = ["no-such-folder", "/no/such/folder", "./acme/tiny", "acme/../tiny", "acme/tiny@", "a b/c", "", "x" * 5000]
    for text, line in zip(texts, resolve(*texts), strict=True):
        assert line == f"error: checkpoint {text!r}: no such folder, and no Hub id (org/name[@revision])"
    assert hub.requests == []


def test_refusals_name_the_remedy(hub, resolve):
    url = f"http://127.0.0.1:{hub.server_port}"
    missing, dashes, private, revision, gated = resolve(
        "acme/missing", "acme/a--b", "acme/private", "acme/tiny@v2", "acme/gated"
    )
    for name, line in (("acme/missing", missing), ("acme/private", private), ("acme/a--b", dashes)):
        assert (
            line == f"error: {name!r}: no such folder, and no such repository on {url}; if it is private, set HF_TOKEN"
        )
    assert revision == f"error: acme/tiny has no revision 'v2': see {url}/acme/tiny/commits"
    assert gated.startswith(f"error: acme/gated is gated: accept its terms at {url}/acme/gated, then set HF_TOKEN")


def test_token_opens_gated_and_private_and_the_cache_works_offline(hub, resolve, tmp_path):
    gated, private, missing = resolve("acme/gated", "acme/private", "acme/missing", HF_TOKEN="hf_good")
    assert "'acme/missing': no such folder, and no such repository on " in missing
    (unknown,) = resolve("acme/private", HF_HOME=str(tmp_path / "empty"), HF_TOKEN="hf_bad")
    assert "does not know the token in HF_TOKEN" in unknown
    assert files(gated) == files(private) == WANTED
    asked = len(hub.requests)
    offline = resolve("acme/gated", "acme/tiny", "acme/gated@v1", HF_HUB_OFFLINE="1")
    assert offline[0] == gated and len(hub.requests) == asked
    for name, line in (("'acme/tiny' (main)", offline[1]), ("'acme/gated' (v1)", offline[2])):
        assert line == f"error: {name}: no such folder, and not complete in the Hub's cache: unset HF_HUB_OFFLINE once"
    nothing_listens = f"http://127.0.0.1:{free_port()}"
    cached, absent = resolve("acme/private", "acme/tiny", HF_ENDPOINT=nothing_listens)
    assert cached == private
    what = f"error: 'acme/tiny': no such folder, and downloading it from {nothing_listens} failed (ConnectError: "
    assert absent.startswith(what)


def test_cut_connection_is_resumed_where_it_broke(hub, resolve):
    hub.cut = 1
    (folder,) = resolve("acme/tiny")
    assert files(folder) == WANTED
    ranges = [r for method, path, r in hub.requests if method == "GET" and path.endswith("model.safetensors")]
    assert ranges == [None, f"bytes={10 << 20}-"]


def test_interrupted_download_is_one_line_and_the_next_run_fetches_only_the_rest(hub, resolve):
    hub.cut, hub.broken = 1, True
    (line,) = resolve("acme/tiny")
    assert line.startswith("error: 'acme/tiny': no such folder, and downloading it from ")
    assert f" http://127.0.0.1:{hub.server_port} failed (" in line
    assert line.endswith("): try again; files that arrived whole are kept")
    hub.broken, hub.requests = False, []
    (folder,) = resolve("acme/tiny")
    assert files(folder) == WANTED
    assert "GET" in {method for method, path, _ in hub.requests if path.endswith("model.safetensors")}
    assert "GET" not in {method for method, path, _ in hub.requests if path.endswith("/config.json")}


def test_download_script(hub, resolve):
    script = (str(ROOT / "scripts" / "download.py"),)
    (folder,) = resolve("acme/tiny@v1", command=script)
    assert files(folder) == WANTED
    (line,) = resolve("acme/missing", command=script)
    assert line.startswith("download.py: error: 'acme/missing': no such folder, and no such repository on ")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
