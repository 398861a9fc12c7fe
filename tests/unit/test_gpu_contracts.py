"""What FlowPrefill relies on in SGLang's and FlashInfer's GPU code, checked on the installed sources without a GPU.

Where the code can run on a CPU it is run: the three attention backends are built, several times, as for tasks that live
at the same time, and their state is compared tensor by tensor. The rest is read: a contract is a statement about a
function's source, and each comes with a change to that source that must break it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import files
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")
pytest.importorskip("flashinfer")

from sgl_flowprefill import compat, plugin
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.contract.parts.loop import LOOP_CALLS
from sgl_flowprefill.patches.base import SeamError
from sgl_flowprefill.runtime.flashinfer_tiles import MOST_TILES, WORKSPACE_BYTES
from sgl_flowprefill.runtime.memory import MIB
from sgl_flowprefill.runtime.prefill_role import PrefillRole
from sgl_flowprefill.runtime.slots import AttentionSlots
from sgl_flowprefill.runtime.tiled_attention import TiledAttention
from tests.gpu_backends import (
    ATTENTION,
    FLOAT_WORKSPACE_BYTES,
    Anything,
    build,
    go_offline,
    kernel_names,
    model_runner,
)

# ---- attention backends, built ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with kernel_names():
        yield


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    return go_offline(monkeypatch)


def state(root: Any, shared: tuple[Any, ...]) -> tuple[dict[int, torch.Tensor], set[int]]:
    """Tensors reachable from ``root`` by storage, and ids of mutable containers; not through ``shared`` or classes."""
    tensors: dict[int, torch.Tensor] = {}
    containers: set[int] = set()
    seen = {id(item) for item in shared}
    queue = [root]
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, (type, ModuleType, str, bytes, int, float)) or item is None:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if item.numel():
                tensors[item.untyped_storage().data_ptr()] = item
        elif isinstance(item, (list, tuple, dict, set)):
            if isinstance(item, (list, dict, set)):
                containers.add(id(item))
            queue.extend(item.values() if isinstance(item, dict) else item)
        elif inspect.ismethod(item):
            queue.append(item.__self__)
        elif hasattr(item, "__dict__") and not callable(item):
            queue.extend(vars(item).values())
    return tensors, containers


@pytest.mark.parametrize("window", [None, 32], ids=["full", "sliding-window"])
@pytest.mark.parametrize("name", ["flashinfer", "triton", "fa3"])
def test_backends_of_two_tasks_share_the_pools_and_the_float_workspace_only(
    name: str, window: int | None, offline: dict[str, torch.Tensor]
) -> None:
    runner = model_runner(window)
    pools = (runner, runner.model_config, runner.req_to_token_pool, runner.req_to_token_pool.req_to_token,
             runner.token_to_kv_pool, runner.token_to_kv_pool_allocator, runner.kv_index_translator)  # fmt: skip
    first, second = build(name, runner), build(name, runner)
    (mine, my_lists), (others, other_lists) = state(first, pools), state(second, pools)
    common = {pointer: tensor for pointer, tensor in mine.items() if pointer in others}
    assert [id(tensor) for tensor in common.values()] == [id(tensor) for tensor in offline.values()]
    assert not my_lists & other_lists
    assert first.forward_metadata is None
    own_bytes = sum(tensor.nbytes for pointer, tensor in others.items() if pointer not in common)
    if name == "flashinfer":
        assert list(offline) == ["flashinfer_workspace"]
        assert offline["flashinfer_workspace"].nbytes == FLOAT_WORKSPACE_BYTES
        # Device and pinned host memory: an integer workspace of 8 MiB in each of the ragged wrapper and, for each kind
        # of layer, the paged, the verifying and the decoding wrapper (docs/gpu.md).
        wrappers = 1 + 3 * (2 if window else 1)
        assert wrappers * 16 * MIB <= own_bytes < wrappers * 17 * MIB
    else:
        assert not offline
        assert own_bytes < 64 << 10


def test_a_slot_with_a_workspace_of_its_own_would_take_as_much_again(offline: dict[str, torch.Tensor]) -> None:
    """Why slots are made with ``init_new_workspace=False``."""
    from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

    runner = model_runner()
    backend = FlashInferAttnBackend(runner, init_new_workspace=True)
    assert backend.workspace_buffer.nbytes == FLOAT_WORKSPACE_BYTES
    assert backend.workspace_buffer is not offline["flashinfer_workspace"]


@pytest.mark.parametrize("window", [None, 32], ids=["full", "sliding-window"])
def test_a_slot_is_measured_with_all_that_it_will_take(
    window: int | None, offline: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = model_runner(window)
    runner.kv_index_translator.bind_and_verify_backends = lambda backends: None
    made: list[Any] = []

    def make(init_new_workspace: bool) -> Any:
        assert not init_new_workspace
        made.append(build("flashinfer", runner))
        return made[-1]

    def allocated_bytes() -> int:
        tensors = {pointer: tensor for backend in made for pointer, tensor in state(backend, (runner,))[0].items()}
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())

    monkeypatch.setattr(runner, "_get_attention_backend", make, raising=False)
    slots = AttentionSlots(runner, lambda: None, lambda: 1e9, with_main=False)
    measured_bytes = slots.measure_bytes(allocated_bytes)
    before_bytes = allocated_bytes()
    ready = [slots.take(), slots.take()]
    assert len(made) == len(ready)
    assert all(isinstance(slot, TiledAttention) for slot in ready)
    assert allocated_bytes() == before_bytes, "nothing is left for the first task that takes it"
    slots.take()
    assert allocated_bytes() - before_bytes == measured_bytes
    assert measured_bytes >= MOST_TILES * WORKSPACE_BYTES


class Planned(Exception):
    """A wrapper was asked to plan."""


def test_a_prefill_plans_in_its_own_wrappers(offline: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """``init_forward_metadata`` of one instance leaves the other's wrappers, buffers and metadata alone."""
    runner = model_runner()
    runner.kv_index_translator.pack_read_stream = lambda plan, **kwargs: None
    first, second = build("flashinfer", runner), build("flashinfer", runner)
    planned: list[Any] = []
    for wrapper in (type(first.prefill_wrapper_ragged), type(first.prefill_wrappers_paged[0])):
        monkeypatch.setattr(wrapper, "begin_forward", lambda self, *args, **kwargs: planned.append(self))
    mode = SimpleNamespace(is_decode_or_idle=lambda: False, is_target_verify=lambda: False)
    batch = Anything(
        forward_mode=mode,
        req_pool_indices=torch.tensor([1, 2]),
        seq_lens=torch.tensor([5, 9]),
        seq_lens_cpu=torch.tensor([5, 9]),
        seq_lens_sum=14,
        extend_prefix_lens=torch.tensor([0, 4]),
        extend_prefix_lens_cpu=[0, 4],
        extend_seq_lens_cpu=[5, 5],
    )
    monkeypatch.setattr(sys.modules[type(first).__module__], "is_in_tc_piecewise_cuda_graph", lambda: False)
    first.init_forward_metadata(batch)
    assert planned == [first.prefill_wrapper_ragged, first.prefill_wrappers_paged[0]]
    assert first.forward_metadata.prefill_wrappers[0] is first.prefill_wrappers_paged[0]
    assert second.forward_metadata is None
    assert first.qo_indptr[0][:3].tolist() == [0, 5, 10]
    assert not any(buffer.any() for buffer in (*second.qo_indptr, *second.kv_indptr))


