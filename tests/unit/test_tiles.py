"""Which modules of a model run in row tiles."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sgl_flowprefill.runtime.checkpoints import DecoderLayer
from sgl_flowprefill.runtime.tiles import (
    TILE_STEP_TOKENS,
    WHOLE,
    TilePlan,
    Tiles,
    TileSizes,
    find_norms,
    has_dense_mlps,
    has_whole_mlps,
    in_tiles,
    longest_mlp_piece,
    tile_layers,
)

ROWS = 20
TILES = Tiles(rows=2, attention_rows=5, norm_rows=10, pairs=1.0)


class RMSNorm(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm()
        self.attention = nn.ModuleDict({"q_norm": RMSNorm(), "project": nn.Linear(3, 3)})
        self.mlp = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer()])
        self.norm = RMSNorm()


class VisionModel(nn.Module):
    """An encoder whose images tensor-parallel ranks may share out, before a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.ModuleDict({"layers": nn.ModuleList([Layer()]), "norm": RMSNorm()})
        self.model = Decoder()


def layer(name: str) -> DecoderLayer:
    return DecoderLayer(name, (f"{name}.attention",), (f"{name}.mlp",))


def interruption_points(model: nn.Module, layers: list[DecoderLayer], module: str) -> int:
    """How many are within one call of ``module``, which computes what it would without tiles."""
    model.double()  # rows cancel each other: single precision would differ by more than the comparison allows
    rows = torch.arange(3 * ROWS, dtype=torch.float64).view(-1, 3)
    expected = model.get_submodule(module)(rows)
    points: list[None] = []
    tile_layers(
        model, layers, find_norms(model, layers), TileSizes(lambda yardstick_s: TILES), lambda: points.append(None)
    )
    assert torch.allclose(model.get_submodule(module)(rows), expected)
    return len(points)


@pytest.mark.parametrize(
    ("module", "points"),
    [
        ("model.layers.0.norm", 2),
        ("model.layers.0.attention.q_norm", 4),
        ("model.layers.0.attention.project", 4),
        ("model.layers.0.mlp", 20),
        ("model.norm", 2),
        ("visual.layers.0.norm", 0),
        ("visual.layers.0.attention.q_norm", 0),
        ("visual.norm", 0),
    ],
)
def test_the_decoder_runs_in_tiles_and_its_encoder_does_not(module: str, points: int) -> None:
    assert interruption_points(VisionModel(), [layer("model.layers.0")], module) == points


def test_the_longest_piece_of_an_mlp_is_its_largest_linear_layer() -> None:
    decoder = Decoder()
    assert longest_mlp_piece(decoder, [layer("layers.0")]) == pytest.approx(1 / 2)
    decoder.layers[0].mlp = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    assert longest_mlp_piece(decoder, [layer("layers.0")]) == pytest.approx(2 / 3)
    decoder.layers[0].mlp = nn.Sequential(RMSNorm())
    assert longest_mlp_piece(decoder, [layer("layers.0")]) == 1.0


def test_a_decoder_that_is_the_whole_model() -> None:
    assert interruption_points(Decoder(), [layer("layers.0")], "norm") == 2


def test_tiles_follow_the_speed_of_the_engine_either_way() -> None:
    sizes = TileSizes(TilePlan(20e-3, layers=4, norms=8, operators=None).tiles, yardstick_s=1.0)
    planned = sizes.now
    assert planned.rows == 128
    sizes.follow(1.0)
    assert sizes.now == planned
    sizes.follow(2.0)
    assert sizes.now.rows == TILE_STEP_TOKENS
    sizes.follow(0.25)
    assert sizes.now.rows == 640
    usual = sizes.now
    sizes.follow(0.25 * 1.02)
    assert sizes.now is usual


def test_what_ranks_agreed_on_counts_though_one_computed_a_little_less() -> None:
    """The last digit of a rank's own time may decide about a step of the tiles."""
    plan = TilePlan(20e-3, layers=4, norms=8, operators=None)
    ranks = [TileSizes(plan.tiles, yardstick_s) for yardstick_s in (1.279999, 1.280001)]
    assert ranks[0].now != ranks[1].now
    for sizes in ranks:
        sizes.follow(1.28)
    assert ranks[0].now == ranks[1].now


def test_operators_that_run_whole_do_so_on_a_slow_machine_too() -> None:
    sizes = TileSizes(lambda yardstick_s: WHOLE)
    sizes.follow(16.0)
    assert sizes.now == WHOLE


