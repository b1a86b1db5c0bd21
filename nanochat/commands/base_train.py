"""Pretrain a model on text: documents packed into rows, next-token prediction."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from nanochat.base.common import UserError, entry, opening, print0
from nanochat.base.knobs import ReadingKnobs, knob, parse
from nanochat.model.config import ArchitectureKnobs, AttentionPriorKnobs, GPTConfig
from nanochat.train.knobs import TrainKnobs
from nanochat.train.scaling import USEFUL_PASSES, LookbackKnobs, Shape, with_lookback

if TYPE_CHECKING:
    from nanochat.base.runtime import Runtime
    from nanochat.model.checkpoint import Checkpoint
    from nanochat.model.gpt import GPT

PROMPTS = (
    "The",
    "Once upon a time",
    "In the morning,",
    "The capital of France is",
    "If yesterday was Friday, then tomorrow",
)


@dataclass(kw_only=True)
class PretrainKnobs(
    TrainKnobs, AttentionPriorKnobs, LookbackKnobs, ArchitectureKnobs, Shape, ReadingKnobs
):
    """Length and data"""

    data: tuple[str, ...] = knob(
        (),
        "text: name=PATH[:weight][#field] ..., tinyworld, fineweb-edu or climbmix (default: "
        "downloaded shards, else tinyworld)",
    )
    num_iterations: int = knob(-1, "optimizer steps (-1 = set by the other lengths)")
    target_flops: float = knob(-1.0, "train for this many FLOPs (-1 = off)")
    target_param_data_ratio: float = knob(20.0, "tokens to train on per parameter (-1 = off)")
    total_batch_size: int = knob(
        0,
        "tokens per optimizer step (0 = chosen from the length of the run, or 524,288 with "
        "--num_iterations)",
        low=0,
    )
    context_stages: tuple[str, ...] = knob(
        (),
        "rows that grow during the run: TOKENS@SHARE starts rows of that many tokens at that "
        "share of the run, as in 512@0 1024@0.6 2048@0.9; tokens per step stay the same, and "
        "the last length is sequence_len, which all evaluations use",
    )
    max_passes: float = knob(
        0.0,
        f"end after this many passes over all text (0 = {USEFUL_PASSES:g} where the text is in "
        "files and the length is not given in steps, FLOPs or tokens per parameter)",
        low=0,
    )
    patience: int = knob(
        0,
        "end after this many evaluations without lower bits per byte, with the best checkpoint "
        "(0 = never)",
        low=0,
    )
    warmdown_ratio: float = knob(
        0.65, "share of the run over which the learning rates fall", low=0, high=1
    )
    final_lr_frac: float = knob(
        0.05, "learning rates at the end of the run, as a share of the peak", low=0, high=1
    )
    document_attention: bool = knob(
        False, "attend within documents only, even if several of them share a row"
    )

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The configuration of the model that these flags describe."""
        architecture = {f.name: getattr(self, f.name) for f in fields(ArchitectureKnobs)}
        return GPTConfig(vocab_size=vocab_size, **self.dimensions(), **architecture)


def check_prior_knobs(knobs: PretrainKnobs, stored: dict[str, Any] | None) -> None:
    """
    UserError if flags of the attention prior have no effect, or differ from the `stored` knobs of
    the run that resumes.
    """
    for f in fields(AttentionPriorKnobs):
        value = getattr(knobs, f.name)
        before = value if stored is None else stored.get(f.name, f.default)
        if value != before:
            raise UserError(
                f"this run was started with {f.name}={before}, not {value}: leave the flag out, "
                "or start another run with --model_tag=NAME"
            )
        if not knobs.rap and value != f.default:
            raise UserError(f"--{f.name}={value} has no effect without --rap FILE")


def build_model(
    knobs: PretrainKnobs, resume_from: "Checkpoint | None", runtime: "Runtime", tokenizer: Any
) -> "GPT":
    """
    The model as it is before the first step, with the attention prior that the knobs name. For a
    run that resumes, the weights and the prior's tables are restored from the checkpoint later.
    """
    from nanochat.model import prior, prior_artifact
    from nanochat.model.gpt import GPT

    config = knobs.model_config(tokenizer.vocab_size)
    if knobs.document_attention:
        config.document_start = tokenizer.bos
    spec, tables = None, {}
    if resume_from:  # the checkpoint holds the prior; its file may be gone
        config.rap = resume_from.config.rap
    elif knobs.rap:
        spec, tables = prior_artifact.prepare(
            knobs, config, tokenizer.fingerprint, runtime.device, runtime.dtype
        )
        config.rap = spec if knobs.rap_mode == "bias" else None
    model = GPT.build(config, runtime.device, runtime.dtype)
    model.init_weights(knobs.seed)
    if model.prior is not None:
        model.prior.annealed = knobs.rap_gate == "annealed"
        model.prior.load_state_dict(tables, strict=not resume_from)
    elif spec is not None:
        prior.warm_start(model, spec, tables, knobs.rap_alpha)
        print0(f"W_Q and W_K start from the prior {spec['about']}")
    return model


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    began = time.monotonic()
    knobs, origins = parse(PretrainKnobs, argv, command="base_train")
    opening("base_train", log=True)

    from nanochat.base.runtime import choose_device
    from nanochat.data import inventory
    from nanochat.data.contexts import Contexts
    from nanochat.data.sources import default_sources, training_sources
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.export.target import destinations
    from nanochat.study import report
    from nanochat.train import stage
    from nanochat.train.horizon import choose_horizon
    from nanochat.train.run import open_run, reserve_run, resume_knobs

    tag = knobs.model_tag or f"d{knobs.depth}"

    with stage.session():
        reserve_run("base", tag)
        knobs, origins, resume_from = resume_knobs("base", tag, knobs, origins)
        if not resume_from:
            on_cpu = choose_device(knobs.device_type).type == "cpu"
            knobs, origins = with_lookback(knobs, origins, on_cpu, Tokenizer.load().vocab_size)
            if not knobs.data:  # stored, because the default may be another one later
                knobs = replace(knobs, data=tuple(default_sources()))
                origins = {**origins, "data": "rule"}
        check_prior_knobs(knobs, resume_from.meta["knobs"] if resume_from else None)
        is_given = origins["sequence_len"] != "default"
        contexts = Contexts.parse(knobs.context_stages, knobs.sequence_len, is_given)
        knobs = replace(knobs, sequence_len=contexts.longest)
        sources = training_sources(knobs.data, knobs.skip_bad_rows)
        characters = inventory.show(sources)
        build = partial(build_model, knobs, resume_from)
        run = open_run("base", tag, knobs, origins, build, resume_from, began=began)
        horizon = choose_horizon(run, characters)
        stage.compile_if_it_pays(run, horizon)
        train = stage.text_shards(run, sources, "train")
        val = stage.text_shards(run, sources, "val")
        print0(f"  {destinations(run.model.config, run.tokenizer.digits)}")
        stage.check_tokenizer(run, val)
        horizon, feed = stage.limited_feed(run, train, horizon, characters)
        stage.summarise_data(run, feed, val, horizon)
        evaluations = [
            stage.bits_per_byte_evaluation(run, val, feed, horizon),
            stage.sample_evaluation(run, PROMPTS),
        ]
        return report.train_and_report(run, feed, horizon, evaluations)


if __name__ == "__main__":
    entry(main)
