"""What of SGLang the project uses, found in its sources: imports, names in strings, overrides, attributes.

What an attribute belongs to is told by the name of what it is read of (``req.rid``: a ``Req``), which is a convention
of this project and no proof: a request that is called something else is not found.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

from sgl_flowprefill.contract import Tree

ROOT: Final = Path(__file__).parents[1]
FOLDERS: Final = ("sgl_flowprefill", "patches", "profiling", "bench")
NOT_USES: Final = ("sgl_flowprefill/contract",)
"""The table itself."""

DOTTED: Final = re.compile(r"(sglang|nixl)(\.\w+)+")

MANAGERS: Final = "sglang.srt.managers"
RECEIVERS: Final = {
    "abort_req": f"{MANAGERS}.io_struct:AbortReq",
    "allocator": "sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator",
    "token_to_kv_pool_allocator": "sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator",
    "batch": f"{MANAGERS}.schedule_batch:ScheduleBatch",
    "running_batch": f"{MANAGERS}.schedule_batch:ScheduleBatch",
    "channels": f"{MANAGERS}.scheduler_components.ipc_channels:SchedulerIpcChannels",
    "ipc_channels": f"{MANAGERS}.scheduler_components.ipc_channels:SchedulerIpcChannels",
    "decode_req": "sglang.srt.disaggregation.decode:DecodeRequest",
    "disagg_decode_prealloc_queue": "sglang.srt.disaggregation.decode:DecodePreallocQueue",
    "disagg_prefill_bootstrap_queue": "sglang.srt.disaggregation.prefill:PrefillBootstrapQueue",
    "envs": "sglang.srt.environ:Envs",
    "forward_batch": "sglang.srt.model_executor.forward_batch_info:ForwardBatch",
    "forward_mode": "sglang.srt.model_executor.forward_batch_info:ForwardMode",
    "get_forward()": "sglang.srt.runtime_context:ForwardFlags",
    "grammar_manager": "sglang.srt.constrained.grammar_manager:GrammarManager",
    "grammars": "sglang.srt.constrained.grammar_manager:GrammarManager",
    "invariant_checker": f"{MANAGERS}.scheduler_components.invariant_checker:SchedulerInvariantChecker",
    "kv": f"{MANAGERS}.schedule_batch:ReqKvInfo",
    "load_inquirer": f"{MANAGERS}.scheduler_components.load_inquirer:SchedulerLoadInquirer",
    "metrics_collector": "sglang.srt.observability.metrics_collector:SchedulerMetricsCollector",
    "metrics_collector_context": "sglang.srt.observability.metrics_collector:SchedulerMetricsCollectorContext",
    "model_config": "sglang.srt.configs.model_config:ModelConfig",
    "model_runner": "sglang.srt.model_executor.model_runner:ModelRunner",
    "_model_runner": "sglang.srt.model_executor.model_runner:ModelRunner",
    "runner": "sglang.srt.model_executor.model_runner:ModelRunner",
    "kv_index_translator": "sglang.srt.mem_cache.kv_index_translator:KVIndexTranslator",
    "ngram_embedding_manager": (
        "sglang.srt.model_executor.model_runner_components.ngram_embedding_manager:NgramEmbeddingManager"
    ),
    "output_streamer": f"{MANAGERS}.scheduler_components.output_streamer:SchedulerOutputStreamer",
    "recv_req": f"{MANAGERS}.io_struct:AbortReq",
    "req": f"{MANAGERS}.schedule_batch:Req",
    "req_to_token_pool": "sglang.srt.mem_cache.memory_pool:ReqToTokenPool",
    "sampling_params": "sglang.srt.sampling.sampling_params:SamplingParams",
    "scheduler": f"{MANAGERS}.scheduler:Scheduler",
    "_scheduler": f"{MANAGERS}.scheduler:Scheduler",
    "time_stats": "sglang.srt.observability.req_time_stats:SchedulerReqTimeStats",
    "token_to_kv_pool": "sglang.srt.mem_cache.memory_pool:KVCache",
    "tp_group": "sglang.srt.distributed.parallel_state:GroupCoordinator",
    "tp_worker": f"{MANAGERS}.tp_worker:TpModelWorker",
    "trace_ctx": "sglang.srt.observability.trace:TraceReqContext",
    "tree_cache": "sglang.srt.mem_cache.base_prefix_cache:BasePrefixCache",
    "watchdog": "sglang.srt.utils.watchdog:WatchdogRaw",
    "weight_updater": f"{MANAGERS}.scheduler_components.weight_updater:SchedulerWeightUpdaterManager",
}
"""Name of a variable or attribute, or of a function that is called: the class that it is of, everywhere."""

SUBCLASSED: Final = (":Scheduler", ":SchedulerOutputStreamer")
"""Classes of which the project's objects are of a subclass, with attributes of its own."""

