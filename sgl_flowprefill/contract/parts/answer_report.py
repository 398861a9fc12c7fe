"""Rows of the contract: reports in answers."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows

COMPLETIONS: Final = "sglang.srt.entrypoints.openai.serving_completions:"
CHAT: Final = "sglang.srt.entrypoints.openai.serving_chat:"

PART: Final = Part(
    "answer_report",
    "Reports in answers",
    ("HTTP server",),
    (
        *rows(
            "hooks",
            "sglang.srt.managers.tokenizer_manager:",
            "TokenizerManager.update_request_meta_info(self, meta_info, state, customized_info, index, finish_reason)",
            "is where what the scheduler sends beside tokens goes into meta_info",
            "answers say nothing of what happened to their requests",
        ),
        *rows(
            "hooks",
            "sglang.srt.managers.tokenizer_manager:",
            "TokenizerManager.convert_to_span_attrs(self, state, ...)",
            "says what the span of a request has in a trace",
            "traces say nothing of what happened to their requests",
        ),
        *attributes(
            "sglang.srt.managers.tokenizer_manager:ReqState",
            "obj",
            "is the request of an answer",
            "streams of the OpenAI endpoints say nothing of what happened to their requests",
        ),
        *rows(
            "hooks",
            COMPLETIONS,
            "build_endpoint_weight_version_metadata(meta_info)",
            "makes the metadata of an answer",
            "answers of /v1/completions say nothing of what happened to their requests",
        ),
        *rows(
            "hooks",
            CHAT,
            "build_endpoint_weight_version_metadata(meta_info)",
            "makes the metadata of an answer",
            "answers of /v1/chat/completions say nothing of what happened to their requests",
        ),
        *rows(
            "hooks",
            COMPLETIONS,
            "OpenAIServingCompletion._generate_completion_stream(self, adapted_request, request, raw_request)",
            "makes the events of a stream",
            "streams of /v1/completions say nothing of what happened to their requests",
        ),
        *rows(
            "hooks",
            CHAT,
            "OpenAIServingChat._generate_chat_stream(self, adapted_request, request, raw_request)",
            "makes the events of a stream",
            "streams of /v1/chat/completions say nothing of what happened to their requests",
        ),
        *rows(
            "hooks",
            "sglang.srt.entrypoints.openai.serving_responses:",
            "OpenAIServingResponses._generate_with_builtin_tools(self, request_id, request_prompt, adapted_request, "
            "...)",
            "is where an answer of /v1/responses and its request object meet",
            "answers of /v1/responses say nothing of what happened to their requests",
        ),
        *rows(
            "hooks",
            "sglang.srt.entrypoints.openai.protocol:",
            "ResponsesResponse.from_request(cls, request, ...)",
            "makes an answer, and what the last event of a stream has",
            "answers of /v1/responses say nothing of what happened to their requests",
        ),
        *attributes(
            "sglang.srt.entrypoints.openai.protocol:ResponsesResponse",
            "metadata",
            "is where an answer of /v1/responses has its report",
            "answers of /v1/responses say nothing of what happened to their requests",
        ),
        *attributes(
            "sglang.srt.managers.io_struct:GenerateReqInput",
            "is_single batch_size",
            "says whether a list has one prompt, whose report a stream has",
            "streams of /v1/completions with a list of one prompt say nothing of what happened to it",
        ),
    ),
)
