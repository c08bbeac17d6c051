"""The process of the scorer ``math``: reads references and an answer, a line of JSON each, says whether they agree."""

import json
import math
import resource
import sys

_MEMORY = 4 << 30  # bytes: 9**9**9 must not take the machine
_MARGIN = 10  # seconds of CPU time beyond the limit of the parent, who may have been killed
_SHORT = 200  # characters; a longer answer is no formula as a whole


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    import logging

    logging.disable()  # it warns that nobody limits the time; the parent does
    from math_verify import parse, verify

    def parsed(text: str) -> list:
        return parse(text, parsing_timeout=None)

    def formula(text: str) -> list:
        return parsed(text if "$" in text or "\\boxed" in text else f"${text}$")

    def compare(references: list[str], answer: str) -> dict:
        try:
            right = [found for text in references if (found := formula(text))]
        except Exception:  # then the reference can't be one
            right = []
        if not right:
            return {}
        readings = [parsed(answer)]
        if len(answer) <= _SHORT and "\n" not in answer.strip():
            readings.append(formula(answer.strip()))
        readings = [reading for reading in readings if reading]
        agree = any(verify(one, other, timeout_seconds=None) for one in right for other in readings)
        return {"right": agree, "any": bool(readings)}

    print("{}", flush=True)
    for line in sys.stdin:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        most = math.ceil(used + float(sys.argv[1])) + _MARGIN
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            found = compare(**json.loads(line))
        except (MemoryError, RecursionError):  # a limit that the answer has reached, as it may that of time
            found = {"right": False, "any": False}
        except Exception as error:  # of which nobody knows whose fault it is
            found = {"failed": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
