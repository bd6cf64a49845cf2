"""A real SGLang server for tests: its environment, tiny models, start and stop.

The environment is made by ``make sglang-env``. Without it the tests that need a server are skipped, unless
``COD_REQUIRE_SGLANG`` is set, as CI does.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("SGLANG_VENV", ROOT / ".venv-sglang")) / "bin" / "python"
VOCAB_SIZE = 320
CONTEXT_TOKENS = 1024
START_S = 240.0
SPECIAL_TOKENS = ("<|eos|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


@dataclass(frozen=True)
class SGLangServer:
    """A running server."""

    url: str
    api_key: str
    admin_key: str
    model_dir: Path
    process: subprocess.Popen[bytes]
    log: Path


def require_environment() -> None:
    """Skip the calling test when there is no environment with SGLang."""
    if PYTHON.exists():
        return
    if os.environ.get("COD_REQUIRE_SGLANG"):
        pytest.fail(f"{PYTHON} is missing: run `make sglang-env`")
    pytest.skip("no SGLang environment: run `make sglang-env`")


def tiny_model(folder: Path, seed: int, *, vocab_size: int = VOCAB_SIZE, is_tied: bool = False) -> Path:
    """Write a random Qwen3 model directory in fp32, with a byte-level tokenizer of 261 entries.

    Ids from 261 on have no text at all: whoever re-tokenises loses them.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=is_tied,
        max_position_embeddings=2048,
        initializer_range=0.2,
        eos_token_id=256,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).float().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[0]).save_pretrained(folder)
    return folder


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(model_dir: Path, log: Path, *arguments: str, has_keys: bool = True) -> Iterator[SGLangServer]:
    """Start a server, wait until it answers, and end it with all of its children."""
    port = free_port()
    api_key, admin_key = (secrets.token_hex(8), secrets.token_hex(8)) if has_keys else ("", "")
    keys = ("--api-key", api_key, "--admin-api-key", admin_key) if has_keys else ()
    command = [
        str(PYTHON), "-m", "sglang.launch_server", "--model-path", str(model_dir),
        "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
        "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend", "none",
        "--disable-cuda-graph", "--dtype", "float32", "--context-length", str(CONTEXT_TOKENS),
        "--max-total-tokens", "16384", "--max-running-requests", "32", "--mem-fraction-static", "0.3",
        "--skip-server-warmup", "--sleep-on-idle", *keys, *arguments,
    ]  # fmt: skip
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, process_group=0
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_answering(url, process, log)
        yield SGLangServer(url, api_key, admin_key, model_dir, process, log)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_answering(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/model_info", timeout=5):  # noqa: S310
                return
        except urllib.error.HTTPError:
            return  # it answers, though not to somebody without a key
        except OSError:
            pass
        tail = log.read_text(errors="replace")[-3000:]
        assert process.poll() is None, f"the server ended with code {process.returncode}:\n{tail}"
        assert time.monotonic() < deadline, f"the server does not answer after {START_S:g} s:\n{tail}"
        time.sleep(0.25)
