"""A tree of branches that share a prefix: what an answer has in common with its siblings is computed once.

    python launch.py --flowprefill                  # in another terminal; or with --unified
    python examples/forked_tree.py [URL]

prints the leaves of the tree, with the embedded model in invented words:

    plan A: paka lili feta huvu soji sita disi giko, step 1: giko tosa sifu neku seja juma liti fado
    plan A: paka lili feta huvu soji sita disi giko, step 2: lobu foli gise boha kebo lide sita dera
    plan B: depe bega tute besu giki popo fijo lubo, step 1: mife sita niza giko lubo jani rogi jada
    plan B: depe bega tute besu giki popo fijo lubo, step 2: lobu foli gise boha kebo lide sita dera
"""

import sys

import sglang as sgl

from sgl_flowprefill.frontend import SLORuntimeEndpoint, ttft_slo

endpoint = SLORuntimeEndpoint(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000")
MANUAL = "".join(f"Valve {number} opens at {number * 37 % 90} degrees.\n" for number in range(100))


@sgl.function
def tree(s):
    s += MANUAL + "Plan"
    s.sync()  # SGLang has the prefix of a fork cached if it is known by then; such a request has a lax objective
    branches = dict(zip("AB", s.fork(2), strict=True))
    for plan, branch in branches.items():
        branch += f" {plan}" + sgl.gen("plan", max_tokens=8, temperature=0)
    leaves = {}
    for plan, branch in branches.items():
        with ttft_slo(1.0):  # the leaves are wanted sooner than what comes before them
            twigs = branch.fork(2)
        for step, leaf in zip("12", twigs, strict=True):
            leaf += f" Step {step}" + sgl.gen("step", max_tokens=8, temperature=0)
            leaves[f"{plan}{step}"] = leaf
    return {name: (leaf["plan"], leaf["step"]) for name, leaf in leaves.items()}


with ttft_slo(5.0):
    state = tree.run(backend=endpoint)
for name, (plan, step) in state.ret_value.items():
    print(f"plan {name[0]}:{plan}, step {name[1]}:{step}")