# ---- contracts on source ------------------------------------------------------------------------------------------


def in_order(*fragments: str) -> Callable[[str], bool]:
    """All ``fragments`` occur, one after the other."""

    def holds(source: str) -> bool:
        place = 0
        for fragment in fragments:
            place = source.find(fragment, place)
            if place < 0:
                return False
            place += len(fragment)
        return True

    return holds


def without(*fragments: str) -> Callable[[str], bool]:
    return lambda source: not any(fragment in source for fragment in fragments)


def extend_branch(check: Callable[[str], bool]) -> Callable[[str], bool]:
    """``check`` on what a Triton backend's metadata does for a prefill: the last branch of its first chain."""

    def holds(source: str) -> bool:
        function = ast.parse(textwrap.dedent(source)).body[0]
        assert isinstance(function, ast.FunctionDef)
        chain = next(s for s in function.body if isinstance(s, ast.If) and "is_decode_or_idle" in ast.unparse(s.test))
        while len(chain.orelse) == 1 and isinstance(chain.orelse[0], ast.If):
            chain = chain.orelse[0]
        return check("\n".join(ast.unparse(statement) for statement in chain.orelse))

    return holds


def non_overlap_branch(check: Callable[[str], bool]) -> Callable[[str], bool]:
    """``check`` on what ``run_batch`` does for a plain batch without overlap: the last branch under generation."""

    def holds(source: str) -> bool:
        found = None
        for node in ast.walk(ast.parse(textwrap.dedent(source))):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "self.enable_overlap" and found is None:
                chain = node
                while len(chain.orelse) == 1 and isinstance(chain.orelse[0], ast.If):
                    chain = chain.orelse[0]
                found = chain.orelse
        return found is not None and check("\n".join(ast.unparse(statement) for statement in found))

    return holds


