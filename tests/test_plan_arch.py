"""plan arch: exact tables, searches that find them again, hours; and the command that all plans share."""

import json
import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.base.common import UserError, columns
from nanochat.commands import plan
from nanochat.plan import arch, shapes

ROOT = Path(__file__).parent.parent
SMALL = {"depth": 4, "model_dim": 512, "head_dim": 64}


def planned(*words: str) -> dict:
    return plan.main(["arch", *words])


# ---- tables


@pytest.mark.parametrize(
    ("shape", "tied", "vocab", "embedding", "transformer", "head", "total"),
    [
        (SMALL, False, 24_576, 12_582_912, 12_582_912, 12_582_912, 37_748_736),
        (SMALL, True, 24_576, 12_582_912, 12_582_912, 0, 25_165_824),
        ({"depth": 4}, False, 24_576, 6_291_456, 3_145_728, 6_291_456, 15_728_640),
        ({"depth": 20}, False, 65_536, 83_886_080, 393_216_000, 83_886_080, 560_988_160),
    ],
)
def test_the_tables(shape, tied, vocab, embedding, transformer, head, total):
    n = shapes.counts(shapes.SizeKnobs(**shape, tie_embeddings=tied, vocab=vocab).config())
    assert [n[p] for p in ("embedding", "transformer", "head", "total")] == [
        embedding,
        transformer,
        head,
        total,
    ]


def test_a_budget_and_a_split_find_the_model_and_print_its_table(capsys):
    out = planned("--params", "38M", "--vocab", "24576", "--split", "1:1:1")
    output = capsys.readouterr().out
    assert (
        output.count("12,582,912") >= 3
        and "37,748,736" in output
        and "4 layers, width 512, 8 heads of 64" in output
    )
    assert (out["embedding"], out["transformer"], out["head"], out["total"]) == (
        12_582_912,
        12_582_912,
        12_582_912,
        37_748_736,
    )
    assert (out["config"]["n_layer"], out["config"]["n_embd"], out["config"]["n_head"]) == (
        4,
        512,
        8,
    )
    assert (
        out["tokens"] == 20 * 37_748_736 and out["flops"] == out["tokens"] * out["flops_per_token"]
    )
    assert len(out["alternatives"]) >= 3 and all(
        abs(a["total"] / 38e6 - 1) <= 0.1 for a in out["alternatives"]
    )


def test_flags_give_their_table():
    assert planned("--depth", "20")["total"] == 560_988_160


def test_a_default_shape_is_found_again_from_its_size():
    for depth in (8, 12, 20):
        total = shapes.counts(shapes.SizeKnobs(depth=depth).config())["total"]
        out = planned("--params", str(total))
        assert (
            out["total"] == total
            and out["config"]["n_layer"] == depth
            and out["config"]["n_embd"] == 64 * depth
        )


def test_a_fixed_depth_width_or_head_binds():
    assert planned("--params", "60M", "--vocab", "8192", "--depth", "6")["config"]["n_layer"] == 6
    assert (
        planned("--params", "60M", "--vocab", "8192", "--model_dim", "512")["config"]["n_embd"]
        == 512
    )
    out = planned("--params", "60M", "--vocab", "8192", "--head_dim", "32")["config"]
    assert out["n_embd"] // out["n_head"] == 32


def test_a_tied_model_has_two_parts():
    out = planned("--params", "25M", "--vocab", "24576", "--split", "1:1", "--tie_embeddings")
    assert (out["embedding"], out["transformer"], out["head"]) == (12_582_912, 12_582_912, 0)


@settings(max_examples=15, deadline=None)
@given(
    params=st.floats(3e6, 3e8),
    vocab=st.sampled_from([512, 8192, 32_768]),
    tied=st.booleans(),
    kv=st.sampled_from([1.0, 0.5]),
)
def test_what_is_found_is_counted_on_the_model_and_near(params, vocab, tied, kv):
    flags = shapes.SizeKnobs(kv_ratio=kv, tie_embeddings=tied, vocab=vocab)
    try:
        result = arch.nearest(flags, params)
    except UserError as e:
        assert "the smallest has" in str(e)
        return
    best = result[0]
    counted = shapes.model_of(best).counts()
    assert counted == shapes.counts(best)
    assert shapes.flops_per_token(best) == shapes.model_of(best).flops_per_token()
    assert all(abs(shapes.counts(c)["total"] / params - 1) <= arch.TOLERANCE for c in result)
    size = {"depth": best.n_layer, "model_dim": best.n_embd, "head_dim": best.head_dim}
    assert best == flags.config(**size)


# ---- the cache and the price


def test_the_cache_of_a_token():
    config = shapes.SizeKnobs(**SMALL, kv_ratio=0.25, vocab=24_576).config()
    # keys and values, layers, heads, width, bytes
    assert arch.figures(config)["kv_bytes_per_token"] == 2 * 4 * 2 * 64 * 2


