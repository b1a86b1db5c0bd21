"""Pretrain a model on text: documents packed into rows, next-token prediction."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from nanochat.base.common import UserError, entry, print0
from nanochat.base.knobs import knob
from nanochat.chat.generate import Engine
from nanochat.data.contexts import Contexts
from nanochat.data.shards import prepare
from nanochat.data.sources import training_sources
from nanochat.model import prior
from nanochat.model.config import ArchitectureKnobs, AttentionPriorKnobs, GPTConfig
from nanochat.model.gpt import GPT
from nanochat.train import run as stage
from nanochat.train.knobs import TrainKnobs
from nanochat.train.loop import Evaluation
from nanochat.train.scaling import Shape

PROMPTS = (
    "The",
    "Once upon a time",
    "In the morning,",
    "The capital of France is",
    "If yesterday was Friday, then tomorrow",
)


@dataclass(kw_only=True)
class PretrainKnobs(TrainKnobs, AttentionPriorKnobs, ArchitectureKnobs, Shape):
    """Horizon and data"""

    data: tuple[str, ...] = knob(
        (),
        "text: name=PATH[:weight] ..., tinyworld, fineweb-edu or climbmix (default: downloaded shards, else tinyworld)",
    )
    num_iterations: int = knob(-1, "optimizer steps (-1 = from the other horizons)")
    target_flops: float = knob(-1.0, "train for so many FLOPs (-1 = off)")
    target_param_data_ratio: float = knob(20.0, "train on so many tokens a parameter (-1 = off)")
    total_batch_size: int = knob(
        0, "tokens of an optimizer step; 0 = from the horizon, 524,288 with --num_iterations", low=0
    )
    context_stages: tuple[str, ...] = knob(
        (),
        "rows of T tokens from a share of the run on, the batch in tokens kept: 512@0 1024@0.6 2048@0.9; the last T is sequence_len, "
        "at which all evaluations are made",
    )


def sample_evaluation(s: stage.OpenRun, prompts: Sequence[str] = PROMPTS) -> Evaluation:
    """A few greedy-ish continuations, printed and logged."""

    def look() -> dict[str, str]:
        if not s.runtime.is_main:
            return {}
        rows = Engine(s.model, s.tokenizer).generate_batch(
            [s.tokenizer.encode(p, bos=True) for p in prompts], max_tokens=24, temperature=0.0
        )
        texts = [s.tokenizer.decode(row.tokens) for row in rows]
        for prompt, text in zip(prompts, texts, strict=True):
            print0(f"    {prompt}|{text}".replace("\n", " "))
        return {f"sample/{p}": t for p, t in zip(prompts, texts, strict=True)}

    return Evaluation("sample", s.knobs.sample_every, look)


def main(argv: Sequence[str] | None = None) -> dict:
    k, origins, resume_from = stage.parse_knobs(
        PretrainKnobs, argv, "base_train", "base", lambda k: k.model_tag or f"d{k.depth}"
    )
    before = resume_from.meta["knobs"] if resume_from else {}
    for f in fields(AttentionPriorKnobs):
        if resume_from and getattr(k, f.name) != (was := before.get(f.name, f.default)):
            raise UserError(
                f"this run was started with {f.name}={was}, not {getattr(k, f.name)}: leave the flag out, or use --model_tag"
            )
        if not k.rap and getattr(k, f.name) != f.default:
            raise UserError(
                f"--{f.name}={getattr(k, f.name)} says something of an attention prior: name one with --rap"
            )
    k.sequence_len = Contexts.parse(
        k.context_stages, k.sequence_len, fixed=origins["sequence_len"] != "default"
    ).longest
    sources = training_sources(k.data)

    def build(rt, tokenizer) -> GPT:
        arch = {f.name: getattr(k, f.name) for f in fields(ArchitectureKnobs)}
        config = GPTConfig(vocab_size=tokenizer.vocab_size, **k.dimensions(), **arch)
        spec, tables = None, {}
        if resume_from:  # the artifact may be gone: all of it is in the checkpoint
            config.rap = resume_from.config.rap
        elif k.rap:
            spec, tables = prior.prepare(k, config, tokenizer.fingerprint, rt.device, rt.dtype)
            config.rap = spec if k.rap_mode == "bias" else None
        model = GPT.build(config, rt.device, rt.dtype)
        model.init_weights(k.seed)
        if model.prior is not None:
            model.prior.annealed = k.rap_gate == "annealed"
            model.prior.load_state_dict(tables, strict=not resume_from)
        elif spec is not None:
            prior.warm_start(model, spec, tables, k.rap_alpha)
            print0(f"W_Q and W_K start from the prior {spec['about']}")
        return model

    def work() -> dict:
        s = stage.open_run(
            "base", "base_train", k, origins, k.model_tag or f"d{k.depth}", build, resume_from
        )
        train_shards = [
            (prepare(source, "train", s.tokenizer), source.weight) for source in sources
        ]
        val = [
            (source.name, prepare(source, "val", s.tokenizer), source.weight) for source in sources
        ]
        rows, steps = stage.choose_horizon(s)
        feed = s.feed(train_shards, rows, steps)
        return stage.train(
            s, feed, rows, steps, [stage.bits_per_byte_evaluation(s, val), sample_evaluation(s)]
        )

    with stage.session():
        return work()


if __name__ == "__main__":
    entry(main)