@dataclass(frozen=True)
class Contract:
    """A statement about a function's source, and a change that must break it."""

    statement: str
    target: str
    holds: Callable[[str], bool]
    old: str
    new: str

    def source(self) -> str:
        return inspect.getsource(inspect.unwrap(pkgutil.resolve_name(self.target)))


QUANTIZATION = "sglang.srt.layers.quantization"
BATCH = "sglang.srt.managers.schedule_batch:ScheduleBatch"
PROCESSOR = "sglang.srt.managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor"

CONTRACTS = (
    Contract(
        "a slot asks for the shared float workspace",
        "sglang.srt.model_executor.model_runner:ModelRunner._get_attention_backend",
        in_order("init_new_workspace: bool = False", "model_runner=self, init_new_workspace=init_new_workspace"),
        "init_new_workspace=init_new_workspace", "init_new_workspace=True",
    ),
    Contract(
        "and the backend gets that wish through the model runner",
        f"{ATTENTION}.attention_registry:create_flashinfer_backend",
        in_order("FlashInferAttnBackend(", "runner, init_new_workspace=runner.init_new_workspace"),
        "runner.init_new_workspace", "True",
    ),
    Contract(
        "latent attention shares its float workspace always",
        f"{ATTENTION}.flashinfer_mla_backend:FlashInferMLAAttnBackend.__init__",
        in_order('self.workspace_buffer = get_buffer(', '"flashinfer_mla_workspace"',
                 "BatchPrefillWithRaggedKVCacheWrapper(", "self.workspace_buffer"),
        "get_buffer(", "dict(",
    ),
    Contract(
        "a forward pass finds its backend in the context that the model runner opens with its own",
        "sglang.srt.model_executor.model_runner:ModelRunner._forward_raw",
        in_order("ForwardContext(attn_backend=self.attn_backend)"),
        "ForwardContext(attn_backend=self.attn_backend)", "ForwardContext(attn_backend=BACKEND)",
    ),
    Contract(
        "a Triton prefill's metadata needs no answer from the device",
        f"{ATTENTION}.triton_backend:TritonAttnBackend.init_forward_metadata",
        extend_branch(lambda source: ".item()" not in source and ".cpu()" not in source and ".tolist()" not in source),
        "custom_mask = None\n            mask_indptr = None\n            attn_logits = None",
        "custom_mask = qo_indptr.tolist()\n            mask_indptr = None\n            attn_logits = None",
    ),
    Contract(
        "FA3's metadata takes lengths from their copies on the host",
        f"{ATTENTION}.flashattention_backend:FlashAttentionBackend.init_forward_metadata",
        in_order("seq_lens_cpu = forward_batch.seq_lens_cpu", "seq_lens_cpu.max().item()"),
        "seq_lens_cpu = forward_batch.seq_lens_cpu", "seq_lens_cpu = forward_batch.seq_lens",
    ),
    Contract(
        "FlashInfer's plan waits for the device only to copy indices that are not on the host",
        "flashinfer:BatchPrefillWithPagedKVCacheWrapper.plan",
        in_order('qo_indptr_host = qo_indptr.to("cpu")', 'paged_kv_indptr.to("cpu")'),
        'qo_indptr.to("cpu")', "qo_indptr_cpu",
    ),
    Contract(
        "a FlashInfer plan is for cached prefixes or for all keys, whose lengths are the same objects as the batch's",
        f"{ATTENTION}.flashinfer_backend:FlashInferIndicesUpdaterPrefill.update_single_wrapper",
        in_order("if use_ragged:", "paged_kernel_lens = prefix_lens\n", "paged_kernel_lens = seq_lens\n",
                 "self.call_begin_forward(", "self.prefill_wrapper_ragged,", "prefill_wrappers[0],",
                 "req_pool_indices,", "paged_kernel_lens,", "paged_kernel_lens_sum,", "seq_lens,", "prefix_lens,"),
        "paged_kernel_lens = prefix_lens\n", "paged_kernel_lens = prefix_lens.clamp(min=1)\n",
    ),
    Contract(
        "beside sliding windows too, where those of the windows themselves are others",
        f"{ATTENTION}.flashinfer_backend:FlashInferIndicesUpdaterPrefill.update_sliding_window",
        in_order("paged_kernel_lens = prefix_lens - effective_start", "paged_kernel_lens = torch.minimum(",
                 "paged_kernel_lens = prefix_lens\n", "paged_kernel_lens = seq_lens\n", "self.call_begin_forward(",
                 "paged_kernel_lens,", "seq_lens,", "prefix_lens,"),
        "paged_kernel_lens = torch.minimum(", "paged_kernel_lens = seq_lens or torch.minimum(",
    ),
    Contract(
        "the batch's rows and keys are planned one after the other, and masks and windows by name",
        f"{ATTENTION}.flashinfer_backend:FlashInferIndicesUpdaterPrefill.call_begin_forward",
        in_order("kv_indptr[1 : bs + 1] = torch.cumsum(paged_kernel_lens, dim=0)",
                 "qo_indptr[1 : bs + 1] = torch.cumsum(seq_lens - prefix_lens, dim=0)",
                 "wrapper_ragged.begin_forward(", "qo_indptr,", "qo_indptr,",
                 'paged_plan_kwargs["window_left"] = window_left', "wrapper_paged.begin_forward(", "qo_indptr,",
                 "kv_indptr,", "kv_indices,", "self.kv_last_page_len[:bs],", "custom_mask=use_custom_mask",
                 "prefix_len_ptr=prefix_len_ptr"),
        "torch.cumsum(seq_lens - prefix_lens, dim=0)", "torch.cumsum(seq_lens, dim=0)",
    ),
    Contract(
        "in pages of one token, each full",
        f"{ATTENTION}.flashinfer_backend:FlashInferAttnBackend.__init__",
        in_order("self.kv_last_page_len = torch.ones("),
        "self.kv_last_page_len = torch.ones(", "self.kv_last_page_len = torch.zeros(",
    ),
    Contract(
        "FlashInfer's wrappers are run by the methods that tiles stand before, keys and values after the queries",
        f"{ATTENTION}.flashinfer_backend:FlashInferAttnBackend.forward_extend",
        in_order("prefill_wrapper_paged.forward(", "q.view(", "kv_cache,", "causal=causal", "window_left=",
                 "self.prefill_wrapper_ragged.forward(", "q.view(", "k.view(", "v.view(", "causal=causal",
                 "self.prefill_wrapper_ragged.forward_return_lse(", "window_left=swa_window_left",
                 "prefill_wrapper_paged.forward_return_lse(", "kv_cache,", "causal=False"),
        "self.prefill_wrapper_ragged.forward(", "self.prefill_wrapper_ragged.run(",
    ),
    Contract(
        "a tile's plan can be given an integer workspace of its own",
        "flashinfer:BatchPrefillWithRaggedKVCacheWrapper.reset_workspace_buffer",
        in_order("self._int_workspace_buffer = int_workspace_buffer",
                 "self._pin_memory_int_workspace_buffer = torch.empty("),
        "self._pin_memory_int_workspace_buffer = torch.empty(", "self._pin_memory = torch.empty(",
    ),
    Contract(
        "the same for a paged one",
        "flashinfer:BatchPrefillWithPagedKVCacheWrapper.reset_workspace_buffer",
        in_order("self._int_workspace_buffer = int_workspace_buffer",
                 "self._pin_memory_int_workspace_buffer = torch.empty("),
        "self._int_workspace_buffer = int_workspace_buffer", "pass",
    ),
    Contract(
        "FA3 takes a batch's rows and keys from its metadata, and stores keys and values only if it is given them",
        f"{ATTENTION}.flashattention_backend:FlashAttentionBackend.forward_extend",
        lambda source: in_order(
            "if k is not None:", "set_kv_buffer(", "metadata = self.forward_metadata",
            "cu_seqlens_q = metadata.cu_seqlens_q", "cache_seqlens = metadata.cache_seqlens_int32",
            "max_seqlen_q = metadata.max_seq_len_q",
            "result = flash_attn_with_kvcache(", "cu_seqlens_q=cu_seqlens_q,",
        )(source) and without("scheduler_metadata")(source),
        "if k is not None:", "if save_kv_cache:",
    ),
    Contract(
        "a cached prefix is sent before its request's forward pass, and not as its last part",
        "sglang.srt.disaggregation.prefill:SchedulerDisaggregationPrefillMixin.maybe_send_cached_prefix_chunk",
        in_order("SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX.get()", "not allow_send",
                 "self.send_kv_chunk(req, last_chunk=False"),
        "last_chunk=False", "last_chunk=True",
    ),
    Contract(
        "where the sender takes indices that are on their way, nothing waits for them",
        "sglang.srt.disaggregation.prefill:SchedulerDisaggregationPrefillMixin._send_kv_chunk",
        in_order("supports_host_tensor_indices", "page_indices.copy_(page_indices_dev, non_blocking=True)", "else:",
                 "kv_to_page_indices(kv_indices, page_size)"),
        "non_blocking=True", "non_blocking=False",
    ),
    Contract(
        "a plan is in the wrapper's own integer workspace",
        "flashinfer:BatchPrefillWithPagedKVCacheWrapper.__init__",
        in_order("self._int_workspace_buffer = torch.empty(", "self._pin_memory_int_workspace_buffer = torch.empty("),
        "self._int_workspace_buffer = torch.empty(", "self._int_workspace_buffer = _shared(",
    ),
    Contract(
        "the same for the ragged wrapper",
        "flashinfer:BatchPrefillWithRaggedKVCacheWrapper.__init__",
        in_order("self._int_workspace_buffer = torch.empty(", "self._pin_memory_int_workspace_buffer = torch.empty("),
        "self._pin_memory_int_workspace_buffer = torch.empty(", "self._pin_memory_int_workspace_buffer = _shared(",
    ),
    Contract(
        "without overlap a batch's results are not copied and nothing waits for them",
        "sglang.srt.managers.scheduler:Scheduler.run_batch",
        non_overlap_branch(
            without("copy_to_cpu(", ".synchronize(", ".tolist()", ".item()", "copy_done", "forward_stream")
        ),
        "self.update_cache_from_scheduler(batch, batch_result)\n                self._copy_auxiliary",
        "batch_result.next_token_ids.tolist()\n                self._copy_auxiliary",
    ),
    Contract(
        "their copies are queued on the current stream, and the event behind them",
        "sglang.srt.managers.utils:GenerationBatchResult.copy_to_cpu",
        in_order("return_logprob: bool, return_hidden_states: bool",
                 "self.next_token_ids = _async_d2h(self.next_token_ids)", "self.copy_done.record()"),
        "self.copy_done.record()", "pass",
    ),
    Contract(
        "into pinned memory, without waiting",
        "sglang.srt.utils.common:async_d2h",
        in_order("pin_memory=True", "copy_(tensor, non_blocking=True)", "record_stream("),
        "non_blocking=True", "non_blocking=False",
    ),
    Contract(
        "a result is processed after its copy",
        "sglang.srt.disaggregation.prefill:SchedulerDisaggregationPrefillMixin.process_batch_result_disagg_prefill",
        in_order("copy_done.synchronize()", "result.next_token_ids.tolist()", "self.send_kv_chunk("),
        "copy_done.synchronize()", "pass",
    ),
    Contract(
        "FP8 activations without a constant scale get one a row, so tiles of rows compute what the whole would",
        f"{QUANTIZATION}.fp8_utils:apply_fp8_linear",
        in_order("# default use per-token quantization if dynamic", "if _is_cuda:",
                 "qinput, x_scale = sglang_per_token_quant_fp8(input_2d)", "else:"),
        "if _is_cuda:", "if False:",
    ),
    Contract(
        "also those of compressed-tensors checkpoints",
        f"{QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_w8a8_fp8:CompressedTensorsW8A8Fp8.apply_weights",
        lambda source: source.count("use_per_token_if_dynamic=True") == source.count("_linear(") - 1 == 3,
        "use_per_token_if_dynamic=True", "use_per_token_if_dynamic=False",
    ),
    Contract(
        "and those of an MLP whose two matrices are multiplied at once",
        "sglang.srt.layers.dual_gemm:DualGemm.__call__",
        in_order("scaled_fp8_quant(", "gate_up_proj.input_scale", "use_per_token_if_dynamic=True"),
        "use_per_token_if_dynamic=True", "use_per_token_if_dynamic=False",
    ),
    Contract(
        "the scheduler's loop runs on one stream",
        "sglang.srt.managers.scheduler:Scheduler.run_event_loop",
        in_order("StreamContext(self.schedule_stream)", "dispatch_event_loop(self)"),
        "StreamContext(self.schedule_stream)", "nullcontext()",
    ),
    Contract(
        "the result of a decode step is waited for by its event before it is read",
        f"{PROCESSOR}.process_batch_result_decode",
        in_order("result.copy_done.synchronize()", "self._normalize_decode_outputs("),
        "result.copy_done.synchronize()", "pass",
    ),
    Contract(
        "a decode step is prepared from lengths on the host",
        f"{BATCH}.prepare_for_decode",
        without(".item()", ".cpu()"),
        "self.seq_lens_cpu = self.seq_lens_cpu + 1", "self.seq_lens_cpu = self.seq_lens.cpu()",
    ),
    Contract(
        "its KV cache is allocated by lengths on the host",
        "sglang.srt.mem_cache.allocation:alloc_for_decode_default",
        without(".item()", ".cpu()", ".tolist()"),
        "seq_lens_cpu=batch.seq_lens_cpu + token_per_req", "seq_lens_cpu=seq_lens_next.cpu()",
    ),
    Contract(
        "streams that have ended leave the running batch by a copy that nothing waits for",
        f"{BATCH}.filter_batch",
        in_order("pin_memory=is_pin_memory_available(self.device)", ".to(self.device, non_blocking=True)"),
        ".to(self.device, non_blocking=True)", ".to(self.device)",
    ),
    Contract(
        "penalties get the last tokens by a copy that nothing waits for",
        f"{BATCH}.cumulate_penalty_output_tokens",
        in_order("pin_memory=is_pin_memory_available(self.device)", ".to(self.device, non_blocking=True)"),
        ".to(self.device, non_blocking=True)", ".to(self.device)",
    ),
    Contract(
        "FlashInfer plans the graph of a decode step by lengths on the host",
        f"{ATTENTION}.flashinfer_backend:FlashInferIndicesUpdaterDecode.call_begin_forward",
        in_order("global_override_indptr_cpu[1 : bs + 1] = torch.cumsum(seq_lens_cpu, dim=0)",
                 "if wrapper_uses_fast_decode_plan:", "global_override_indptr_cpu=global_override_indptr_cpu"),
        "global_override_indptr_cpu=global_override_indptr_cpu", "",
    ),
    Contract(
        "and reads nothing back then",
        "flashinfer.decode:fast_decode_plan",
        in_order("if global_override_indptr_cpu is not None\n        else indptr.cpu()", "if page_size == 1:",
                 "last_page_len_host = torch.ones("),
        "if page_size == 1:", "if False:",
    ),
)  # fmt: skip


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.statement.replace(" ", "-"))
def test_the_installed_source_keeps_the_contract(contract: Contract) -> None:
    source = contract.source()
    assert contract.holds(source), f"no longer true of {contract.target}: {contract.statement}"
    assert contract.old in source, "the change that must break the contract no longer applies"
    assert not contract.holds(source.replace(contract.old, contract.new))


