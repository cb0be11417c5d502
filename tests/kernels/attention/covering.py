"""Covering arrays: few rows in which every pair of values of two factors occurs."""

import itertools
import random


def pairwise(factors: dict[str, list], seed: int = 0) -> list[dict]:
    """Rows (factor -> value) such that each pair of values of any two factors is in one of them. Greedy."""
    source, names = random.Random(seed), list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows = []
    while missing:
        best, covered = None, set()
        for _ in range(30):
            row = {name: source.randrange(len(values)) for name, values in factors.items()}
            row.update(source.choice(sorted(missing)))
            found = {pair for pair in itertools.combinations([(n, row[n]) for n in names], 2) if pair in missing}
            if len(found) > len(covered):
                best, covered = row, found
        missing -= covered
        rows.append({name: factors[name][best[name]] for name in names})
    return rows