NOT_SGLANGS: Final = {
    "batch": {"bench/", "sgl_flowprefill/policy/", "sgl_flowprefill/ttft/"},
    "kv": {"bench/"},
    "req": {"bench/"},
    "scheduler": {"bench/", "sgl_flowprefill/policy/"},
    "watchdog": {"bench/", "sgl_flowprefill/cluster/"},
    "runner": {"bench/", "sgl_flowprefill/cluster/"},
}
"""Where such a name is something else."""


@dataclass
class Uses:
    """What was found, each with a place where it was: ``module.Qualified.name`` with dots throughout."""

    imported: dict[str, str] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    """In strings: targets of hooks, modules that are started."""
    overridden: dict[str, str] = field(default_factory=dict)
    read: dict[str, str] = field(default_factory=dict)
    """Attributes, methods that are called among them."""
    overriding: dict[str, str] = field(default_factory=dict)
    """The project's own symbol that overrides each, as ``module:Class.name``."""
    called: set[str] = field(default_factory=set)
    """Names of all that is called, of whatever it is."""
    words: set[str] = field(default_factory=set)
    """All attributes, keywords and strings, of whatever they are."""

    @property
    def all(self) -> dict[str, str]:
        return self.imported | self.named | self.overridden | self.read


def find_uses(tree: Tree, root: Path = ROOT) -> Uses:
    """All uses in the sources of the project."""
    uses = Uses()
    modules = dict(_modules(root))
    classes = _subclasses(tree, modules)
    own = _own_names(classes)
    for path, module in modules.items():
        _Module(tree, path, module, uses, classes, own).find()
    return uses


def _modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    files = [root / "launch.py", *(file for folder in FOLDERS for file in sorted((root / folder).rglob("*.py")))]
    seen: set[Path] = set()
    for file in files:
        name, real = str(file.relative_to(root)), file.resolve()
        if file.is_file() and real not in seen and not name.startswith(NOT_USES):
            seen.add(real)  # what is linked into the package is one file
            yield str(real.relative_to(root.resolve())), _parsed(file.read_text())


@cache
def _parsed(text: str) -> ast.Module:
    """Most files of a copy of the project are as they are here."""
    return ast.parse(text)


def _imports(module: ast.Module) -> dict[str, str]:
    """Name in the module: what it is, with dots."""
    found = {}
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
    return found


@dataclass
class Subclass:
    """A class of the project below one of SGLang's."""

    path: str
    node: ast.ClassDef
    bases: list[str]
    """SGLang's, as targets."""


def _subclasses(tree: Tree, modules: dict[str, ast.Module]) -> dict[str, Subclass]:
    """By name: names of classes are unique in this project where they are below SGLang's."""
    found: dict[str, Subclass] = {}
    classes = [
        (path, node, imports)
        for path, module in modules.items()
        for imports in [_imports(module)]
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef)
    ]
    size = -1
    while size != len(found):
        size = len(found)
        for path, node, imports in classes:
            if node.name in found:
                continue
            names = [base.id for base in node.bases if isinstance(base, ast.Name)]
            bases = [target(tree, imports[n]) for n in names if imports.get(n, "").startswith("sglang.")]
            bases += [base for n in names if n in found for base in found[n].bases]
            if bases:
                found[node.name] = Subclass(path, node, [base for base in bases if base])
    return found


def _own_names(classes: dict[str, Subclass]) -> set[str]:
    """What the project's subclasses define or set under names that SGLang cannot have meant."""
    own = set()
    for subclass in classes.values():
        for node in ast.walk(subclass.node):
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _receiver(node) == "self":
                own.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
    return own