def test_flashinfer_plans_write_nothing_into_the_float_workspace() -> None:
    """Its C++ planner reserves offsets there; what it copies to the device goes into the integer workspace."""
    source = header("include/flashinfer/attention/scheduler.cuh")
    copies = re.findall(r"cudaMemcpyAsync\(\s*([^,]+),", source)
    assert len(copies) >= 3
    assert {copy.strip() for copy in copies} == {"int_buffer"}
    uses = [line.strip() for line in source.splitlines() if "float_buffer" in line]
    reserved = re.compile(
        r"void\* float_buffer|AlignedAllocator\w*[ (].*float_buffer|float_buffer=|, float_buffer,|float_buffer,"
    )
    assert all(reserved.search(line) for line in uses), [line for line in uses if not reserved.search(line)]


def header(name: str) -> str:
    """One of the sources that FlashInfer compiles its kernels from."""
    return next(f for f in files("flashinfer-python") or () if str(f).endswith(name)).read_text()


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("attention/hopper/mainloop_mma.cuh", "return qo_idx + 1 + kv_len - qo_len;"),
        ("attention/hopper/mainloop.cuh", "(q_tile_idx + 1) * CTA_Q + kv_len - qo_len"),
        ("include/flashinfer/attention/prefill.cuh", "kv_idx + qo_len > kv_len + q_idx"),
    ],
)
def test_flashinfer_aligns_the_causal_mask_to_the_ends_of_queries_and_keys(name: str, fragment: str) -> None:
    """So a tile's queries, over the keys up to its end, see what they see in the whole."""
    assert fragment in header(name)


