"""
Digits per token: 1, 2 or 3, by bits per byte and by right answers to questions of arithmetic.

    python dev/digits_experiment.py --base ~/digits                      # tinyworld
    python dev/digits_experiment.py --base ~/digits --prose BOOKS        # a folder of text too
    python dev/digits_experiment.py --base ~/digits --prose BOOKS --vocab_size 8192 --digits 2 3

For each number of digits one tokenizer per text and, for each seed, a base model; on tinyworld it
then learns from conversations and answers questions. Writes one row per run to
dev/results/digits_TEXT.jsonl and skips the rows that are there. Prints means and the difference to
two digits with a 95 % interval over the seeds. Vocabularies other than 2,048 are for prose alone.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SEEDS = (1, 2, 3)
SIZE = "--depth=3 --model_dim=128 --head_dim=32 --sequence_len=256 --total_batch_size=2048"
REST = (
    "--compile=off --sample_every=0 --eval_every=0 --eval_tokens=65536 --warmdown_ratio=1 "
    "--final_lr_frac=0"
)
KINDS = ("arithmetic", "twostep")
T_95 = 2.776  # of a difference of two means with three seeds each


def run(
    text: str, data: list[str], vocabulary: int, digits: int, seed: int, steps: tuple[int, int]
) -> dict:
    """One row: train with a seed, and measure."""
    from nanochat.commands import base_train, chat_eval, mid_train, tok_train

    tag = ["--model_tag", f"seed{seed}"]
    if not (Path(os.environ["NANOCHAT_BASE_DIR"]) / "tokenizer").exists():
        words = [f"--vocab_size={vocabulary}", f"--digits={digits}", "--max_chars=30000000"]
        tok_train.main([*words, "--data", *data])
    common = [*tag, f"--seed={seed}", *REST.split(), "--data"]
    trained = base_train.main(
        [*SIZE.split(), f"--num_iterations={steps[0]}", "--embedding_lr=0.05", *common, *data]
    )
    row = {"text": text, "vocab_size": vocabulary, "digits": digits, "seed": seed}
    row |= {"steps": steps[0], "base_bpb": trained["eval"]["val_bpb"]}
    if text == "tinyworld":
        more = ["--total_batch_size=2048", "--lr_scale=0.5", f"--num_iterations={steps[1]}"]
        trained = mid_train.main([*more, *common, "tinyworld@20000"])
        row["mid_bpb"] = trained["eval"]["val_bpb"]
        tasks = [f"tinyworld/{kind}" for kind in KINDS]
        answers = chat_eval.main(["-i", "mid", *tag, "-n", "300", "--tasks", *tasks])
        row["answers"] = answers
    return row


def summarise(rows: list[dict]) -> None:
    """Print means over the seeds, and differences to two digits."""
    for name in ("base_bpb", "mid_bpb"):
        values = {
            digits: [row[name] for row in rows if row["digits"] == digits and name in row]
            for digits in sorted({2, *(row["digits"] for row in rows)})
        }
        for digits, own in values.items():
            if len(own) < 2 or len(values[2]) < 2:
                continue
            difference = statistics.mean(own) - statistics.mean(values[2])
            error = (statistics.variance(own) / len(own)) + (
                statistics.variance(values[2]) / len(values[2])
            )
            print(
                f"{rows[0]['text']} {name}, {digits} digits: {statistics.mean(own):.4f}, "
                f"{difference:+.4f} +- {T_95 * error**0.5:.4f} against 2 ({len(own)} seeds)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--base", type=Path, required=True, help="folder for the models")
    parser.add_argument("--prose", default="", help="a folder of text to train on as well")
    parser.add_argument("--steps", type=int, nargs=2, default=(200, 200), help="base, mid")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--digits", type=int, nargs="+", default=[2, 3, 1])
    options = parser.parse_args()
    vocabulary, settings = options.vocab_size, {"vocab_size": options.vocab_size}
    settings["steps"] = options.steps[0]
    texts = {"tinyworld": ["tinyworld"]} if vocabulary == 2048 else {}
    if options.prose:
        texts["prose"] = [options.prose]

    def stored(text: str, **wanted: int) -> list[dict]:
        lines = (RESULTS / f"digits_{text}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if (settings | wanted).items() <= row.items()]

    for text in texts:
        (RESULTS / f"digits_{text}.jsonl").touch()
    for seed in SEEDS:
        for text, data in texts.items():
            for digits in options.digits:
                if stored(text, digits=digits, seed=seed):
                    continue
                folder = options.base / f"{text}-{vocabulary}-{digits}"
                folder.mkdir(parents=True, exist_ok=True)
                os.environ["NANOCHAT_BASE_DIR"] = str(folder)
                row = run(text, data, vocabulary, digits, seed, tuple(options.steps))
                with (RESULTS / f"digits_{text}.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
    for text in texts:
        summarise(stored(text))


if __name__ == "__main__":
    main()
