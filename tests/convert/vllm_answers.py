"""vLLM's answers to a folder's golden.json, and thoughts within budgets, as JSON; runs where vLLM is installed."""

import base64
import io
import json
import sys
from pathlib import Path

from PIL import Image


def main(folder: Path, budget: int, closing_text: str) -> dict:
    from vllm import LLM, SamplingParams

    golden = json.loads((folder / "golden.json").read_text())
    llm = LLM(
        str(folder),
        trust_remote_code="auto_map" in json.loads((folder / "config.json").read_text()),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        limit_mm_per_prompt={"image": 1},
        logits_processors=["bluelm_thinking:ThinkingBudget"],
    )

    def ask(case: dict, **options):
        images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in case["images"]]
        query = {"prompt": case["prompt"], **({"multi_modal_data": {"image": images}} if images else {})}
        (answer,) = llm.generate([query], SamplingParams(temperature=0, **options))
        (written,) = answer.outputs
        scores = [step[token].logprob for step, token in zip(written.logprobs or [], written.token_ids)]
        return {"prompt": list(answer.prompt_token_ids), "tokens": list(written.token_ids), "logprobs": scores}

    cases = {case["name"]: case for case in golden["cases"]}
    greedy = {
        name: ask(case, max_tokens=len(case["tokens"]), ignore_eos=True, logprobs=1) for name, case in cases.items()
    }
    extra = {"think": True, "think_budget": budget, "closing_text": closing_text}
    thoughts = {name: ask(cases[name], max_tokens=64, extra_args=extra)["tokens"] for name in ("thought", "tiles")}
    return {"greedy": greedy, "thoughts": thoughts}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
