"""What writes replies in a rollout: NeMo-Aligner's InferenceBackendBase, for one rank of a job."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from nemo_bluelm.generate.request import Reply, Sampling, TokenPrompt

# Called with (prompt's place, sample's place, reply) as soon as a reply is finished.
OnReply = Callable[[int, int, Reply], None]


class InferenceBackendBase(ABC):
    """Takes the policy's weights, writes replies, frees what it needs for that, again and again."""

    @abstractmethod
    def refit(self) -> None:
        """Take the weights as they are now. Called before the first :meth:`generate` of every rollout."""

    @abstractmethod
    def generate(self, prompts: Sequence[TokenPrompt], sampling: Sampling, on_reply: OnReply) -> None:
        """Write ``sampling.samples`` replies to each prompt. A reply depends on ``sampling.seed``, its prompt's
        ``number`` and its own place alone, not on the job's layout."""

    @abstractmethod
    def free(self) -> None:
        """Give back memory, so that training has it."""
