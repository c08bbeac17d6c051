"""What a rollout asks of a vLLM server over HTTP (vLLM 0.32's API; its development mode reloads weights)."""

import time
from typing import Any, NamedTuple

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers.base import need

_TRIES, _PAUSE = 4, 2.0  # seconds, twice as long each time
_START = "'VLLM_SERVER_DEV_MODE=1 PYTHONPATH=FOLDER vllm serve FOLDER ...' (see FOLDER/VLLM.md)"


class Answer(NamedTuple):
    """Attributes: prompt, tokens: ids; logprobs: of ``tokens``, at temperature 1 with nothing ruled out."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


class VllmServer:
    """
    Args:
        url: such as http://localhost:8000.
        timeout: seconds that a reply, or loading weights, may take.
    """

    def __init__(self, url: str, timeout: float):
        need("httpx", "grpo.generation.backend vllm")
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.Client(timeout=timeout, limits=limits)
        self._model: str | None = None

    def connect(self) -> None:
        """
        Raises:
            UserError: nobody answers there.
        """
        models = self._ask("GET", "/v1/models").get("data")
        try:
            self._model = models[0]["id"]
        except (TypeError, LookupError):
            raise UserError(f"{self.url} is no vLLM server: its /v1/models names none; see {_START}") from None

    def reload(self) -> None:
        """Load the weights that lie in its folder now.

        Raises:
            UserError: it can't.
        """
        self._ask("POST", "/collective_rpc", {"method": "reload_weights"})
        # Computed by the weights before. What is kept of images is known to server and engine: both must forget it.
        for cache in ("prefix", "mm", "encoder"):
            self._ask("POST", f"/reset_{cache}_cache")

    def chat(self, body: dict[str, Any]) -> Answer:
        """
        Raises:
            UserError: no answer, or one without token ids and log-probabilities.
        """
        if self._model is None:
            self.connect()
        found = self._ask("POST", "/v1/chat/completions", {"model": self._model, **body})
        try:
            (choice,) = found["choices"]
            scores = [float(item["logprob"]) for item in choice["logprobs"]["content"]]
            answer = Answer(list(found["prompt_token_ids"]), list(choice["token_ids"]), scores)
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"vLLM at {self.url} answers without token ids or log-probabilities; take a release that knows "
                "return_token_ids, 0.32 is tried"
            ) from None
        if len(answer.tokens) != len(answer.logprobs):
            raise UserError(f"vLLM at {self.url} gives {len(scores)} log-probabilities of {len(answer.tokens)} tokens")
        return answer

    def _ask(self, method: str, path: str, body: dict | None = None) -> dict[str, Any]:
        import httpx

        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                response = self._client.request(method, self.url + path, json=body)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 429 or response.status_code >= 500:
                problem = f"HTTP {response.status_code}: {_start_of(response.text)}"
                continue
            if response.status_code == 404:
                raise UserError(f"{self.url}{path} is not there; start vLLM by {_START}")
            if response.status_code != 200:
                raise UserError(f"vLLM at {self.url}{path} refuses: {_start_of(response.text)}")
            try:
                found = response.json() if response.content else {}
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise UserError(f"{self.url}{path} answers {_start_of(response.text)!r}, not as vLLM does")
            return found
        raise UserError(
            f"vLLM at {self.url} can't be asked ({problem}); start it by {_START}, and this run again: it goes on from "
            "its last checkpoint"
        )


def _start_of(text: str) -> str:
    return " ".join(text.split())[:160]