def test_the_reference_run_takes_its_hours():
    """GPT-2's grade: 4.33e19 FLOPs in 2.76 h on 8 H100."""
    run = planned("--depth=24", "--gpu=H100 SXM", "--gpus=8", "--tokens_per_param=9.57")
    assert run["flops"] == pytest.approx(4.33e19, rel=0.05)
    tokens, speed = run["run"]["chosen"]["tokens"], run["run"]["chosen"]["speed"]
    hours, most, least = (tokens / rate / 3600 for rate in speed)
    assert least < 2.76 < most and most < 2.5 * least
    assert hours < sum(s for name, s, _ in run["run"]["schedule"] if name == "pretraining") / 3600


def test_a_run_on_a_card_is_that_of_plan_day(capsys):
    words = ["--depth", "4", "--vocab", "4096", "--gpu", "rtx3060", "--gpus", "2"]
    out = planned(*words)
    run = out["run"]
    assert run["title"].endswith("2 x RTX 3060")
    reached = out["flops_per_token"] * run["chosen"]["speed"][0] / (2 * 25.5e12)
    assert 0.2 < reached < 0.65, "of the peak"
    assert run["chosen"]["tokens"] == pytest.approx(out["tokens"], rel=0.01)
    assert run["chosen"]["memory"]["total"] <= 12 * 2**30
    day = plan.main(["day", *words, "--head_dim=128", "--softcap=15", f"--tokens={out['tokens']}"])
    assert json.dumps(day) == json.dumps(run), "the same answer wherever it is asked"
    assert "--num_iterations" in day["commands"][-1]


# ---- the document


def test_the_specifications_are_up_to_date():
    made = runpy.run_path(str(ROOT / "dev" / "specifications.py"))
    assert made["specifications"]() == made["DOCUMENT"].read_text(encoding="utf-8")


# ---- errors and the command


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--params", "1000"],
            "no model with these flags has about 1k parameters: the smallest has",
        ),
        (["--params", "many"], "--params takes a number such as 38M or 1.2G, not 'many'"),
        (["--params", "0"], "not '0'"),
        (
            ["--params", "38M", "--split", "1:1"],
            "--split takes embedding:layers:head, for example 1:1:1, not '1:1'",
        ),
        (["--params", "38M", "--split", "1:0:1"], "not '1:0:1'"),
        (
            ["--params", "25M", "--split", "1:1:1", "--tie_embeddings"],
            "embedding:layers for a tied model, for example 1:1, not '1:1:1'",
        ),
        (["--split", "1:1:1"], "also needs the number of parameters"),
        (["--gpu", "rtx4091"], r"there is no GPU 'rtx4091' in the table \(did you mean RTX"),
        (["--gpus", "8"], "--gpus=8 also needs the name of the GPU: add --gpu NAME"),
        (
            ["--depth", "14", "--model_dim", "4096", "--gpu", "rtx3060"],
            "RTX 3060 has too little memory: .* depth 14 at width 4096, needs .* with 1 rows",
        ),
        (["--model_dim", "500", "--head_dim", "64"], "try --model_dim=512"),
        (["--parms", "38M"], r"plan arch has no flag --parms \(did you mean --params\?\)"),
    ],
)
def test_bad_input(words, says):
    with pytest.raises(UserError, match=says):
        planned(*words)


def test_the_command_lists_its_parts_and_knows_the_near_one(capsys):
    assert plan.main([]) == {} and plan.main(["-h"]) == {}
    output = capsys.readouterr().out
    for name, (_, sentence) in plan.commands().items():
        assert f"  {name} " in output and len(sentence) > 20
    with pytest.raises(UserError, match=r"no subcommand 'memroy' \(did you mean memory\?\)"):
        plan.main(["memroy"])


def test_json_is_alone_on_standard_output(capsys):
    out = planned("--depth", "2", "--vocab", "512", "--json")
    assert (
        json.loads(capsys.readouterr().out) == json.loads(json.dumps(out))
        and out["config"]["n_layer"] == 2
    )


def test_columns_align_figures_to_the_right():
    lines = columns(("name", "n"), [("a", 1), ("long", 1234)]).splitlines()
    assert lines == ["| name |    n |", "| ---- | ---: |", "| a    |    1 |", "| long | 1234 |"]


@pytest.mark.parametrize("layers", range(1, 8))
@pytest.mark.parametrize("tables", [{}, {"value_embeddings": True, "pair_embeddings": 2}], ids=str)
def test_layers_are_counted_as_the_whole_model_counts_them(layers, tables):
    config = shapes.SizeKnobs(
        depth=layers, model_dim=192, head_dim=64, vocab=512, copy_heads=1, **tables
    ).config()
    whole = shapes.model_of(config)
    assert shapes.counts(config) == whole.counts()
    assert shapes.flops_per_token(config, 256) == pytest.approx(whole.flops_per_token(256))


def test_sizes_without_room_for_a_copy_head_are_passed_over():
    made = plan.main(["arch", "--params=38M", "--copy_heads=1", "--vocab=24576"])
    assert made["config"]["n_kv_head"] > 1
    day = plan.main(["day", "--hours=24", "--gpu=rtx4090", "--copy_heads=1"])
    assert day["chosen"]["config"]["copy_heads"] == 1