def test_the_workspace_of_a_tile_holds_a_plan_of_as_many_blocks_as_a_tile_may_have() -> None:
    """What FlashInfer's planners put into it for each block of rows: with Hopper's kernels seven indices for each head,
    and one for each multiprocessor; with the others three for each block of packed heads, and one for each row.
    """
    source = header("attention/scheduler.cuh")
    hopper = source[source.index("cudaError_t PrefillSM90Plan(") : source.index("struct HolisticPlanInfo")]
    allocated = re.findall(r"int_allocator\.aligned_alloc_offset\(\s*sizeof\(IdType\) \* \(?([\w ]+[+\w ]*)", hopper)
    assert sorted(a.strip() for a in allocated) == ["max_total_num_works"] * 7 + ["num_sm90_ctas + 1"]
    assert "max_num_works_per_head = ceil_div(total_num_rows, cta_tile_q) + batch_size - 1" in hopper
    other = source[
        source.index("inline cudaError_t PrefillPlanImpl(") : source.index("inline cudaError_t PrefillPlan(")
    ]
    allocated = re.findall(r"int_allocator\.aligned_alloc_offset\(\s*(sizeof\(\w+\)[^,]*),", other)
    assert sorted(a.strip() for a in allocated) == sorted(
        [
            *["sizeof(IdType) * padded_batch_size"] * 3,
            "sizeof(IdType) * (batch_size + 1)",
            "sizeof(IdType)",
            "sizeof(uint32_t)",
            "sizeof(IdType) * (plan_info.total_num_rows + 1)",
            "sizeof(bool) * padded_batch_size",
        ]
    )


