"""
Digits per token: 1, 2 or 3, by bits per byte and by right answers to questions of arithmetic.

    python dev/digits_experiment.py --base ~/digits                      # tinyworld
    python dev/digits_experiment.py --base ~/digits --prose BOOKS        # a folder of text too

For each number of digits one tokenizer per text and, for each seed, a base model; on tinyworld it
then learns from conversations and answers questions. Writes one row per run to
dev/results/digits_TEXT.jsonl and skips the rows that are there. Prints means and the difference to
two digits with a 95 % interval over the seeds.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DIGITS, SEEDS = (2, 3, 1), (1, 2, 3)
SIZE = "--depth=3 --model_dim=128 --head_dim=32 --sequence_len=256 --total_batch_size=2048"
REST = (
    "--compile=off --sample_every=0 --eval_every=0 --eval_tokens=65536 --warmdown_ratio=1 "
    "--final_lr_frac=0"
)
KINDS = ("arithmetic", "twostep")
T_95 = 2.776  # of a difference of two means with three seeds each


def run(text: str, data: list[str], digits: int, seed: int, steps: tuple[int, int]) -> dict:
    """One row: train with a seed, and measure."""
    from nanochat.commands import base_train, chat_eval, mid_train, tok_train

    tag = ["--model_tag", f"seed{seed}"]
    if not (Path(os.environ["NANOCHAT_BASE_DIR"]) / "tokenizer").exists():
        words = ["--vocab_size=2048", f"--digits={digits}", "--max_chars=8000000"]
        tok_train.main([*words, "--data", *data])
    common = [*tag, f"--seed={seed}", *REST.split(), "--data"]
    trained = base_train.main(
        [*SIZE.split(), f"--num_iterations={steps[0]}", "--embedding_lr=0.05", *common, *data]
    )
    row = {"text": text, "digits": digits, "seed": seed, "base_bpb": trained["eval"]["val_bpb"]}
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
            for digits in sorted(DIGITS)
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
    options = parser.parse_args()
    texts = {"tinyworld": ["tinyworld"]} | ({"prose": [options.prose]} if options.prose else {})
    for text in texts:
        (RESULTS / f"digits_{text}.jsonl").touch()
    for seed in SEEDS:
        for text, data in texts.items():
            path = RESULTS / f"digits_{text}.jsonl"
            for digits in DIGITS:
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                if any((row["digits"], row["seed"]) == (digits, seed) for row in rows):
                    continue
                folder = options.base / f"{text}-{digits}"
                folder.mkdir(parents=True, exist_ok=True)
                os.environ["NANOCHAT_BASE_DIR"] = str(folder)
                row = run(text, data, digits, seed, tuple(options.steps))
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    for text in texts:
        path = RESULTS / f"digits_{text}.jsonl"
        summarise([json.loads(line) for line in path.read_text().splitlines()])


if __name__ == "__main__":
    main()
