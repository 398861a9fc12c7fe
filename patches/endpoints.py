"""Where SGLang's HTTP server answers requests for text. All of these end with the HTTP request as an argument, which
``TRANSCRIPTIONS`` has as ``raw_request``.
"""

from __future__ import annotations

from typing import Final

GENERATE: Final = "sglang.srt.entrypoints.http_server.serve_generate_request"
"""/generate and /vertex_generate."""
OPENAI: Final = "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request"
"""/v1/completions, /v1/chat/completions, and others of OpenAI's, transcriptions among them."""
TRANSCRIPTIONS: Final = (
    "sglang.srt.entrypoints.openai.serving_transcription.OpenAIServingTranscription.create_transcription"
)
RESPONSES: Final = "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses"
MESSAGES: Final = "sglang.srt.entrypoints.anthropic.serving.AnthropicServing.handle_messages"
OLLAMA_CHAT: Final = "sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_chat"
OLLAMA_GENERATE: Final = "sglang.srt.entrypoints.ollama.serving.OllamaServing.handle_generate"