def test_flashinfer_wrappers_are_planned_by_the_name_that_tiles_stand_before() -> None:
    import flashinfer

    for wrapper in (flashinfer.BatchPrefillWithRaggedKVCacheWrapper, flashinfer.BatchPrefillWithPagedKVCacheWrapper):
        assert wrapper.begin_forward is wrapper.plan


def test_indices_of_a_cached_prefix_that_is_sent_early_are_read_behind_what_writes_them() -> None:
    """They, and loads of the prefix from host memory, are queued just before, so a second stream would be too early."""
    role: Any = PrefillRole.__new__(PrefillRole)
    aside = object()
    role.device = SimpleNamespace(beside_the_queue=lambda: aside)
    req = object()
    assert role.reading_indices(req, has_run=True) is aside
    assert role.reading_indices(req, has_run=False) is not aside


def test_the_last_part_of_a_requests_kv_is_sent_when_its_prefill_has_run() -> None:
    """Then its indices may be read beside the queue. Elsewhere they are read in it."""
    mixin = pkgutil.resolve_name("sglang.srt.disaggregation.prefill:SchedulerDisaggregationPrefillMixin")
    senders = {
        name
        for name, method in vars(mixin).items()
        if inspect.isfunction(method) and "send_kv_chunk(req, last_chunk=True" in inspect.getsource(method)
    }
    assert senders == {"process_batch_result_disagg_prefill", "process_disagg_prefill_inflight_queue"}
    ours = pkgutil.resolve_name("sgl_flowprefill.runtime.scheduler:FlowPrefillScheduler").send_kv_chunk
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(mixin.send_kv_chunk).parameters)


