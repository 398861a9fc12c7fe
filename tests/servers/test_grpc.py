"""SGLang's gRPC server beside HTTP (``--grpc-port``): the objectives of its requests, and from when they count.

The server is part of SGLang's wheel, which has no client. The messages here are those of its service, as far as they
are asked for. It is a server of its own: with ``--enable-trace``, as the others are started, SGLang answers OpenAI
requests over gRPC with a 500.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from sgl_flowprefill.cluster import Cluster, ClusterConfig
from sgl_flowprefill.cluster.free_ports import free_port
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.events import Arrival
from tests.reference import TOKENS, Comparison
from tests.servers.conftest import QUICK_START, SLO_POLICY
from tests.servers.test_unified_server import model_of, seen_by_the_scheduler

SERVICE: Final = "/sglang.runtime.v1.SglangService/"
PROMPT: Final = " bake lomi tura"
TEXT, BYTES, INTEGER = (
    FieldDescriptorProto.TYPE_STRING,
    FieldDescriptorProto.TYPE_BYTES,
    FieldDescriptorProto.TYPE_INT32,
)
MESSAGES: Final[dict[str, tuple[tuple[str, int, Any], ...]]] = {
    "Entry": (("key", 1, TEXT), ("value", 2, TEXT)),
    "Sampling": (("max_new_tokens", 8, INTEGER),),
    "OpenAIRequest": (("json_body", 1, BYTES), ("trace_headers", 2, "Entry")),
    "OpenAIStreamChunk": (("json_chunk", 1, BYTES), ("status_code", 3, INTEGER)),
    "TextGenerateRequest": (("text", 1, TEXT), ("sampling_params", 2, "Sampling"), ("priority", 15, INTEGER)),
    "TextGenerateResponse": (("text", 1, TEXT), ("meta_info", 2, "Entry")),
}
"""Fields, their numbers, and the types of scalars; of others, of which there may be many, the name of a message."""
Call = Callable[[str, Any], list[Any]]


def _classes() -> dict[str, Any]:
    file = FileDescriptorProto(name="asked.proto", package="asked", syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            added = message.field.add(name=field, number=number)
            if isinstance(kind, str):
                added.label, added.type = FieldDescriptorProto.LABEL_REPEATED, FieldDescriptorProto.TYPE_MESSAGE
                added.type_name = f".asked.{kind}"
            else:
                added.label, added.type = FieldDescriptorProto.LABEL_OPTIONAL, kind
    pool = DescriptorPool()
    pool.Add(file)
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"asked.{name}")) for name in MESSAGES}


CLASSES: Final = _classes()
ANSWERS: Final = {"Complete": "OpenAIStreamChunk", "TextGenerate": "TextGenerateResponse"}


def take_all(channel: grpc.Channel, method: str, request: Any) -> list[Any]:
    """All that the server answers."""
    call = channel.unary_stream(
        SERVICE + method,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=CLASSES[ANSWERS[method]].FromString,
    )
    return list(call(request, timeout=60))


@pytest.fixture(scope="module")
def grpc_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("grpc")
    policy = folder / "slo-policy.yaml"
    policy.write_text(SLO_POLICY)
    options = FlowPrefillConfig(event_log=str(folder / "events.jsonl"), exploration_share=0, slo_policy=str(policy))
    config = ClusterConfig(
        flowprefill=True,
        prefill=0,
        decode=0,
        unified=1,
        server_args=("--grpc-port", str(free_port("127.0.0.1"))),
        log_dir=folder,
        options=options,
    )
    with pytest.MonkeyPatch.context() as environment:
        for name, value in QUICK_START.items():
            environment.setenv(name, value)
        with Cluster(config, on_progress=print) as cluster:
            yield cluster


@pytest.fixture
def call(grpc_server: Cluster) -> Iterator[Call]:
    [_, port] = grpc_server.config.server_args
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        grpc.channel_ready_future(channel).result(timeout=30)
        yield partial(take_all, channel)


def complete(server: Cluster, call: Call, headers: dict[str, str], **asked: Any) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer to an OpenAI request, whose headers are what SGLang calls those of a trace."""
    body = {"model": model_of(server), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0} | asked
    entries = [CLASSES["Entry"](key=name, value=value) for name, value in headers.items()]
    request = CLASSES["OpenAIRequest"](json_body=json.dumps(body).encode(), trace_headers=entries)
    [chunk] = call("Complete", request)
    return chunk.status_code, json.loads(chunk.json_chunk)


def assert_received(arrivals: list[Arrival], start_s: float, end_s: float) -> None:
    for one in arrivals:
        assert start_s <= one.received_s <= end_s
        assert one.deadline_s - one.received_s == pytest.approx(one.ttft_slo_s)


def test_openai_requests_over_grpc_have_the_objectives_of_their_bodies_and_headers(
    grpc_server: Cluster, call: Call, comparison: Comparison
) -> None:
    start_s, header = time.monotonic(), {"x-slo-ttft-ms": "900"}
    asks: list[tuple[dict[str, Any], dict[str, str], tuple[float, str, str]]] = [
        ({"custom_params": {"ttft_slo": 1.5}}, header, (1.5, "default", "body")),
        ({}, header, (0.9, "default", "header x-slo-ttft-ms")),
        ({"priority": 11}, {}, (0.75, "interactive", "priority")),
        ({}, {}, (5.0, "default", "default")),
    ]
    for asked, headers, (ttft_slo_s, _, _) in asks:
        status, answer = complete(grpc_server, call, headers, **asked)
        assert status == 200, answer
        comparison.text("over gRPC", PROMPT, answer["choices"][0]["text"], None)
        assert answer["metadata"]["flowprefill"]["ttft_slo_s"] == ttft_slo_s
    comparison.assert_same()
    arrivals = seen_by_the_scheduler(grpc_server, start_s, len(asks))
    assert [(one.ttft_slo_s, one.slo_class, one.slo_source) for one in arrivals] == [seen for _, _, seen in asks]
    assert_received(arrivals, start_s, time.monotonic())


def test_a_wrong_objective_over_grpc_is_a_400_and_never_scheduled(grpc_server: Cluster, call: Call) -> None:
    start_s = time.monotonic()
    status, answer = complete(grpc_server, call, {}, custom_params={"ttft_slo": -1})
    assert status == 400
    assert "positive, finite number of seconds" in json.dumps(answer)
    complete(grpc_server, call, {})
    assert len(seen_by_the_scheduler(grpc_server, start_s, 1)) == 1


def test_sglangs_own_requests_over_grpc_have_a_class_by_priority_and_count_from_when_they_come(
    grpc_server: Cluster, call: Call
) -> None:
    """They have no place for more, and say themselves when they were received, by the wall clock."""
    start_s, sampling = time.monotonic(), [CLASSES["Sampling"](max_new_tokens=1)]
    for asked in ({"priority": 11}, {}):
        [answer] = call("TextGenerate", CLASSES["TextGenerateRequest"](text=PROMPT, sampling_params=sampling, **asked))
        told = {entry.key: entry.value for entry in answer.meta_info}
        assert json.loads(told["flowprefill"])["met"] is not None
    arrivals = seen_by_the_scheduler(grpc_server, start_s, 2)
    assert [(one.slo_class, one.slo_source) for one in arrivals] == [
        ("interactive", "priority"),
        ("default", "default"),
    ]
    assert_received(arrivals, start_s, time.monotonic())
