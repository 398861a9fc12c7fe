"""An SGLang frontend program whose requests say when they need their first token.

Start the servers in another terminal: ``python launch.py --flowprefill``.
"""

import sys

import sglang as sgl

from sgl_flowprefill.frontend import Endpoint

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
endpoint = Endpoint(URL, ttft_slo=2.0)  # seconds, for every request


@sgl.function
def triage(s, ticket):
    s += "Ticket: " + ticket + "\nSeverity:"
    s += sgl.select("severity", choices=[" low", " high"])
    s += "\nAnswer:" + sgl.gen("answer", max_tokens=16, temperature=0)


batch = triage.run_batch([{"ticket": "the login page is slow"}, {"ticket": "a typo"}], backend=endpoint)
urgent = triage.run(ticket="the shop is down", backend=endpoint.with_ttft_slo(0.3))  # this run's requests
for state in (*batch, urgent):
    print(state["severity"], state["answer"])
