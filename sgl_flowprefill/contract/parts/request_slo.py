"""Rows of the contract: objectives of requests."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows
from sgl_flowprefill.contract.symbols import HTTP

PART: Final = Part(
    "request_slo",
    "Objectives of requests",
    ("HTTP server",),
    (
        *rows(
            "hooks",
            "sglang.srt.entrypoints.api_contract:",
            "generate_contract_error(body)",
            "checks the objective of a /generate request",
            "an invalid objective is an error event under status 200",
        ),
        *rows(
            "hooks",
            HTTP,
            "serve_generate_request(obj, request)",
            "is where an objective beside the sampling parameters becomes one of them",
            "an objective at the top of a /generate body is ignored",
        ),
        *rows(
            "hooks",
            "sglang.srt.entrypoints.openai.serving_completions:",
            "OpenAIServingCompletion._validate_request(self, request)",
            "checks the objective of a /v1/completions request",
            "an invalid objective is an error event under status 200",
        ),
        *rows(
            "hooks",
            "sglang.srt.entrypoints.openai.serving_chat:",
            "OpenAIServingChat._validate_request(self, request)",
            "checks the objective of a /v1/chat/completions request",
            "an invalid objective is an error event under status 200",
        ),
        *attributes(
            "sglang.srt.entrypoints.openai.protocol:CompletionRequest",
            "custom_params",
            "is where the objective of an OpenAI request is",
            "OpenAI requests cannot name an objective",
        ),
        *attributes(
            "sglang.srt.entrypoints.openai.protocol:ChatCompletionRequest",
            "custom_params",
            "is where the objective of an OpenAI request is",
            "OpenAI requests cannot name an objective",
        ),
        *attributes(
            "sglang.srt.managers.io_struct:GenerateReqInput",
            "sampling_params",
            "is where the objective of a /generate request belongs",
            "an objective at the top of a /generate body is ignored",
        ),
    ),
)