def test_the_hub_knows_all_that_sglangs_loop_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves out what counts the time for which a server is paused, and staging, which is refused."""
    name = "sglang.srt.managers.scheduler.Scheduler.event_loop_normal_disagg_prefill"
    loop = inspect.getsource(pkgutil.resolve_name(name))
    calls = set(re.findall(r"self\.[\w.]+\(", loop)) - {"self._record_scheduler_state_for_paused_engine("}
    assert calls == {call.partition("(")[0] + "(" for call in LOOP_CALLS}
    monkeypatch.setenv("SGLANG_EAGER_INPUT_NO_COPY", "1")
    monkeypatch.setattr(name, lambda scheduler: None)
    with pytest.raises(SeamError, match="event_loop_normal_disagg_prefill"):
        plugin.take_scheduler_seams(FlowPrefillConfig())


def test_cuda_events_have_what_the_device_uses() -> None:
    methods = {"record", "query", "synchronize", "elapsed_time"}
    assert methods <= set(dir(torch.cuda.Event))
    parameters = inspect.signature(torch.cuda.Event.__new__).parameters
    assert parameters["enable_timing"].default is False
    for name in ("empty_cache", "memory_allocated", "mem_get_info", "current_stream"):
        assert callable(getattr(torch.cuda, name))


def test_results_carry_what_the_hub_waits_for() -> None:
    from sglang.srt.managers.utils import GenerationBatchResult

    assert GenerationBatchResult().copy_done is None
    batch = pkgutil.resolve_name("sglang.srt.managers.schedule_batch:ScheduleBatch")
    assert {"return_logprob", "return_hidden_states"} <= set(batch.__dataclass_fields__)


def checked_classes() -> Iterator[tuple[str, Any]]:
    for name in ("flashinfer", "fa3", "triton", "torch_native"):
        yield name, pkgutil.resolve_name(f"{ATTENTION}.attention_registry:ATTENTION_BACKENDS")[name]


def test_every_checked_backend_is_one_that_sglang_offers() -> None:
    assert {name for name, factory in checked_classes() if callable(factory)} == set(
        compat.CHECKED_ATTENTION_BACKENDS
    ) - {"flowprefill_cpu"}


def test_what_sglang_offers_beyond_that_is_refused_by_name() -> None:
    offered = importlib.import_module("sglang.srt.arg_groups.choices").ATTENTION_BACKEND_CHOICES
    unchecked = set(offered) - set(compat.CHECKED_ATTENTION_BACKENDS)
    assert {"trtllm_mha", "flashmla", "fa4"} <= unchecked
    for name in unchecked:
        sentence = compat.unchecked_attention_backend(name)
        assert sentence is not None
        assert f"--attention-backend {name} cannot work" in sentence
    assert compat.unchecked_attention_backend(None) is None
