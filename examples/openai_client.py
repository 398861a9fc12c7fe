"""The OpenAI client: a chat turn that is streamed, and a completion, each with its own objective.

    python launch.py --flowprefill                  # in another terminal; or with --unified
    python examples/openai_client.py [URL]

prints, with the embedded model in invented words:

    chat, first token after 0.04 s: giga lobu duze tuza jata kobo lade lime
    completion: nano sipo zapa vebi zapa kemo teha zefi
"""

import sys
import time

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
client = OpenAI(base_url=url + "/v1", api_key="none")  # or the server's --api-key
model = client.models.list().data[0].id

sent_s = time.monotonic()
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "is anybody there?"}],
    max_tokens=8,
    temperature=0,
    stream=True,
    # Seconds to the first token, then between two tokens, which a unified server reads.
    extra_body={"custom_params": {"ttft_slo": 0.3, "tbt_slo": 0.1}},
)
words = (chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
first = next(word for word in words if word)
print(f"chat, first token after {time.monotonic() - sent_s:.2f} s:{first}{''.join(words)}")

completion = client.completions.create(
    model=model,
    prompt="Report of the night shift:",
    max_tokens=8,
    temperature=0,
    extra_body={"custom_params": {"ttft_slo": 20}},
)
print(f"completion:{completion.choices[0].text}")
