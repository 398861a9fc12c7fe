"""Rows of the contract: refusals of an overloaded server."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows

ENTRYPOINTS: Final = "sglang.srt.entrypoints"

PART: Final = Part(
    "overload",
    "Refusals of an overloaded server",
    ("HTTP server",),
    (
        *rows(
            "hooks",
            "sglang.srt.managers.tokenizer_manager:",
            "TokenizerManager._handle_abort_finish_reason(self, out, state, is_stream)",
            "makes an exception of a refusal by the scheduler",
            "requests that are shed are not told when to come back",
        ),
        *rows(
            "hooks",
            f"{ENTRYPOINTS}.http_server:",
            "serve_generate_request(obj, request)",
            "is where that exception leaves /generate, and a stream of it begins",
            "requests that are shed are not told when to come back",
        ),
        *rows(
            "hooks",
            f"{ENTRYPOINTS}.openai.serving_base:OpenAIServingBase",
            "handle_request(self, request, raw_request) "
            "create_error_response(self, message, err_type, status_code, ...)",
            "is where that exception leaves the OpenAI endpoints, and their streams begin",
            "requests that are shed are not told when to come back",
        ),
        *rows(
            "hooks",
            f"{ENTRYPOINTS}.openai.serving_responses:OpenAIServingResponses",
            "create_responses(self, request, raw_request) "
            "create_error_response(self, message, err_type, status_code, ...)",
            "is where that exception leaves /v1/responses, and a stream of it begins",
            "requests that are shed are refused with status 400",
        ),
        *rows(
            "hooks",
            f"{ENTRYPOINTS}.anthropic.serving:AnthropicServing",
            "handle_messages(self, request, raw_request)",
            "is where that exception leaves /v1/messages, and a stream of it begins",
            "requests that are shed are not told when to come back",
        ),
        *rows(
            "hooks",
            f"{ENTRYPOINTS}.ollama.serving:OllamaServing",
            "handle_chat(self, request, raw_request) handle_generate(self, request, raw_request)",
            "is where that exception leaves the Ollama-style endpoints, and their streams begin",
            "requests that are shed are not told when to come back",
        ),
        *attributes(
            f"{ENTRYPOINTS}.openai.protocol:ResponsesRequest",
            "tools",
            "says whether events of a stream may be held back until its end",
            "streams of /v1/responses begin late",
        ),
    ),
)
