"""What fastattn costs on top of the work itself: a hit in nanoseconds, the start of a process in milliseconds.

    python benchmarks/overhead.py [--smoke] [--json FILE] [--results docs/results]
    python benchmarks/overhead.py --against DIR        # a hit here and in another checkout, by processes that alternate
    python benchmarks/overhead.py --first-calls        # first calls on extreme problems: time and memory
    python benchmarks/overhead.py --first-calls --only mask "1 query"    # those whose name has one of these in it

Every row is one interleaved measurement: the base, the base again (the A/A spread), and fastattn's way to the same work.
Exit code 1 when an aim of the design is missed (with --smoke: only when absurd). docs/benchmarks.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import checkouts
import first_calls
import hits
import starts
import torch
from comparison import Bench, table
from machine import add_results, environment, in_one_line, open_console, results_folder
from rounds import interleave

import fastattn


def measure(rounds: int, smoke: bool) -> Bench:
    """All rows."""
    torch.manual_seed(0)
    bench = Bench(rounds, seconds=0.3 if smoke else 2.0)
    busy = torch.randn(256, 256)
    interleave({"busy": lambda: busy @ busy}, rounds=20, seconds=0.5, sample_s=25e-3)  # the clock rate settles
    with tempfile.TemporaryDirectory() as directory:
        fastattn.options(cache_dir=directory, mode="cached")  # an empty store: nothing is tuned, F.sdpa serves
        for rows in (hits.null_rows, hits.drop_in_row, hits.decode_row, hits.bind_row, hits.scope_rows, hits.part_rows,
                     hits.op_rows, hits.bare_rows):  # fmt: skip
            rows(bench)
        fastattn.options(mode="auto", tune_budget=600.0)
        hits.decode_loop_row(bench, tokens=8 if smoke else 32, start=508 if smoke else 496)
        bench.rows += starts.start_rows(3 if smoke else 9, directory)
    return bench


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write all numbers to FILE")
    parser.add_argument("--smoke", action="store_true", help="few rounds, exit 0 unless absurd")
    parser.add_argument("--rounds", type=int, help="rounds a row (default 41), or processes of a checkout (default 7)")
    parser.add_argument("--against", metavar="DIR", type=Path, help="only compare a hit with that checkout's")
    parser.add_argument("--first-calls", action="store_true", help="only first calls, on problems of extreme shapes")
    parser.add_argument(
        "--only", metavar="WORDS", nargs="+", help="of the first calls, those with such words in their name"
    )
    add_results(parser, "overhead.txt and .json (against.txt, first-calls.txt and so on)")
    return parser.parse_args()


def main() -> int:
    args = parse()
    torch.set_num_threads(1)
    console, facts, missed = open_console(), environment(), False
    if args.first_calls:
        calls = first_calls.first_calls(first_calls.chosen(args.only)[: 1 if args.smoke else None])
        console.print(first_calls.table(calls))
        missed = not args.smoke and not all(call.is_met for call in calls)
        data = {"first_calls": [asdict(call) | {"is_met": call.is_met} for call in calls]}
    elif args.against:
        found = checkouts.compare(args.against, args.rounds or (1 if args.smoke else 7), args.smoke)
        rows = checkouts.summary(found)
        console.print(checkouts.table(rows, args.against))
        data = {"against": str(args.against), "rows": rows, "processes": found}
    else:
        bench = measure(args.rounds or (5 if args.smoke else 41), args.smoke)
        console.print(table(bench.rows))
        names = [row.name for row in bench.rows if not row.is_met]
        missed = any(row.is_absurd for row in bench.rows) or (bool(names) and not args.smoke)
        if names:
            console.print(f"aims missed: {', '.join(names)}" + (" (a smoke run decides nothing)" if args.smoke else ""))
        data = {"rows": [asdict(row) | {"is_met": row.is_met} for row in bench.rows]}
    console.print(in_one_line(facts), style="dim")
    text = json.dumps({"environment": facts, "smoke": args.smoke, **data}, indent=1)
    if args.json:
        Path(args.json).write_text(text, encoding="utf-8")
    if (folder := results_folder(args, facts)) is not None:
        name = "first-calls" if args.first_calls else "against" if args.against else "overhead"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
        (folder / f"{name}.txt").write_text(console.export_text(), encoding="utf-8")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
