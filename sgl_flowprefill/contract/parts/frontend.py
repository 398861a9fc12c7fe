"""Rows of the contract: SGLang's frontend programs."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, rows, source

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
        *(
            source(
                "assumes",
                f"sglang.lang.interpreter:{function}",
                ["backend = backend.endpoint"],
                "asks for the endpoint of a backend in the thread that calls `run` or `run_batch`",
                "programs in other threads have the server's default objective",
            )
            for function in ("run_program", "run_program_batch")
        ),
        source(
            "assumes",
            "sglang.lang.interpreter:StreamExecutor.__init__",
            ["contextvars.copy_context().run"],
            "executes a branch in the context of the thread that forked it",
            "branches do not have the objective of a `with` in the program",
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
