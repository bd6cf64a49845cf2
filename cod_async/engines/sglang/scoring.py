"""A teacher on a SGLang server: the log-probs of a prompt that it gives with an empty completion.

SGLang computes the log-probs of prompt tokens at temperature 1, whatever the request says, so no other
temperature is possible here. The server is somebody else's: it is looked at once, and its weights must keep
the label that they had then.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cod_async.config.check_distillation import CONFIG_FILE, teacher_problems, vocab_size_of
from cod_async.config.schema import Config, ServerConfig, TeacherConfig
from cod_async.engines.base import scored_positions
from cod_async.engines.sglang import answers
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.http import ServerHttp
from cod_async.engines.sglang.opening import TOKENIZER_FILE
from cod_async.errors import EngineDownError, EngineError, EngineMismatchError, InputError

# A log-prob and an id as JSON, with room; and all fields around them.
_TOKEN_BYTES = 256
_ANSWER_BYTES = 1 << 18


class SGLangScorer:
    """Implements :class:`cod_async.engines.base.Scorer` on one server.

    Args:
        http: of the server.
        vocab_size: ids are 0 .. vocab_size-1; others never reach the server, which would die of them.
        label: what its weights are called.
        max_requests: rows there at once; more wait their turn.
        request_timeout_s: longest scoring of a row.
    """

    def __init__(
        self, http: ServerHttp, *, vocab_size: int, label: str, max_requests: int, request_timeout_s: float
    ) -> None:
        self._http = http
        self._vocab_size = vocab_size
        self._label = label
        self._slots = asyncio.Semaphore(max_requests)
        self._timeout_s = request_timeout_s

    @classmethod
    async def open(
        cls, teacher: TeacherConfig, api_key: str, config: Config, student_dir: Path
    ) -> SGLangScorer:
        """Look at a teacher's server and connect to it.

        Args:
            teacher: with a ``url``.
            api_key: of the server; empty: none.
            config: the run's configuration.
            student_dir: model directory of the student.

        Raises:
            InputError: the server cannot be this run's teacher; all reasons are listed.
            EngineDownError: it does not answer.
        """
        settings = msgspec.structs.replace(config.engine.server, has_streaming=False)
        section = f"distillation.teachers ({teacher.environment})"
        try:
            client = ServerClient(teacher.url, settings=settings, vocab_size=1, api_key=api_key)
            try:
                info = await client.info()
            finally:
                await client.aclose()
        except EngineMismatchError as error:
            raise InputError(str(error).replace("engine.server", section)) from None
        context, folder = config.model.max_context_tokens, Path(info.model_path)
        problems = []
        if info.max_request_tokens <= context:  # a whole row is a prompt here
            problems.append(
                f"{teacher.url} takes prompts of less than {info.max_request_tokens} tokens, rows may have "
                f"model.max_context_tokens = {context}; start it with a larger --context-length"
            )
        if (folder / CONFIG_FILE).is_file() and (folder / TOKENIZER_FILE).is_file():  # else on another host
            problems += [f"{teacher.url}: {text}" for text in teacher_problems(folder, student_dir, context)]
        if problems:
            raise InputError(problems)
        return cls(
            _http(teacher.url, api_key, settings, section),
            vocab_size=vocab_size_of(student_dir),
            label=info.label,
            max_requests=config.distillation.max_requests,
            request_timeout_s=config.distillation.request_timeout_s,
        )

    async def score(
        self, token_ids: Sequence[int], spans: Sequence[tuple[int, int]], temperature: float
    ) -> list[float]:
        """Score a row; see :meth:`cod_async.engines.base.Scorer.score`.

        Raises:
            EngineDownError: no answer in time, or one that does not hold together.
            EngineRefusedError: status 4xx.
            EngineMismatchError: wrong key, another temperature than 1, or the server has other weights now.
            EngineError: bad arguments; nothing was sent.
        """
        if temperature != 1:
            raise EngineMismatchError(
                f"{self._http.url} gives log-probs of a prompt at temperature 1 only, not {temperature:g}; "
                "set engine.temperature to 1, or give the teacher as a path"
            )
        positions = scored_positions(token_ids, spans, temperature, self._vocab_size)
        row, start = list(token_ids), positions[0] - 1
        async with self._slots:
            status, blob = await self._http.call(
                "/generate",
                _body(row, start),
                is_admin=False,
                timeout_s=self._timeout_s,
                max_bytes=_ANSWER_BYTES + _TOKEN_BYTES * len(row),
            )
        if status != 200:
            raise self._failure(status, answers.error_message(blob))
        try:
            answer = msgspec.json.decode(blob, type=answers.GenerateAnswer)
            if answer.failure is not None:
                raise self._failure(*answer.failure)
            found, label = answers.prompt_logprobs_of(answer, row, start, self._vocab_size)
        except (msgspec.MsgspecError, answers.AnswerError) as error:
            said = self._http.cleaned(str(error))
            raise EngineDownError(f"{self._http.url}/generate answered nonsense: {said}") from None
        if label != self._label:
            raise EngineMismatchError(
                f"{self._http.url} has weights called {self._http.cleaned(label)!r} now and had "
                f"{self._http.cleaned(self._label)!r} at the start; a teacher must stay as it is"
            )
        return [found[position - start - 1] for position in positions]

    async def aclose(self) -> None:
        """Close all connections; running calls fail as if the server was gone."""
        await self._http.aclose()

    def _failure(self, status: int, said: str) -> EngineError:
        error = self._http.failure("/generate", status, said, is_admin=False)
        assert isinstance(error, EngineError)  # noqa: S101  (all of them are)
        return error


def _http(url: str, api_key: str, settings: ServerConfig, section: str) -> ServerHttp:
    return ServerHttp(
        url,
        api_key=api_key,
        admin_key="",
        connect_timeout_s=settings.connect_timeout_s,
        section=section,
    )


def _body(row: list[int], start: int) -> bytes:
    """Return a request for the log-probs of a prompt, and no completion."""
    return msgspec.json.encode(
        {
            "rid": f"score-{secrets.token_hex(8)}~",
            "input_ids": row,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": 0,
            "return_text_in_logprobs": False,
            "stream": False,
        }
    )
