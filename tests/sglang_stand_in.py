"""A "Python with SGLang" for tests of the launcher: packages for ``PYTHONPATH`` under which this very
interpreter answers as one with SGLang would, and ``python -m sglang.launch_server`` starts the fake server.
"""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent

_LAUNCH_SERVER = """
import argparse, asyncio, json, os, signal, subprocess, sys, time
sys.path[:0] = [{root!r}]
parser = argparse.ArgumentParser(prog="sglang serve")
for name in ("--config", "--model-path", "--host", "--weight-version", "--dtype", "--device", "--fault"):
    parser.add_argument(name, default="")
for name in ("--port", "--max-running-requests", "--context-length", "--max-total-tokens"):
    parser.add_argument(name, type=int)
backends = ("--attention-backend", "--sampling-backend", "--grammar-backend")
for name in ("--sampling-defaults", "--log-level", *backends):
    parser.add_argument(name)
for name in ("--skip-server-warmup", "--disable-cuda-graph", "--sleep-on-idle"):
    parser.add_argument(name, action="store_true")
options = parser.parse_args()
keys = json.loads(open(options.config).read())
print("server_args", keys, options, flush=True)  # as the real one does at log level info
print("no line end yet: " + keys["api-key"], end="", flush=True)
print(flush=True)

if options.fault == "never":
    time.sleep(600)
if options.fault == "dies":
    sys.exit("no memory left for weights")
helper = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
print("helper", helper.pid, flush=True)

from fake_sglang import FakeServer
from pathlib import Path


async def serve():
    server = FakeServer(release={release!r}, api_key=keys["api-key"], admin_key=keys["admin-api-key"])
    server.port = options.port
    server.model_dir = Path("/elsewhere" if options.fault == "model" else options.model_path)
    server.label = server.scheduler_label = options.weight_version
    async with server:
        print("listening", flush=True)
        while True:
            await asyncio.sleep(0.05)
            wedge = Path(options.config).parent / "wedge"
            if wedge.exists():
                os.kill(os.getpid(), signal.SIGSTOP)


def leave(*_):
    helper.kill()
    sys.exit(0)


signal.signal(signal.SIGTERM, leave)
asyncio.run(serve())
"""


def make_stand_in(folder: Path, *, release: str = "0.5.23") -> Path:
    """Write the packages into a folder and return it."""
    package = folder / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "launch_server.py").write_text(_LAUNCH_SERVER.format(root=str(TESTS), release=release))
    facts = folder / f"sglang-{release}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {release}\n")
    torch = folder / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text(
        "__version__ = '0.0'\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"
    )
    return folder
