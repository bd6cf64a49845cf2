"""A SGLang server without a model: the real HTTP shapes and switch semantics of 0.5.23, and faults on demand.

Tokens follow a small rule over the context and the loaded weights, so that a test can work out what must
come. A request lives in one of the real places: held at the door of a paused server, waiting for its turn
after a retraction, or running with a KV cache. As on the real server, a flush is refused while requests run,
an update of a server that is not paused waits for them, and a refused flush still leaves the new weights.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from fake_sglang_rules import (
    ADMIN_PATHS,
    EOS,
    SAMPLING_FIELDS,
    SCHEDULER_PATHS,
    Faults,
    NextToken,
    PromptScores,
    Request,
    checksums_of_folder,
    digest_of_folder,
    expected_tokens,
    logprob_of,
    next_token,
)  # fmt: skip

__all__ = ["EOS", "FakeServer", "Faults", "Request", "expected_tokens", "logprob_of", "next_token"]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeServer:
    """The server, as an asynchronous context manager on a free loopback port.

    Attributes:
        url: where it listens.
        requests: every request that passed the key check: (path, decoded JSON body or None).
        faults: see :class:`Faults`.
        label: what ``/model_info`` calls the weights; ``scheduler_label``: what version spans call them.
        weights: identity of what is loaded: a digest after an update from disk, else made from the label.
        running: requests being generated, by rid.
    """

    def __init__(
        self,
        *,
        release: str = "0.5.23",
        api_key: str = "",
        admin_key: str = "",
        vocab_size: int = 320,
        context_tokens: int = 2048,
        token_s: float = 0.0,
        rule: NextToken = next_token,
        eos_ids: frozenset[int] = frozenset({EOS}),
        architecture: str = "Qwen3ForCausalLM",
        model_dir: Path | None = None,
        checksums: Callable[[Path], dict[str, str]] = checksums_of_folder,
        scores: PromptScores = lambda row: [logprob_of(token, "prompt") for token in row[1:]],
    ) -> None:
        self.release, self.api_key, self.admin_key = release, api_key, admin_key
        self.vocab_size, self.context_tokens, self.token_s = vocab_size, context_tokens, token_s
        self.rule, self.eos_ids, self.architecture = rule, eos_ids, architecture
        self.model_dir = model_dir or Path("/models/tiny")
        self.weights = digest_of_folder(model_dir) if model_dir else "default"
        self.label = self.scheduler_label = "default"
        self.checksums, self.scores = checksums, scores
        self.faults = Faults()
        self.requests: list[tuple[str, Any]] = []
        self.num_connections = 0
        self.running: dict[str, Request] = {}
        self.groups: dict[str, dict[str, Any]] = {}
        self.is_paused = False
        self.is_emptying = False
        self.is_update_open = False
        self.is_dead = False
        self.cache: dict[str, list[list[int]]] = {}
        self.server_args: dict[str, Any] = {}
        self.port = 0
        self._changed = asyncio.Condition()
        self._num_writers = 0
        self._runner: web.AppRunner | None = None
        self._seen: set[int] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def _number(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.release.split(".")[:3])

    @property
    def max_input_tokens(self) -> int:
        """What the real one calls ``max_req_input_len``; a prompt must be shorter."""
        return self.context_tokens - 6

    def paths(self) -> list[str]:
        """Paths of all requests so far."""
        return [path for path, _ in self.requests]

    def bodies(self, path: str) -> list[Any]:
        """JSON bodies sent to one path."""
        return [body for asked, body in self.requests if asked == path]

    async def __aenter__(self) -> FakeServer:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop_listening()

    async def listen(self) -> None:
        """Open the port: the same one again after :meth:`stop_listening`."""
        app = web.Application(middlewares=[self._guard], client_max_size=1 << 28)
        gets = {"/model_info": self._model_info, "/server_info": self._server_info, "/v1/loads": self._loads}
        posts: dict[str, Handler] = {
            "/generate": self._generate,
            "/abort_request": self._abort,
            "/flush_cache": self._flush_cache,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/update_weights_from_disk": self._update_from_disk,
            "/update_weights_from_distributed": self._update_from_group,
            "/update_weights_from_tensor": self._update_from_tensor,
            "/init_weights_update_group": self._init_group,
            "/destroy_weights_update_group": self._destroy_group,
            "/update_weight_version": self._set_label,
            "/weights_checker": self._weights_checker,
        }
        if self._number >= (0, 5, 21):
            posts |= {"/begin_weight_update": self._bracket, "/end_weight_update": self._bracket}
        app.add_routes([web.get(path, handler) for path, handler in gets.items()])
        app.add_routes([web.post(path, handler) for path, handler in posts.items()])
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.0, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop_listening(self) -> None:
        """Close the port and all connections: the server is gone."""
        runner, self._runner = self._runner, None
        if runner is not None:
            if runner.server is not None:
                for handler in list(runner.server.connections):
                    if handler.transport is not None:
                        handler.transport.abort()
            await runner.cleanup()
        self.running.clear()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Return once a condition on the server holds."""
        while not is_so():
            await asyncio.sleep(0.001)

    async def until_tokens(self, num_tokens: int) -> None:
        """Return once every running request (at least one) has so many tokens."""
        await self.until(
            lambda: min((len(item.output) for item in self.running.values()), default=-1) >= num_tokens
        )

    # Door: keys and faults

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if id(request.protocol) not in self._seen:
            self._seen.add(id(request.protocol))
            self.num_connections += 1
        key = self._needed_key(request.path)
        if key and request.headers.get("Authorization", "") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        body = await request.read()
        self.requests.append((request.path, json.loads(body) if body else None))
        faults = self.faults
        if faults.drops.get(request.path, 0) > 0 or self.is_dead:
            faults.drops[request.path] = faults.drops.get(request.path, 0) - 1
            self._cut(request)
        is_stuck = faults.is_wedged and request.path in SCHEDULER_PATHS
        if faults.is_hung or is_stuck or request.path in faults.hung_paths:
            await asyncio.Event().wait()
        if faults.statuses.get(request.path):
            status = faults.statuses[request.path].pop(0)
            return web.json_response({"error": {"message": f"status {status} as asked"}}, status=status)
        return await handler(request)

    def _needed_key(self, path: str) -> str:
        if path in ADMIN_PATHS and self.admin_key:
            return self.admin_key
        return self.api_key

    def _cut(self, request: web.Request) -> None:
        """Close a connection with a reset."""
        assert request.transport is not None
        request.transport.abort()
        raise asyncio.CancelledError

    # Information

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({
            "model_path": str(self.model_dir), "tokenizer_path": str(self.model_dir), "is_generation": True,
            "preferred_sampling_params": None, "weight_version": self.label, "load_format": "auto",
            "model_type": "qwen3", "architectures": [self.architecture],
        })  # fmt: skip

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({
            "model_path": str(self.model_dir), "tp_size": 1, "dp_size": 1, "disable_radix_cache": False,
            "context_length": None, "max_total_num_tokens": 16384,
            "max_req_input_len": self.max_input_tokens, "incremental_streaming_output": False,
            "enable_deterministic_inference": False, "skip_tokenizer_init": False, "vocab_size": None,
            "sampling_defaults": "model", "weight_version": "default",
            "version": self.release, "internal_states": [{"max_running_requests": 32}],
        } | self.server_args)  # fmt: skip

    async def _loads(self, request: web.Request) -> web.Response:
        now = time.time()
        running = [item for item in self.running.values() if item.is_running]
        load = {
            "timestamp": now - (1000.0 if self.faults.is_wedged else 0.1), "dp_rank": 0,
            "num_running_reqs": len(running), "num_waiting_reqs": len(self.running) - len(running),
            "num_used_tokens": 0, "max_total_num_tokens": 16384, "max_running_requests": 32,
        }  # fmt: skip
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}+00:00"
        return web.json_response({"timestamp": stamp, "version": self.release, "loads": [load]})

    # Generation

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        is_stream = bool(body.get("stream"))
        problem = self._problem(body)
        if problem and is_stream and "unknown field" not in problem:
            detail = {"message": problem, "type": "invalid_request_error", "code": 400, "retryable": False}
            text = f"data: {json.dumps({'error': detail})}\n\ndata: [DONE]\n\n"
            return web.Response(text=text, content_type="text/event-stream")
        if problem:
            return web.json_response({"error": {"message": problem}}, status=400)
        if self.faults.is_not_json:
            return web.Response(text="<html>gateway</html>", content_type="text/html")
        if not 0 <= min(body["input_ids"]) <= max(body["input_ids"]) < self.vocab_size:
            self.is_dead = True  # so does the real one: the embedding lookup takes the scheduler down
            self._cut(request)
        item = Request(
            body["rid"], list(body["input_ids"]), body["sampling_params"], body.get("extra_key") or "",
            body.get("logprob_start_len", -1),
        )  # fmt: skip
        task = asyncio.create_task(self._run(item))
        try:
            return await (self._stream(request, item) if is_stream else self._answer(request, item))
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _problem(self, body: dict[str, Any]) -> str:
        params = body.get("sampling_params") or {}
        unknown = sorted(set(params) - SAMPLING_FIELDS)
        prompt, wanted = body.get("input_ids"), params.get("max_new_tokens", 128)
        if unknown:
            return f"unknown field `{unknown[0]}`, expected one of `max_new_tokens`"
        if not prompt:
            return "input_ids cannot be empty."
        if wanted < 0:
            return f"max_new_tokens must be at least 0, got {wanted}."
        if len(prompt) + wanted > self.context_tokens:
            return (
                f"Requested token count exceeds the model's maximum context length of {self.context_tokens} "
                f"tokens. You requested a total of {len(prompt) + wanted} tokens."
            )
        if body.get("rid") in self.running:
            return f"Duplicate request ID detected: {body['rid']}"
        return ""

    async def _run(self, item: Request) -> None:
        """Generate until finished; held at the door of a paused server and by writers."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self.is_paused and not self._num_writers)
            self.running[item.rid] = item
        if len(item.prompt) >= self.max_input_tokens:  # found by the scheduler, so not at the door
            message = (
                f"Input length ({len(item.prompt)} tokens) exceeds the maximum allowed length "
                f"({self.max_input_tokens} tokens). Use a shorter input or enable --allow-auto-truncate."
            )
            item.prompt = [0]
            item.finish = {
                "type": "abort", "message": message, "status_code": 400, "err_type": "BadRequestError"
            }  # fmt: skip
        elif item.params.get("max_new_tokens") == 0:  # only its prompt is wanted
            item.finish = {"type": "length", "length": 0}
        item.cached_tokens = self._match(item)
        try:
            if self.faults.abort_status is not None:
                item.finish = {
                    "type": "abort", "message": "aborted as asked", "status_code": self.faults.abort_status,
                    "err_type": "InternalServerError",
                }  # fmt: skip
            while item.finish is None:
                await asyncio.sleep(self.token_s)
                async with self._changed:
                    await self._changed.wait_for(
                        lambda: not self.is_paused or self.is_emptying or item.finish is not None
                    )
                    item.is_running = True
                    if item.finish is None:
                        self._step(item)
        finally:
            self.running.pop(item.rid, None)
            self.cache.setdefault(item.extra_key, []).append(item.prompt + item.output[:-1])
            async with self._changed:
                self._changed.notify_all()
            item.changed.set()

    def _step(self, item: Request) -> None:
        token = self.rule(item.prompt + item.output, self.weights, self.vocab_size)
        item.output.append(token)
        item.logprobs.append(logprob_of(token, self.weights))
        params = item.params
        if item.is_aborting:
            item.finish = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
            item.changed.set()
            return
        stops = set(params.get("stop_token_ids") or ()) | self.eos_ids
        if not params.get("ignore_eos") and token in stops:  # ignore_eos turns off both kinds
            item.finish = {"type": "stop", "matched": token}
        elif len(item.output) >= params.get("max_new_tokens", 128):
            item.finish = {"type": "length", "length": params.get("max_new_tokens", 128)}
        item.changed.set()

    def _match(self, item: Request) -> int:
        """Length of the longest cached prefix in the request's namespace; the last id is always computed."""
        best = 0
        for row in self.cache.get(item.extra_key, []):
            limit = min(len(row), len(item.prompt) - 1)
            length = next((i for i in range(limit) if row[i] != item.prompt[i]), limit)
            best = max(best, length)
        return best

    def _record_switch(self, new_label: str) -> None:
        if new_label != self.scheduler_label:
            for item in self.running.values():
                if item.output:
                    item.switches.append((self.scheduler_label, len(item.output)))
        self.scheduler_label = new_label

    def _body(self, item: Request, num_tokens: int) -> dict[str, Any]:
        is_final = item.finish is not None and num_tokens == len(item.output)
        of_prompt = item.prompt_triples(self.scores, self.vocab_size)
        triples = [[lp, token, None] for lp, token in zip(item.logprobs, item.output, strict=True)]
        meta: dict[str, Any] = {
            "id": item.rid, "finish_reason": item.finish if is_final else None,
            "prompt_tokens": len(item.prompt), "weight_version": self.label,
            "num_retractions": item.num_retractions, "input_token_logprobs": of_prompt,
            "output_token_logprobs": triples[:num_tokens], "output_token_logprobs_length": num_tokens,
            "completion_tokens": num_tokens, "cached_tokens": item.cached_tokens,
        }  # fmt: skip
        if is_final and self._number >= (0, 5, 19):
            spans: list[dict[str, Any]] = []
            for label, end in [*item.switches, (self.scheduler_label, num_tokens)]:
                start = spans[-1]["end"] if spans else 0
                if spans and (end <= start or label == spans[-1]["version"]):
                    spans[-1]["end"] = max(end, start)
                else:
                    spans.append({"version": label, "start": start, "end": end})
            meta |= {"weight_versions": spans, "weight_version": spans[-1]["version"]}
        text = "".join(chr(32 + token % 90) for token in item.output[:num_tokens])
        body = {"text": text, "output_ids": item.output[:num_tokens], "meta_info": meta}
        if is_final and self.faults.change is not None:
            self.faults.change(body)
        return body

    async def _answer(self, request: web.Request, item: Request) -> web.StreamResponse:
        faults = self.faults
        while item.finish is None:
            await item.changed.wait()
            item.changed.clear()
            await self._maybe_break(request, item)
        status = item.finish.get("status_code") if item.finish["type"] == "abort" else None
        if status == 400:
            return web.json_response({"error": {"message": item.finish["message"]}}, status=400)
        if status is not None:
            answer = {
                "object": "error",
                "message": item.finish["message"],
                "type": str(status),
                "code": status,
            }
            return web.json_response(answer, status=status)
        blob = json.dumps(self._body(item, len(item.output))).encode()
        if faults.is_half_answer:
            response = web.StreamResponse(headers={"Content-Length": str(len(blob))})
            response.content_type = "application/json"
            await response.prepare(request)
            await response.write(blob[: len(blob) // 2])
            self._cut(request)
        return web.Response(body=blob, content_type="application/json")

    async def _stream(self, request: web.Request, item: Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_type = "text/event-stream"
        await response.prepare(request)
        interval, num_sent = item.params.get("stream_interval") or 1, 0
        while item.finish is None or num_sent < len(item.output) or not item.output:
            await item.changed.wait()
            item.changed.clear()
            ready = len(item.output)
            if item.finish is None and num_sent and ready - num_sent < interval:
                await self._maybe_break(request, item)
                continue
            blob = b"data: " + json.dumps(self._body(item, ready)).encode() + b"\n\n"
            if item.finish is not None and self.faults.is_half_answer:
                await response.write(blob[: len(blob) // 2])
                self._cut(request)
            if ready or item.finish is not None:
                await response.write(blob)
            num_sent = ready
            await self._maybe_break(request, item)
            if item.finish is not None and ready == len(item.output):
                break
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _maybe_break(self, request: web.Request, item: Request) -> None:
        faults = self.faults
        if faults.reset_after_tokens is not None and len(item.output) >= faults.reset_after_tokens:
            self._cut(request)
        if faults.stall_after_tokens is not None and len(item.output) >= faults.stall_after_tokens:
            await asyncio.Event().wait()

    # Control

    async def _abort(self, request: web.Request) -> web.Response:
        body = await request.json()
        await self._abort_requests([
            item for item in self.running.values() if body.get("abort_all") or item.rid == body.get("rid")
        ])  # fmt: skip
        return web.Response()

    async def _abort_requests(self, items: list[Request]) -> None:
        """End queued requests at once and running ones with their next token, so not before a pause is over.

        A request that is still held at the door is not found, and is finished in full.
        """
        for item in items:
            item.is_aborting = True
            if not item.is_running:
                item.finish = {"type": "abort", "message": "Abort in waiting queue"}
                item.changed.set()
        async with self._changed:
            self._changed.notify_all()

    async def _pause(self, request: web.Request) -> web.Response:
        mode = (await request.json()).get("mode", "abort")
        self.is_paused = True
        if mode == "abort":
            self.is_emptying = True
            while self.running:
                await self._abort_requests(list(self.running.values()))
                await asyncio.sleep(0.001)
            self.is_emptying = False
        elif mode == "retract":
            for item in self.running.values():
                item.is_running = False
                item.num_retractions += 1
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        async with self._changed:
            self.is_paused = False
            self._changed.notify_all()
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    def _flush(self) -> bool:
        is_idle = not any(item.is_running for item in self.running.values())
        if is_idle and (self.is_paused or not self.running):
            self.cache.clear()
            return True
        return False

    async def _flush_cache(self, request: web.Request) -> web.Response:
        if self._flush():
            return web.Response(text="Cache flushed.\n")
        return web.Response(text="Flush cache failed.\n", status=400)

    # Weights

    async def _bracket(self, request: web.Request) -> web.Response:
        is_open = request.path == "/begin_weight_update"
        if self.is_update_open == is_open:
            state = (
                "a weight-update session is already open" if is_open else "no weight-update session is open"
            )
            return _outcome(False, state)
        await self._hold()
        self.is_update_open = is_open
        await self._release()
        return _outcome(True, "Success")

    async def _hold(self) -> None:
        """Unless paused, wait for running requests, and keep new ones at the door."""
        async with self._changed:
            self._num_writers += 1
            await self._changed.wait_for(lambda: self.is_paused or not self.running)

    async def _release(self) -> None:
        async with self._changed:
            self._num_writers -= 1
            self._changed.notify_all()

    async def _load(self, body: dict[str, Any], weights: str) -> web.Response:
        await self._hold()
        try:
            if self.faults.update_message:
                return _outcome(False, self.faults.update_message)
            self.weights, label = weights, body.get("weight_version")
            if label is not None:
                self._record_switch(label)
            if body.get("flush_cache", True) and (self.faults.is_flush_refused or not self._flush()):
                message = (
                    "Weights were updated, but the cache was not flushed because requests are still running"
                )
                return _outcome(False, message)
            if label is not None:
                self.label = label
            return _outcome(True, "Success")
        finally:
            await self._release()

    async def _update_from_disk(self, request: web.Request) -> web.Response:
        body = await request.json()
        try:
            weights = digest_of_folder(Path(body["model_path"]))
        except OSError as error:
            return _outcome(False, f"Failed to get weights iterator: {error}")
        response = await self._load(body, weights)
        if response.status == 200:
            self.model_dir = Path(body["model_path"])
        return response

    def _closed_update(self, call: str) -> web.Response | None:
        if self.is_update_open or self._number < (0, 5, 21):
            return None
        message = f"{call} must run between begin_weight_update() and end_weight_update()"
        return _outcome(False, message)

    async def _update_from_group(self, request: web.Request) -> web.Response:
        body = await request.json()
        refused = self._closed_update("update_weights_from_distributed")
        if refused is None and body["group_name"] not in self.groups:
            message = f"Failed to receive weights: group {body['group_name']} not in list"
            refused = _outcome(False, message)
        return refused or await self._load(body, f"group {body.get('weight_version')}")

    async def _update_from_tensor(self, request: web.Request) -> web.Response:
        body = await request.json()
        blobs = [base64.b64decode(text, validate=True) for text in body["serialized_named_tensors"]]
        digest = hashlib.sha256(b"".join(blobs)).hexdigest()[:16]
        return self._closed_update("update_weights_from_tensor") or await self._load(body, digest)

    async def _init_group(self, request: web.Request) -> web.Response:
        body = await request.json()
        is_new = self.groups.setdefault(body["group_name"], body) is body
        return _outcome(is_new, "Succeeded to initialize" if is_new else "the group name exists already")

    async def _destroy_group(self, request: web.Request) -> web.Response:
        is_known = self.groups.pop((await request.json())["group_name"], None) is not None
        return _outcome(is_known, "Succeeded to destroy" if is_known else "The group does not exist.")

    async def _set_label(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("abort_all_requests", True):
            await self._abort_requests(list(self.running.values()))
        self._record_switch(body["new_version"])
        self.label = body["new_version"]
        return web.json_response({"success": True, "message": "updated", "new_version": self.label})

    async def _weights_checker(self, request: web.Request) -> web.Response:
        sums = self.checksums(self.model_dir)
        whole = hashlib.sha256("".join(sums.values()).encode()).hexdigest()
        rank = {
            "checksums": sums, "per_gpu_checksum": whole,
            "parallelism_info": [{"role": "target", "tp_rank": 0, "tp_size": 1, "rank": 0, "size": 1}],
        }  # fmt: skip
        return web.json_response({"success": True, "message": "Success.", "ranks": [rank]})


def _outcome(is_good: bool, message: str) -> web.Response:
    return web.json_response({"success": is_good, "message": message}, status=200 if is_good else 400)
