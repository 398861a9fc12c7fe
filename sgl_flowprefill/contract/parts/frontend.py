"""Rows of the contract: SGLang's frontend programs."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, rows

ENDPOINT: Final = "sglang.lang.backend.runtime_endpoint:RuntimeEndpoint"

PART: Final = Part(
    "frontend",
    "SGLang's frontend programs",
    ("client",),
    (
        *rows(
            "overrides",
            ENDPOINT,
            "__init__(self, base_url, ...) generate(self, s, sampling_params) "
            "generate_stream(self, s, sampling_params) "
            "select(self, s, choices, temperature, choices_method) cache_prefix(self, prefix_str) "
            "commit_lazy_operations(self, s) fill_image(self, s) _generate_http_request(self, s, data)",
            "sends a program's requests",
            "frontend programs cannot name objectives",
        ),
        *rows(
            "calls",
            "sglang.lang.backend.runtime_endpoint:",
            "RuntimeEndpoint",
            "is what the endpoint is a subclass of",
            "frontend programs cannot name objectives",
        ),
        *rows(
            "overrides",
            "sglang.lang.choices:ChoicesSamplingMethod",
            "__call__(self, choices, normalized_prompt_logprobs, input_token_logprobs, output_token_logprobs, "
            "unconditional_token_logprobs) requires_unconditional_logprobs(self)",
            "chooses by log probabilities",
            "`sgl.select` chooses something else",
        ),
        *rows(
            "calls",
            "sglang.lang.choices:",
            "ChoicesSamplingMethod ChoicesDecision",
            "chooses by log probabilities",
            "`sgl.select` chooses something else",
        ),
        *rows(
            "overrides",
            "sglang.lang.ir:SglSamplingParams",
            "to_srt_kwargs(self)",
            "says what of its parameters a program sends",
            "frontend programs cannot name objectives",
        ),
        *rows(
            "calls",
            "sglang.lang.ir:",
            "SglSamplingParams",
            "holds a program's sampling parameters",
            "frontend programs cannot name objectives",
        ),
    ),
)
