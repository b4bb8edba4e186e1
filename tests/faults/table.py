"""The table that `make test-faults` ends with: faults injected and survived, by kind.

    python tests/faults/table.py TALLY.jsonl

The lines are {"kind": str, "tried": int, "survived": int}. Exit code 1 where one was not survived.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    totals: dict[str, list[int]] = {}
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        total = totals.setdefault(row["kind"], [0, 0])
        total[0] += row["tried"]
        total[1] += row["survived"]
    print("| fault | injected | survived |\n| --- | ---: | ---: |")
    for kind, (tried, survived) in sorted(totals.items()):
        print(f"| {kind} | {tried} | {survived} |")
    tried, survived = (sum(column) for column in zip(*totals.values(), strict=True))
    print(f"| all | {tried} | {survived} |")
    unsurvived = sum(t - s for kind, (t, s) in totals.items() if not kind.startswith("mutant"))
    sys.exit(int(unsurvived > 0))


if __name__ == "__main__":
    main()
