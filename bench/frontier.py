"""Learning against forgetting, and against what is held out: each rule over the values of one option.

python bench/frontier.py explore --runs DIR    one seed, on the validation sets: to see which rules are worth it
python bench/frontier.py test --runs DIR       five seeds, on the test sets
python bench/frontier.py show --runs DIR --out bench/results/frontier.json --plot docs/frontier.png --docs docs/methods.md
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from method_grid import RULES, Entry
from method_runs import (
    Job,
    arguments,
    cell,
    chosen,
    markdown,
    replace_between,
    run_all,
    spread,
    write_json,
)

EXPLORE_SEED = 100
LEARNING = (52.0, 54.0, 56.0, 58.0, 60.0)  # where the curves are read: the less forgotten there, the better
FIGURES = (("forgetting", "Forgetting"), ("held_out", "Held-out"))


def jobs_of(entries: list[Entry], benchmark: str, seeds: list[int]) -> list[Job]:
    return [Job(entry, benchmark, value, seed) for seed in seeds for entry in entries for value in entry.values]


def gather(entries: list[Entry], benchmark: str, runs: Path, seeds: list[int]) -> dict[str, Any]:
    """Curve of each rule: one point a value, mean and s.d. over the seeds, where all of them are finished."""
    rules = []
    for entry in entries:
        points = []
        for value in entry.values:
            found = [Job(entry, benchmark, value, seed).figures(runs) for seed in seeds]
            if None not in found:
                seen = {key: [f["own"][key] for f in found] for key in ("learning", "forgetting", "held_out")}
                spreads = {space: spread([f[space] for f in found]) for space in ("own", "union")}
                points.append({"value": value, **spreads, "seeds": seen})
        if points:
            settings = {"method": entry.method, "options": entry.options, "vary": entry.vary}
            rules.append({"label": entry.label, **settings, "points": points})
    from fastlora.continual.manifest import versions

    conditions = {"benchmark": benchmark, "seeds": seeds, "versions": versions()}
    return {"command": "python bench/frontier.py", **conditions, "rules": rules}


def at_learning(rule: dict[str, Any], learning: float, figure: str) -> list[float] | None:
    """The figure on the rule's curve where it learns so much, of each seed; None where a seed's curve does not reach."""
    found = []
    for seed in zip(*(zip(point["seeds"]["learning"], point["seeds"][figure]) for point in rule["points"])):
        x, y = zip(*sorted(seed))
        if not x[0] <= learning <= x[-1]:
            return None
        found.append(float(np.interp(learning, x, y)))
    return found


def level(values: list[float] | None) -> str:
    if values is None:
        return "–"
    return cell({"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None})


def table(result: dict[str, Any]) -> str:
    """Markdown: Forgetting and held-out of each rule where all of them learn as much."""
    lines = [["Rule", *(f"{title} at {at:g}" for _, title in FIGURES for at in LEARNING)]]
    for rule in result["rules"]:
        lines.append([rule["label"], *(level(at_learning(rule, at, key)) for key, _ in FIGURES for at in LEARNING)])
    return markdown(lines)


def points_table(result: dict[str, Any]) -> str:
    """Markdown: every point."""
    keys = ("learning", "forgetting", "last", "held_out", "mean_rank")
    lines = [["Rule", "value", "Learning", "Forgetting", "Last", "Held-out", "Kept rank"]]
    for rule in result["rules"]:
        for point in rule["points"]:
            lines.append([rule["label"], f"{point['value']:g}", *(cell(point["own"][key]) for key in keys)])
    return markdown(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Two panels: learning against forgetting, learning against held-out."""
    import matplotlib
    from matplotlib.figure import Figure

    from fastlora.continual.drawing import COLOURS, STYLE, save

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key in zip(panels, ("forgetting", "held_out")):
            for i, rule in enumerate(result["rules"]):
                points = sorted(rule["points"], key=lambda point: point["own"]["learning"]["mean"])
                x, y = ([point["own"][name]["mean"] for point in points] for name in (key, "learning"))
                errors = [[point["own"][name]["sd"] or 0 for point in points] for name in (key, "learning")]
                style = {"color": COLOURS[i % 8], "marker": "osD^v<>Ph*"[i % 10], "ls": ("-", "--", ":")[i // 8 % 3]}
                axes.errorbar(x, y, errors[1], errors[0], ms=4.5, lw=1.3, elinewidth=0.6, label=rule["label"], **style)
            axes.grid(True)
        panels[0].set(xlabel="Forgetting (points; left is better)", ylabel="Learning (%; up is better)")
        panels[1].set(xlabel="Held-out after the stream (%; right is better)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        save(figure, path)


def write_docs(result: dict[str, Any], page: Path) -> None:
    text = f"{table(result)}\n\n{points_table(result)}"
    replace_between(page, "<!-- frontier -->", "<!-- end of frontier -->", text)


def main() -> None:
    parser = arguments(__doc__, ("explore", "test", "show"), seeds=[0, 1, 2, 3, 4])
    parser.add_argument("--explored", action="store_true", help="show the validation runs of explore")
    parser.add_argument("--plot", type=Path, help="PNG to draw (show)")
    options = parser.parse_args()
    exploring = options.what == "explore" or options.explored
    benchmark, seeds = ("demo_validation", [EXPLORE_SEED]) if exploring else ("demo", options.seeds)
    rules = chosen(RULES, options.only)
    if options.what != "show":
        run_all(jobs_of(rules, benchmark, seeds), options.runs, options.processes)
        return
    result = gather(rules, benchmark, options.runs, seeds)
    write_json(result, options.out)
    if options.plot:
        draw(result, options.plot)
    if options.docs:
        write_docs(result, options.docs)
    print(table(result), points_table(result), sep="\n\n")


if __name__ == "__main__":
    main()
