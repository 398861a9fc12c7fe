"""A chat turn that wants its first token soon, beside a map-reduce over a long document, which has time.

    python launch.py --flowprefill                  # in another terminal; or with --unified
    python examples/chat_beside_map_reduce.py [URL]

prints, with the embedded model in invented words:

    chat, first token after 0.05 s: losi sipo jama muji konu lafo deve kosa
    report: pepo mibe sigu paki bapi nefo gubu gile
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import sglang as sgl

from sgl_flowprefill.frontend import SLORuntimeEndpoint, ttft_slo

endpoint = SLORuntimeEndpoint(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000")
LINES = [f"Day {day}: pump {day % 7} ran for {day % 24} hours.\n" for day in range(1, 601)]
PARTS = ["".join(LINES[start : start + 200]) for start in range(0, 600, 200)]


@sgl.function
def map_reduce(s, parts):
    branches = s.fork(len(parts))
    for part, branch in zip(parts, branches, strict=True):
        branch += part + "\nNote:" + sgl.gen("note", max_tokens=8, temperature=0)
    s += "Notes:" + "".join(branch["note"] for branch in branches)
    s += "\nReport:" + sgl.gen("report", max_tokens=8, temperature=0)


@sgl.function
def chat(s, question):
    s += "User: " + question + "\nAssistant:" + sgl.gen("answer", max_tokens=8, temperature=0)


def read_document():
    with ttft_slo(60):
        return map_reduce.run(parts=PARTS, backend=endpoint)


with ThreadPoolExecutor() as pool:
    document = pool.submit(read_document)
    time.sleep(0.2)  # it is being read
    sent_s = time.monotonic()
    with ttft_slo(0.3, tbt=0.1):  # seconds to the first token, then between two tokens, which a unified server reads
        turn = chat.run(question="is anybody there?", backend=endpoint, stream=True)
    words = turn.text_iter("answer")
    first = next(words)
    print(f"chat, first token after {time.monotonic() - sent_s:.2f} s:{first}{''.join(words)}")
print(f"report:{document.result()['report']}")
