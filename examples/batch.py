"""A batch of SGLang programs under one objective, and an urgent run under another.

    python launch.py --flowprefill                  # in another terminal; or with --unified
    python examples/batch.py [URL]

prints, for each ticket, what the model chose and wrote, with the embedded model in invented words:

    severity high, answer viso sodo lehe bapi luze lehe gimo ropa
    severity high, answer vopa nuku lufu gama hazu hura hava taso
    severity high, answer loti ropa hiru gusa vuha gusa sufu hoja
"""

import sys

import sglang as sgl

from sgl_flowprefill.frontend import SLORuntimeEndpoint, ttft_slo

endpoint = SLORuntimeEndpoint(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000")


@sgl.function
def triage(s, ticket):
    s += "Ticket: " + ticket + "\nSeverity:"
    s += sgl.select("severity", choices=[" low", " high"])
    s += "\nAnswer:" + sgl.gen("answer", max_tokens=8, temperature=0)


with ttft_slo(2.0):  # seconds to the first token, for each request that is made here
    batch = triage.run_batch([{"ticket": "the login page is slow"}, {"ticket": "a typo"}], backend=endpoint)
with ttft_slo(0.3):
    urgent = triage.run(ticket="the shop is down", backend=endpoint)
for state in (*batch, urgent):
    print(f"severity{state['severity']}, answer{state['answer']}")
