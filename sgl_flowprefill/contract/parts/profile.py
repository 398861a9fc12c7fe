"""Rows of the contract: profiles and the doctor's checks of a device."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import CONTEXT, MODEL_RUNNER, OPTIONS, REQ, SCHEDULER

OTHER_KERNELS: Final = "a server predicts with a profile of other kernels"

PART: Final = Part(
    "profile",
    "Profiles and the doctor's checks of a device",
    ("launcher",),
    (
        *rows(
            "calls",
            "sglang.srt.plugins:",
            "load_plugins()",
            "makes a process that measures one like a server's",
            "`launch.py profile` and `doctor` do not start",
        ),
        *rows(
            "calls",
            CONTEXT,
            "SpawnRanks publish(server_args, role, hf_config, ranks, ...) get_disagg()",
            "tells a process what it is",
            "`launch.py profile` and `doctor` do not start",
        ),
        *attributes(
            f"{CONTEXT}SpawnRanks",
            "world_rank dp_rank gpu_id",
            "tells a process what it is",
            "`launch.py profile` and `doctor` do not start",
        ),
        *rows(
            "calls",
            "sglang.srt.server_args:",
            "PortArgs PortArgs.init_new(server_args, ...) prepare_server_args(argv) ServerArgs.resolve_once(self)",
            "makes the options of a server",
            "`launch.py profile` and `doctor` do not start",
        ),
        *attributes(
            OPTIONS,
            "base_gpu_id",
            "is the GPU that is measured",
            "`launch.py profile` and `doctor` do not start",
        ),
        *rows(
            "calls",
            "sglang.srt.managers.schedule_batch:",
            "Req Req.__init__(self, rid, origin_input_text, origin_input_ids, sampling_params, ...)",
            "is a prompt that is measured",
            "no server has a TTFT model: nothing can be measured",
        ),
        *attributes(
            REQ,
            "start_send_idx",
            "keeps a cached prefix from being sent",
            "nothing can be measured",
        ),
        *rows(
            "calls",
            "sglang.srt.sampling.sampling_params:",
            "SamplingParams SamplingParams.normalize(self, tokenizer)",
            "is how a prompt is answered",
            "nothing can be measured",
        ),
        *attributes(
            "sglang.srt.sampling.sampling_params:SamplingParams",
            "temperature max_new_tokens ignore_eos custom_params",
            "is how a prompt is answered",
            "nothing can be measured",
        ),
        *rows(
            "calls",
            "sglang.srt.mem_cache.common:",
            "release_kv_cache(req, tree_cache, checkpoint)",
            "frees what has been measured, or leaves it as a cached prefix",
            "nothing can be measured",
        ),
        *rows(
            "calls",
            SCHEDULER,
            "flush_cache(self, ...)",
            "empties the radix cache before a prefix is cached",
            "`launch.py profile` cannot measure cached prefixes",
        ),
        *attributes(
            SCHEDULER,
            "device_module schedule_stream token_to_kv_pool_allocator",
            "is what a server runs on, and holds its KV cache",
            "`launch.py gpu-report`, `profile` and `doctor` measure nothing",
        ),
        *attributes(
            MODEL_RUNNER,
            "decode_cuda_graph_runner eager_runner",
            "tells whether decode steps run as CUDA graphs",
            "`launch.py gpu-report` does not measure decode steps",
        ),
        *attributes(MODEL_RUNNER, "kv_cache_dtype_str", "is the data type of the KV cache", OTHER_KERNELS),
        *attributes(
            "sglang.srt.configs.model_config:ModelConfig",
            "quantization",
            "says how weights are stored and computed",
            OTHER_KERNELS,
        ),
        *rows("calls", CONTEXT, "get_exec()", "shows the options of kernels", OTHER_KERNELS),
        *attributes(OPTIONS, "moe_runner_backend", "says which kernels experts have", OTHER_KERNELS),
        source(
            "assumes",
            "sglang.srt.entrypoints.engine:_set_envs_and_config",
            ['os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"', 'os.environ["TRTLLM_ENABLE_PDL"] = "1"'],
            "is what a server's first process sets for its scheduler, and a scheduler that measures has it, too",
            "`launch.py gpu-report`, `profile` and `doctor` measure under other settings than a server runs with",
        ),
        *attributes(
            "sglang.srt.configs.model_config:ModelConfig",
            "num_hidden_layers",
            "tells how many layers a forward pass has",
            "`launch.py gpu-report` measures nothing",
        ),
    ),
)
