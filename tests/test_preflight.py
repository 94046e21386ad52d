"""Preflight: slices, the reader of compiled programs against XLA's own counts, and every shipped recipe's programs."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import pytest
from conftest import ROOT, run_python, run_tool

from rae_xla.errors import UserError
from rae_xla.models.diffusion import create_diffusion_model
from rae_xla.models.layers import Attention, Linear
from rae_xla.models.loading import on_meta
from rae_xla.preflight import run
from rae_xla.preflight.calibration import CALIBRATIONS
from rae_xla.preflight.counts import argument_bytes, total_flops
from rae_xla.preflight.estimate import Estimator
from rae_xla.preflight.hlo import Module, arrays_of
from rae_xla.preflight.layout import layout_of
from rae_xla.preflight.links import Links
from rae_xla.preflight.programs import programs_of
from rae_xla.preflight.report import explained
from rae_xla.preflight.run import Compiled, Job, compile_all
from rae_xla.recipe import DiffusionRecipe, load_recipe
from rae_xla.topologies import topology

# Nothing else has this size, heads times a chip's images included, so that arrays of the whole batch can be told.
IMAGES = 8 * 47
NARROW = {
    "encoder": ["autoencoder.encoder.depth=1"],
    "decoder": ["autoencoder.decoder.depth=1"],
    "dit": ["model.depth=1", "model.head_depth=1"],
    "xl": ["model.width=128", "model.num_heads=2", "model.head_width=192", "model.head_num_heads=2"],
}
QUICKSTART, BATCH = "recipes/quickstart", f"data.batch_size={IMAGES}"
SHIPPED = {
    ("encoder", "train"): (f"{QUICKSTART}/encoder.yaml", [BATCH, "model.depth=1"]),
    ("judge", "train"): (f"{QUICKSTART}/judge.yaml", [BATCH]),
    ("decoder", "train"): (f"{QUICKSTART}/decoder.yaml", [BATCH, *NARROW["encoder"], *NARROW["decoder"]]),
    ("linear_probe", "train"): (f"{QUICKSTART}/linear_probe.yaml", [BATCH, *NARROW["encoder"]]),
    ("latent_stats", "latent_stats"): (f"{QUICKSTART}/latent_stats.yaml", [BATCH, *NARROW["encoder"]]),
    ("diffusion", "train"): (f"{QUICKSTART}/diffusion.yaml", [BATCH, *NARROW["encoder"], *NARROW["dit"]]),
    ("sample", "sample"): (
        f"{QUICKSTART}/sample_classifier_free.yaml",
        # Four heads and both halves of a guided batch are eight times a chip's images, which is all images.
        [
            *[f"sampler.batch_size={IMAGES}", "model.num_heads=3", "model.head_num_heads=2"],
            *[*NARROW["encoder"], *NARROW["decoder"], *NARROW["dit"]],
        ],
    ),
    ("evaluation", "features"): (f"{QUICKSTART}/evaluation.yaml", [f"batch_size={IMAGES}"]),
    ("xl", "train"): (
        "recipes/synthetic/dit_dh_xl.yaml",
        [BATCH, *NARROW["encoder"], *NARROW["dit"], *NARROW["xl"]],
    ),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not there yet."""
    return tmp_path_factory.mktemp("preflight") / "cache"


@pytest.fixture(scope="module")
def shipped(cache: Path) -> dict[tuple[str, str], Compiled]:
    jobs = [
        [Job(recipe=recipe, overrides=tuple(overrides), program=program, topology=topology("v6e-8"), quick=True)]
        for (_, program), (recipe, overrides) in SHIPPED.items()
    ]
    return dict(zip(SHIPPED, compile_all(jobs, cache, num_workers=2), strict=True))


def test_slices_by_their_cloud_names() -> None:
    assert topology("v6e-256").shape == (16, 16) and topology("v6e-256").wraps == (True, True)
    assert topology("v5p-64").num_chips == 32 and topology("v5p-64").shape == (2, 4, 4)
    assert topology("v5p-128").wraps == (True,) * 3 and topology("v5p-64").wraps == (False,) * 3
    assert topology("v5e-16").generation == "v5litepod" and topology("v4-8").num_chips == 4
    assert topology("v4-64").for_compiler == ("v4:2x4x4", {"chip_config_name": "megacore"})
    assert topology("4xv6e-64").num_chips == 256 and topology("4xv6e-64").for_compiler == ("v6e:8x8", {"num_slices": 4})