@pytest.mark.parametrize(
    ("rows", "points"), [(10, [10]), (3, []), (20, [20]), (21, [16, 21]), (35, [16, 35]), (37, [16, 32, 37])]
)
def test_a_short_rest_belongs_to_the_tile_before_it(rows: int, points: list[int]) -> None:
    done = 0
    seen: list[int] = []

    def forward(tile: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += len(tile)
        return tile

    in_tiles(forward, lambda: 16, lambda: seen.append(done))(torch.zeros(rows, 2))
    assert seen == points


def test_a_layer_that_is_handed_no_tensor_with_rows_runs_whole() -> None:
    """Quantised activations come with their scales, as a tuple."""
    calls: list[object] = []

    def forward(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append((args, kwargs))
        return torch.ones(ROWS, 3)

    tiled = in_tiles(forward, lambda: 2, lambda: None)
    quantised = (torch.ones(ROWS, 3, dtype=torch.int8), torch.ones(ROWS, 1))
    assert tiled(quantised).shape == (ROWS, 3)
    assert tiled(torch.tensor(3.0), quantised).shape == (ROWS, 3)
    assert calls[0] == ((quantised,), {})
    assert len(calls) == 2


@pytest.mark.parametrize(("by_row", "is_exact"), [(True, True), (False, False)])
def test_tiles_of_quantised_activations_are_exact_with_a_scale_of_each_row_only(by_row: bool, is_exact: bool) -> None:
    """What makes a quantisation fit for tiles; test_gpu_contracts reads which one SGLang uses."""
    torch.manual_seed(0)
    weight, rows = torch.randn(16, 8), torch.randn(ROWS, 16) * torch.logspace(-2, 2, ROWS)[:, None]

    def forward(activations: torch.Tensor) -> torch.Tensor:
        largest = activations.abs().amax(dim=1, keepdim=True) if by_row else activations.abs().amax()
        scale = largest / torch.finfo(torch.float8_e4m3fn).max
        return (activations / scale).to(torch.float8_e4m3fn).float() * scale @ weight

    tiled = in_tiles(forward, lambda: 5, lambda: None)
    assert torch.allclose(tiled(rows), forward(rows), rtol=1e-5, atol=1e-5) == is_exact


class Fp8LinearMethod:
    """Stands for SGLang's, which on AMD may give a whole batch one scale."""


class UnquantizedLinearMethod:
    """Stands for SGLang's of a layer that computes with its weights as they are."""


@pytest.mark.parametrize(
    ("hip", "method", "is_tiled"),
    [("6.4", Fp8LinearMethod, False), ("6.4", UnquantizedLinearMethod, True), (None, Fp8LinearMethod, True)],
)
@pytest.mark.parametrize("module", ["layers.0.mlp", "layers.0.attention.project"])
def test_on_amd_a_quantised_layer_runs_whole(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, method: type, is_tiled: bool, module: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    decoder = Decoder()
    for linear in decoder.modules():
        if isinstance(linear, nn.Linear):
            linear.quant_method = method()
    assert (interruption_points(decoder, [layer("layers.0")], module) > 0) == is_tiled


class FusedMoE(nn.Linear):
    """Stands for SGLang's experts."""


def test_within_a_mixture_of_experts_no_task_is_suspended() -> None:
    model = Decoder()
    assert has_dense_mlps(model, [layer("layers.0")])
    model.layers[0].mlp = nn.Sequential(nn.Linear(3, 3), FusedMoE(3, 3))
    assert not has_dense_mlps(model, [layer("layers.0")])
    tile_layers(model, [layer("layers.0")], [], TileSizes(lambda yardstick_s: TILES), pytest.fail)
    model.get_submodule("layers.0.mlp")(torch.ones(ROWS, 3))


class RowParallelLinearWithLoRA(nn.Module):
    """A layer with adapters, as SGLang calls it: it goes through the rows of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(3, 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        assert len(rows) == ROWS
        return self.base_layer(rows)


def test_an_mlp_with_adapters_runs_whole_and_can_be_suspended_between_its_linear_layers() -> None:
    model = Decoder()
    assert not has_whole_mlps(model, [layer("layers.0")])
    model.layers[0].mlp = nn.Sequential(RowParallelLinearWithLoRA(), RowParallelLinearWithLoRA())
    assert has_whole_mlps(model, [layer("layers.0")])
    assert has_dense_mlps(model, [layer("layers.0")])
    points: list[None] = []
    tile_layers(model, [layer("layers.0")], [], TileSizes(lambda yardstick_s: TILES), lambda: points.append(None))
    model.get_submodule("layers.0.mlp")(torch.ones(ROWS, 3))
    assert len(points) == 1