def target(tree: Tree, dotted: str) -> str:
    """``module:Qualified.name`` of a name with dots; empty if no module of SGLang begins it."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        if tree.module(".".join(parts[:cut])) is not None:
            return f"{'.'.join(parts[:cut])}:{'.'.join(parts[cut:])}"
    return ""


def _receiver(node: ast.Attribute) -> str:
    value = node.value
    if isinstance(value, ast.Call):
        return f"{_last(value.func)}()"
    return _last(value)


def _last(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _importable(path: str) -> str:
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.startswith("sgl_flowprefill") else f"sgl_flowprefill.{name}"


def parts_checked(root: Path = ROOT) -> set[str]:
    """Names of the parts that ``expect`` and ``require`` are called with, as strings or as a module's ``SEAM``."""
    found: set[str] = set()
    for _, module in _modules(root):
        seams = {
            node.target.id: node.value.value
            for node in module.body
            if isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and _last(node.func) in ("expect", "require"):
                for argument in ast.walk(node):
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        found.add(argument.value)
                    elif isinstance(argument, ast.Name) and argument.id in seams:
                        found.add(str(seams[argument.id]))
    return found


def copy_project(folder: Path) -> None:
    """A copy of the project's sources in ``folder``."""
    for name in ("launch.py", *FOLDERS):
        source = ROOT / name
        if source.is_dir():
            links = [link.name for link in source.iterdir() if link.is_symlink()]
            ignore = shutil.ignore_patterns(*links, "__pycache__", "results")
            shutil.copytree(source, folder / name, ignore=ignore, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(source, folder / name)


class _Module:
    def __init__(
        self,
        tree: Tree,
        path: str,
        module: ast.Module,
        uses: Uses,
        classes: dict[str, Subclass],
        own: set[str],
    ) -> None:
        self._tree, self._path, self._module, self._uses = tree, path, module, uses
        self._classes, self._own = classes, own
        self._imports = _imports(module)

    def find(self) -> None:
        for node in ast.walk(self._module):
            if isinstance(node, ast.ImportFrom):
                self._imported(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self._string(node)
            elif isinstance(node, ast.Attribute):
                self._attribute(node)
            elif isinstance(node, ast.Call):
                self._uses.called.add(_last(node.func))
            elif isinstance(node, ast.keyword) and node.arg:
                self._uses.words.add(node.arg)
            elif isinstance(node, ast.ClassDef) and node.name in self._classes:
                self._subclass(self._classes[node.name])

    def _at(self, node: ast.AST) -> str:
        return f"{self._path}:{getattr(node, 'lineno', 0)}"

    def _imported(self, node: ast.ImportFrom) -> None:
        if not (node.module or "").startswith("sglang"):
            return
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if self._tree.module(name) is None:  # names of a module are found where they are read of it
                self._uses.imported[name] = self._at(node)

    def _string(self, node: ast.Constant) -> None:
        self._uses.words.add(node.value)
        if DOTTED.fullmatch(node.value):
            self._uses.named[node.value] = self._at(node)

    def _attribute(self, node: ast.Attribute) -> None:
        self._uses.words.add(node.attr)
        receiver = _receiver(node)
        imported = self._imports.get(receiver, "")
        if imported.startswith("sglang.") and receiver not in RECEIVERS and isinstance(node.value, ast.Name):
            self._uses.read[f"{imported}.{node.attr}"] = self._at(node)
            return
        owner = RECEIVERS.get(receiver)
        if owner is None or any(self._path.startswith(place) for place in NOT_SGLANGS.get(receiver, ())):
            return
        if owner.endswith(SUBCLASSED) and node.attr in self._own and not self._tree.attribute(owner, node.attr):
            return
        if not node.attr.startswith("__"):
            self._uses.read[f"{owner.replace(':', '.')}.{node.attr}"] = self._at(node)

    def _subclass(self, subclass: Subclass) -> None:
        names: dict[str, ast.AST] = {}
        for node in subclass.node.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names[node.name] = node
            elif isinstance(node, ast.Assign):
                names |= {name.id: node for name in node.targets if isinstance(name, ast.Name)}
        for name, node in names.items():
            owner = self._base_with(subclass, name)
            if owner is not None:
                overridden = f"{owner.replace(':', '.')}.{name}"
                self._uses.overridden[overridden] = self._at(node)
                self._uses.overriding[overridden] = f"{_importable(subclass.path)}:{subclass.node.name}.{name}"
        for node in ast.walk(subclass.node):
            if isinstance(node, ast.Attribute) and _receiver(node) in ("self", "super()") and node.attr not in names:
                owner = self._base_with(subclass, node.attr)
                if owner is not None:
                    self._uses.read[f"{owner.replace(':', '.')}.{node.attr}"] = self._at(node)

    def _base_with(self, subclass: Subclass, name: str) -> str | None:
        return next((base for base in subclass.bases if self._tree.attribute(base, name)), None)
