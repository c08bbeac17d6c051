"""TensorRT-LLM's answers against those of the checkpoint that this folder was exported from.

``python DIR/verify_trtllm.py``; it exits with 0 if they agree, 1 if not, 2 if they can't be compared.
"""

import argparse
import base64
import io
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TOLERANCE = 0.2  # of log-probabilities; BF16 differs from FP32 by less

if not __package__:  # as a script, and not where it is only imported
    sys.path.insert(0, str(FOLDER))
    try:
        import bluelm_trtllm  # noqa: F401  here, so that worker processes register the model too
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "tensorrt_llm":
            raise
        print("TensorRT-LLM is not installed here; run this where trtllm-serve runs", file=sys.stderr)
        sys.exit(2)


def compare(case: dict, tokens: list, logprobs: list, tolerance: float) -> tuple:
    """(whether an engine's reply agrees, how).

    Where the checkpoint's token is above the next by less than ``tolerance``, rounding may choose the other one, and
    what follows can't be compared.

    Args:
        case: of ``golden.json``.
        tokens, logprobs: the engine's.
    """
    furthest = 0.0
    for place, (expected, margin) in enumerate(zip(case["tokens"], case["margins"])):
        if place >= len(tokens):
            return False, f"it ends after {len(tokens)} of {len(case['tokens'])} tokens"
        if tokens[place] != expected:
            if place and margin < tolerance:
                return True, f"{place} tokens agree, then two are as likely (by {margin:.2g}); {furthest:.2g} at most"
            return False, f"token {place} is {tokens[place]}, not {expected}, which is likelier by {margin:.2g}"
        furthest = max(furthest, abs(logprobs[place] - case["logprobs"][place]))
        if furthest > tolerance:
            return False, f"the log-probability of token {place} differs by {furthest:.2g}"
    return True, f"{len(case['tokens'])} tokens agree, log-probabilities to {furthest:.2g}"


def main(argv: list) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"of log-probabilities ({TOLERANCE})")
    args = parser.parse_args(argv)
    from PIL import Image
    from tensorrt_llm import LLM, SamplingParams

    cases = json.loads((FOLDER / "golden.json").read_text())["cases"]
    engine = LLM(model=str(FOLDER), trust_remote_code=True, max_num_tokens=8192)
    failed = 0
    for case in cases:
        images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in case["images"]]
        query = {"prompt": case["prompt"], **({"multi_modal_data": {"image": images}} if images else {})}
        wanted = SamplingParams(max_tokens=len(case["tokens"]), ignore_eos=True, logprobs=1)
        answer = engine.generate(query, wanted)
        written = answer.outputs[0]
        read = list(answer.prompt_token_ids)
        if read != case["prompt_tokens"]:
            agrees, how = False, f"its prompt has {len(read)} tokens, or others, not {len(case['prompt_tokens'])}"
        else:
            scores = [_score(step, token) for step, token in zip(written.logprobs, written.token_ids)]
            agrees, how = compare(case, list(written.token_ids), scores, args.tolerance)
        failed += not agrees
        print(f"{case['name']:<10} {'ok' if agrees else 'DIFFERS':<8} {how}", flush=True)
    print(f"{failed} of {len(cases)} answers differ" if failed else f"all {len(cases)} answers agree")
    return 1 if failed else 0


def _score(step, token) -> float:
    """The token's log-probability of a step's, which are numbers in some releases and dicts by token in others."""
    return step[token].logprob if isinstance(step, dict) else float(step)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
