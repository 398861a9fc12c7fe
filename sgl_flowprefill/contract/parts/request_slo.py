"""Rows of the contract: objectives of requests."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import HTTP

PART: Final = Part(
    "request_slo",
    "Objectives of requests",
    ("HTTP server",),
    (
        *rows(
            "hooks",
            HTTP,
            "serve_generate_request(obj, request)",
            "checks the objective of a /generate request before a stream begins, and notes when it was received",
            "an invalid objective is an error event under status 200, and clients move their deadlines",
        ),
        *rows(
            "hooks",
            "sglang.srt.entrypoints.openai.serving_responses:",
            "OpenAIServingResponses.create_responses(self, request, raw_request)",
            "checks the objective of a /v1/responses request before a stream begins, and notes when it was received",
            "an invalid objective is an error event under status 200",
        ),
        *rows(
            "hooks",
            "sglang.srt.entrypoints.anthropic.serving:",
            "AnthropicServing.handle_messages(self, request, raw_request)",
            "checks the objective of a /v1/messages request before a stream begins, and notes when it was received",
            "an invalid objective is an error event under status 200",
        ),
        *rows(
            "hooks",
            "sglang.srt.entrypoints.ollama.serving:",
            "OllamaServing.handle_chat(self, request, raw_request) "
            "OllamaServing.handle_generate(self, request, raw_request)",
            "checks the objective of an Ollama-style request before a stream begins, and notes when it was received",
            "an invalid objective is a 500, or cuts a stream off",
        ),
        *rows(
            "hooks",
            "sglang.srt.entrypoints.openai.serving_transcription:",
            "OpenAIServingTranscription.create_transcription(self, audio_data, model, language, response_format, "
            "temperature, stream, raw_request, ...)",
            "checks the objective of a transcription before a stream begins, and notes when it was received",
            "an invalid objective is an error event under status 200, and reading the audio counts for nothing",
        ),
        source(
            "assumes",
            f"{HTTP}openai_v1_audio_transcriptions",
            ["raw_request=raw_request"],
            "passes the HTTP request of a transcription by its name",
            "no transcription is answered",
        ),
        *rows(
            "hooks",
            "sglang.srt.managers.tokenizer_manager:",
            "TokenizerManager.generate_request(self, obj, request)",
            "is where every request passes, with the HTTP request that it came in",
            "objectives in headers, and those at the top of a body, are ignored",
        ),
        source(
            "assumes",
            "sglang.srt.managers.tokenizer_manager:TokenizerManager.generate_request",
            ["self._set_default_priority(obj)"],
            "gives a request without a priority the server's only there",
            "--default-priority-value counts as if the client had asked for it",
        ),
        *rows(
            "hooks",
            "sglang.srt.managers.tokenizer_manager:",
            "TokenizerManager._create_tokenized_object(self, obj, ...)",
            "is where the objective of every prompt is resolved and written into its custom_params",
            "classes, the policy file and headers have no effect",
        ),
        source(
            "assumes",
            "sglang.srt.managers.tokenizer_manager:TokenizerManager._init_req_state",
            ["created_time = obj.received_time", "time_stats.set_created_time(created_time)"],
            "takes the time at which a request was received from it, also for each of several samples",
            "clients move their deadlines, and those of several samples count from when their prompt was prefilled",
        ),
        source(
            "assumes",
            "sglang.srt.managers.io_struct:GenerateReqInput.__getitem__",
            ["received_time=self.received_time"],
            "gives each prompt of a list the time at which the request was received",
            "deadlines of several samples count from when their prompt was prefilled",
        ),
        *attributes(
            "sglang.srt.managers.tokenizer_manager:TokenizerManager",
            "served_model_name",
            "is the model of a request that names none",
            "rules of the policy file that name a model do not fit such requests",
        ),
        *attributes(
            "sglang.srt.managers.tokenizer_manager:TokenizerManager",
            "server_args",
            "says whether this is a decode server, which counts no requests",
            "classes have fewer requests a minute than the policy file says",
        ),
        *attributes(
            "sglang.srt.managers.io_struct:TokenizedGenerateReqInput",
            "sampling_params input_ids input_embeds",
            "is what a prompt's objective is written into, and the prompt",
            "classes, the policy file and headers have no effect",
        ),
        *attributes(
            "sglang.srt.sampling.sampling_params:SamplingParams",
            "custom_params",
            "is what carries an objective to the scheduler",
            "every request has the default objective",
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
            "sampling_params priority",
            "is where the objective of a request belongs, and the priority that stands for one",
            "an objective at the top of a /generate body is ignored",
        ),
        *attributes(
            "sglang.srt.managers.io_struct:GenerateReqInput",
            "received_time",
            "is when a request was received",
            "clients move their deadlines",
        ),
    ),
)