@pytest.mark.parametrize(
    ("name", "message"),
    [("v6e-7", "Cloud has no 'v6e-7'; use v6e-1, v6e-4"), ("h100-8", "'h100-8' is not known"), ("v5p-7", "v5p-8")],
)
def test_an_unknown_slice_is_told_with_those_there_are(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        topology(name)


def test_a_mesh_that_does_not_fit_the_slice_and_other_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = f"{QUICKSTART}/diffusion.yaml"
    code, output, errors = run_tool("preflight", recipe, "mesh.fsdp=3", "--topology", "v6e-8")
    assert code == 2 and "mesh: data: -1, fsdp: 3 does not fit 8 devices" in errors and not output
    code, _, errors = run_tool("preflight", recipe, "--topology", "2xv6e-8")
    assert code == 2 and "mesh.slices: 2xv6e-8 has 2, the recipe says 1" in errors
    code, _, errors = run_tool("preflight", recipe, "--topology", "v6e-8", "--program", "fly")
    assert code == 2 and "--program: this recipe has no 'fly'; use train or sample" in errors
    monkeypatch.setattr(run.util, "find_spec", lambda name: None)
    code, _, errors = run_tool("preflight", recipe, BATCH, "--topology", "v6e-8")
    assert code == 2 and "pip install 'rae_xla[preflight]'" in errors and "Traceback" not in errors


def test_arrays_are_counted_with_their_padding() -> None:
    [array] = arrays_of("bf16[1,256,96]{1,2,0:T(8,128)(2,1)}")
    assert array.bytes == 2 * 256 * 96 and array.memory == 0
    [array] = arrays_of("f32[65536,4,16,4,8]{2,4,3,1,0:T(8,128)S(1)}")
    assert array.bytes == 4 * 65536 * 4 * 128 * 4 * 8 and array.memory == 1
    assert arrays_of("f32[10]{0:T(1024)}")[0].bytes == 4096
    assert [a.dtype for a in arrays_of("(s32[], u32[2]{0:S(4)}, token[])")] == ["s32", "u32", "token"]


PRODUCTS = """HloModule m, is_scheduled=true

%condition (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[], f32[4,8]) parameter(0)
  %at = s32[] get-tuple-element(%p), index=0
  %bound = s32[] constant(12)
  ROOT %less = pred[] compare(%at, %bound), direction=LT
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]) parameter(0)
  %at = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %w = f32[8,8]{1,0} constant({...})
  %y = f32[4,8]{1,0} convolution(%x, %w), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"100"}
  %three = s32[] constant(3)
  %next = s32[] add(%at, %three)
  ROOT %out = (s32[], f32[4,8]) tuple(%next, %y)
}

ENTRY %main (a: f32[4,8], i: f32[1,3,5,5], k: f32[2,3,3,3], q: f32[16,4,6], r: f32[16,6,7]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %i = f32[1,3,5,5]{3,2,1,0} parameter(1)
  %k = f32[2,3,3,3]{3,2,1,0} parameter(2)
  %q = f32[16,4,6]{2,1,0} parameter(3)
  %r = f32[16,6,7]{2,1,0} parameter(4)
  %image = f32[1,2,5,5]{3,2,1,0} convolution(%i, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=bf01_oi01->bf01
  %batched = f32[16,4,7]{2,1,0} convolution(%q, %r), window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]) tuple(%zero, %a)
  %loop = (s32[], f32[4,8]) while(%start), condition=%condition, body=%body
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_products_and_loops_are_counted() -> None:
    module = Module(PRODUCTS)
    # Borders of the image meet fewer of the nine positions: 3 * 5 - 2 in each direction.
    image = 2 * 3 * 2 * 13 * 13
    batched = 2 * 16 * 4 * 6 * 7
    loop = 4 * (2 * 4 * 8 * 8)
    assert total_flops(module) == image + batched + loop
    assert sum(times for i, times in module.runs() if i.cycles) == 4


@pytest.mark.parametrize("which", SHIPPED, ids=lambda which: which[0])
def test_every_shipped_recipe_splits_its_batch_and_gathers_its_parameters(
    which: tuple[str, str], shipped: dict[tuple[str, str], Compiled]
) -> None:
    compiled = shipped[which]
    module = compiled.module
    assert compiled.traced["num_images"] == IMAGES
    layout = layout_of(module, compiled.traced, compiled.compiled["bytes"], 8)
    assert layout.results_checked and layout.problems() == [], layout
    rows = {
        i.arrays[0].sizes[0]
        for i in module.entry.instructions
        if i.opcode == "parameter" and i.arrays[0].sizes and i.arrays[0].dtype in ("u8", "s32")
    }
    assert rows == {IMAGES // 8}, "images, labels and positions lie in eight parts"
    split = [a for a in compiled.traced["arguments"] if a["name"].startswith("state['parameters']")]
    assert (which[1] == "train") == bool(split)


@pytest.mark.parametrize("which", SHIPPED, ids=lambda which: which[0])
def test_what_is_read_equals_what_xla_counts(which: tuple[str, str], shipped: dict[tuple[str, str], Compiled]) -> None:
    compiled = shipped[which]
    module, found = compiled.module, compiled.compiled
    assert argument_bytes(module) == found["bytes"]["arguments"]
    replaced = {index for index, a in enumerate(compiled.traced["arguments"]) if a["replaced_by"] is not None}
    assert module.aliased == replaced, "all of the state, and nothing else, is updated in place"
    if which[1] == "train":
        assert found["bytes"]["outputs"] - found["bytes"]["aliased"] < 2**16, "metrics only"


def test_a_batch_left_whole_is_told_with_its_allocation(tmp_path: Path, cache: Path) -> None:
    recipe, overrides = SHIPPED["diffusion", "train"]
    job = Job(recipe=recipe, overrides=tuple(overrides), program="train", topology=topology("v6e-8"), quick=True)
    (tmp_path / "job.json").write_text(json.dumps(job.for_workers))
    done = run_python("tests/unsplit_batch.py", str(tmp_path), **run.TRACING)
    assert done.returncode == 0, done.stderr[-2000:]
    done = run_python("-m", "rae_xla.xla.tpu_compiler", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    traced, compiled = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("traced", "compiled")]
    problems = layout_of(Module((tmp_path / "compiled.hlo").read_text()), traced, compiled["bytes"], 8).problems()
    told = f"batch['images'] (uint8 [{IMAGES}, 32, 32, 3], 0.001 GiB) is not split: every chip holds all of it"
    assert told in problems, problems


def _flops_instead_of_sums_and_turns(recipe: DiffusionRecipe) -> float:
    """Of an image's training step: bias gradients as products with eight rows of ones, and queries and keys turned."""
    _, grid, _ = shape = recipe.autoencoder.encoder.latent_shape
    module = on_meta(lambda: create_diffusion_model(recipe.model, shape, 10))
    flops, tokens = 0.0, grid * grid
    for path, part in module.named_modules():
        # That of the backbone's modulation, computed ahead, has few rows.
        if isinstance(part, Linear) and not (path.startswith("backbone") and path.endswith("modulation")):
            flops += 2 * 8 * tokens * part.out_features
        if isinstance(part, Attention):
            width = part.output.in_features
            # Both, forwards and backwards.
            flops += 4 * 2 * (width // part.num_heads) * width * tokens
    return flops


def test_the_tool_reports_and_takes_what_is_compiled(
    shipped: dict[tuple[str, str], Compiled], cache: Path, tmp_path: Path
) -> None:
    recipe, overrides = SHIPPED["diffusion", "train"]
    compiled_before = {path.name for path in cache.iterdir()}
    out = tmp_path / "out"
    options = ["--topology", "v6e-8", "--program", "train", "--quick", "--cache", str(cache), "--out", str(out)]
    options += ["--jobs", "2", "--dump-hlo", str(tmp_path / "hlo"), "--json", str(tmp_path / "result.json")]
    code, output, errors = run_tool("preflight", recipe, *overrides, *options)
    assert code == 0, errors
    result = json.loads((tmp_path / "result.json").read_text())
    [program] = result["programs"]
    assert program["name"] == "train" and program["topology"] == "v6e-8" and program["num_chips"] == 8
    hbm, seconds, flops = program["hbm_gib"], program["seconds"], program["flops_per_chip"]
    assert hbm["arguments"] < hbm["peak"] < hbm["capacity"] == 31.25
    # The copy that a save makes is of the state, which is replaced in place.
    assert 0 < hbm["aliased"] < hbm["arguments"] and hbm["while_saving"] == hbm["peak"] + hbm["aliased"]
    assert explained(program) == ""
    crowded = {**program, "hbm_gib": {**hbm, "capacity": hbm["peak"]}}
    assert "not beside the copy" in explained(crowded) and "checkpoint.copy_on=host" in explained(crowded)
    parts = seconds["compute"] + seconds["exposed_communication"] + seconds["exposed_memory_transfers"]
    assert math.isclose(parts, seconds["step"], rel_tol=1e-6) and seconds["compute"] > 0
    # Nothing is rematerialised here, so the compiled products are those that PyTorch counts by itself, and those that
    # stand in for what a TPU is slow at, which are no work of the model's.
    instead = _flops_instead_of_sums_and_turns(load_recipe(recipe, overrides)) * program["images_per_chip"]
    assert 0 < instead < 0.05 * flops["model"]
    assert 0 < program["mfu"] < 1 and abs(flops["compiled"] / (flops["model"] + instead) - 1) < 0.01
    # What is compiled is in the cache by its content: only the calibration was compiled anew.
    assert len({path.name for path in cache.iterdir()} - compiled_before) == len(CALIBRATIONS)
    assert len(result["calibration"]) == 3 and all(row["ratio"] > 0.95 for row in result["calibration"])
    assert "Facts, from the TPU's compiler" in output and "rae_xla/" in output
    hlo = (tmp_path / "hlo" / "train_v6e-8.hlo.txt").read_text()
    assert total_flops(Module(hlo)) == flops["compiled"]
    with gzip.open(out / "train_v6e-8.trace.json.gz") as file:
        events = [event for event in json.load(file)["traceEvents"] if event["ph"] == "X"]
    assert len(events) > 50 and max(e["ts"] + e["dur"] for e in events) <= 1e6 * seconds["step"] * 1.01
    assert "<svg" in (out / "report.html").read_text()


def test_a_batch_that_is_too_large_is_told_with_its_allocations(cache: Path, tmp_path: Path) -> None:
    recipe, overrides = SHIPPED["diffusion", "train"]
    options = ["--topology", "v6e-1", "--program", "train", "--quick", "--cache", str(cache), "--jobs", "2"]
    options += ["--json", str(tmp_path / "result.json"), "--out", str(tmp_path)]
    code, output, errors = run_tool("preflight", recipe, *overrides, "data.batch_size=131072", *options)
    assert code == 0, errors
    [program] = json.loads((tmp_path / "result.json").read_text())["programs"]
    assert not program["fits"] and program["hbm_gib"]["peak"] > program["hbm_gib"]["capacity"] == 31.25
    assert program["seconds"]["step"] is None and program["mfu"] is None
    assert re.search(r"train on v6e-1 needs \d+\.\d of 31.25 GiB a chip, \d+\.\d too much. Largest: ", output)
    assert (
        "131072" in output
        and "compute.remat=block" in output
        and "Does not fit" in (tmp_path / "report.html").read_text()
    )


SLICES = """HloModule m, is_scheduled=true

%sums (p: f32[8,64]) -> f32[8,64] {
  %p = f32[8,64]{1,0} parameter(0)
  ROOT %all-reduce.2 = f32[8,64]{1,0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%all-reduce-scatter.1 (p: f32[8,64]) -> f32[1,64] {
  %p = f32[8,64]{1,0:S(1)} parameter(0)
  %sum = f32[8,64]{1,0:S(1)} all-reduce(%p), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %mine = f32[1,64]{1,0:S(1)} dynamic-slice(%sum, %i), dynamic_slice_sizes={1,64}
}

ENTRY %main (a: f32[8,64]) -> f32[8,64] {
  %a = f32[8,64]{1,0:S(1)} parameter(0)
  %part = f32[1,64]{1,0:S(1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %token = token[] after-all()
  %out = (f32[8,64]{1,0}, u32[], token[]) send(%a, %token), channel_id=5, is_host_transfer=true
  %in = (f32[8,64]{1,0}, u32[], token[]) recv(%token), channel_id=5, is_host_transfer=true
  %gone = token[] send-done(%out), channel_id=5, is_host_transfer=true
  %here = (f32[8,64]{1,0}, token[]) recv-done(%in), channel_id=5, is_host_transfer=true
  %begun = ((f32[8,64]{1,0}), f32[8,64]{1,0}, u32[]{:S(2)}) call-start(%a), to_apply=%sums
  %summed = f32[8,64]{1,0} call-done(%begun)
  %swap = f32[8,64]{1,0:S(1)} all-to-all(%a), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %result = f32[8,64]{1,0} get-tuple-element(%here), index=0
}
"""


def test_each_kind_of_transfer_is_counted_with_its_bytes() -> None:
    coordinates = [[x, y, 0] for y in range(4) for x in range(2)] * 2
    found = Estimator(Module(SLICES), topology("2xv6e-8"), coordinates, [[*range(8)], [*range(8, 16)]]).estimate()
    size = 4 * 8 * 64
    # Of its eight parts a chip keeps one, and sends seven on, or out.
    expected = {f"{kind} over fsdp 8": size * 7 // 8 for kind in ("reduce-scatter", "all-to-all")}
    # One of a sparse core.
    expected["all-reduce over fsdp 8"] = 2 * size * 7 // 8
    assert found.bytes_by_collective == {**expected, "between slices": size}
    assert found.waits >= sum(found.seconds_by_collective.values()) * 0.99
    assert found.seconds_by_collective["between slices"] == size / 1.25e10


def test_transfers_take_their_bytes_over_the_links_of_their_axes() -> None:
    links = Links(topology("v6e-64"), [[x, y, 0] for y in range(8) for x in range(8)])
    row, everyone, gigabytes = list(range(8)), list(range(64)), 9 * 10**9
    # One axis without a ring: seven eighths of it pass one link one way, after seven hops.
    assert math.isclose(links.gather_seconds(gigabytes, row), 7e-6 + 9e9 * 7 / 8 / 9e10)
    assert math.isclose(links.gather_seconds(gigabytes, everyone), 14e-6 + 9e9 * 63 / 64 / 1.8e11)
    # Every other chip of a row: two groups share its links.
    assert math.isclose(links.gather_seconds(gigabytes, row[::2]), 6e-6 + 2 * 9e9 * 3 / 4 / 9e10)
    # An all-to-all along a row: four chips send half of what they have to the other four. Then along columns.
    assert math.isclose(links.exchange_seconds(gigabytes, row), 7e-6 + 4 * 9e9 / 2 / 9e10)
    assert math.isclose(links.exchange_seconds(gigabytes, everyone), 2 * (7e-6 + 0.2))
    # A ring of a row: the way back from its end passes every link.
    assert math.isclose(links.permutation_seconds(gigabytes, [[x, (x + 1) % 8] for x in row]), 7e-6 + 0.1)
    ring = Links(topology("v6e-256"), [[x, y, 0] for y in range(16) for x in range(16)])
    assert math.isclose(ring.gather_seconds(gigabytes, list(range(16))), 8e-6 + 9e9 * 15 / 16 / 1.8e11)


def test_a_loop_whose_turns_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="loop: the number of its turns cannot be read"):
        total_flops(Module(PRODUCTS.replace("s32[] constant(12)", "s32[] get-tuple-element(%p), index=0")))


def test_every_recipe_that_has_programs_is_compiled_here() -> None:
    tested = {ROOT / recipe for recipe, _ in SHIPPED.values()}
    tasks = {load_recipe(str(recipe), []).task for recipe in tested}
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        try:
            recipe = load_recipe(str(path), [])
            programs_of(recipe)
        except UserError:
            continue
        # Those that differ in weights or guidance only have one of their kind above.
        assert recipe.task in tasks | {"sampling", "reconstruction"}, path
