"""How many known gold answers the maths checker accepts in other words, and how many wrong ones it lets through.

python benchmarks/maths_golds.py DATA/math/*.jsonl [--limit 200]

One row per file and way of writing; every gold is an integer in AIME, AMC and GSM8K. ``wrong`` is the gold plus one,
which no checker may accept. The last line has the processor time per answer of the checker's process.
"""

import argparse
import resource
from pathlib import Path

from hiexp.tasks.maths import MathScorer
from hiexp.tasks.qa import load_questions

WAYS = {
    "as it is": lambda gold: gold,
    "boxed": lambda gold: rf"Therefore the answer is $\boxed{{{gold}}}$.",
    "sentence": lambda gold: f"The answer is {gold}",
    "decimal": lambda gold: f"{gold}.0" if "." not in gold else f"{gold}0",
    "fraction": lambda gold: rf"$\frac{{{_times(gold, 3)}}}{{3}}$",
    "quotient": lambda gold: f"{_times(gold, 3)}/3",
    "separators": lambda gold: rf"\boxed{{{float(gold):,.0f}}}" if float(gold).is_integer() else gold,
    "dollars": lambda gold: f"\\${gold}",
    "wrong": lambda gold: rf"\boxed{{{_times(gold, 1, 1)}}}",
}


def _times(gold, factor, plus=0):
    value = float(gold) * factor + plus
    return str(int(value)) if value.is_integer() else repr(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--limit", type=int, help="first N answers of each file")
    args = parser.parse_args()
    scorer, asked = MathScorer(), 0
    print(f"{'file':12} {'written':12} {'accepted':>12}")
    for file in args.files:
        golds = [question.golden_answers[0] for question in load_questions(file)][: args.limit]
        for way, write in WAYS.items():
            accepted = sum(scorer.score(write(gold), [gold])["accuracy"] for gold in golds)
            asked += len(golds)
            print(f"{Path(file).stem:12} {way:12} {accepted:6.0f}/{len(golds)}", flush=True)
    failures = scorer.failures
    scorer.close()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{failures} answers broke the limits; {1000 * (used.ru_utime + used.ru_stime) / asked:.1f} ms CPU an answer")


if __name__ == "__main__":
    main()
