"""A comparison of runs for papers and programs: CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from tenfold.records.metric import FRACTION
from tenfold.reporting.comparison import METRICS, Group, score_head

_HEADS = {"params": "Params (\\%)", "macs": "MACs (\\%)", "speedup": "Speed-up", "score": "Score (\\%)"}
_SPECIAL = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}


def as_csv(groups: Sequence[Group]) -> str:
    """Return one line for each group: means and standard deviations as fractions, empty where nobody measured.

    Scores are as ``evaluate`` returned them; where they are no fractions, a last column says what they are.

    Example:
        >>> as_csv([]).split(",")[:4]
        ['model', 'method', 'budget', 'runs']
    """
    heads = ["model", "method", "budget", "runs", "seeds"]
    heads += [f"{name}{end}" for name in METRICS for end in ("", "_sd")]
    named = any(group.metric != FRACTION for group in groups)
    heads += ["metric"] if named else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for group in groups:
        row: list[object] = [group.model, group.method, group.budget, len(group.runs), " ".join(map(str, group.seeds))]
        for name in METRICS:
            spread = group.values.get(name)
            row += ["", ""] if spread is None else [repr(spread.mean), "" if spread.sd is None else repr(spread.sd)]
        writer.writerow([*row, group.metric.label] if named else row)
    return text.getvalue()


def as_latex(groups: Sequence[Group]) -> str:
    r"""Return a table for the LaTeX package booktabs: mean ± standard deviation, with the number of runs.

    Columns of what nobody measured are left out.

    Example:
        >>> print(as_latex([]).splitlines()[0])
        \begin{tabular}{lllr}
    """
    heads = {**_HEADS, "score": escaped(score_head(groups, "Score"))}
    if heads["score"] == escaped(FRACTION.label):
        heads["score"] = _HEADS["score"]
    shown = [name for name in _HEADS if any(name in group.values for group in groups)]
    lines = [f"\\begin{{tabular}}{{lllr{'r' * len(shown)}}}", "  \\toprule"]
    lines += [f"  {' & '.join(['Model', 'Method', 'Budget', 'Runs', *(heads[name] for name in shown)])} \\\\"]
    lines += ["  \\midrule"]
    before = None
    for group in groups:
        if before not in {None, group.model}:
            lines.append("  \\addlinespace")
        cells = ["" if group.model == before else group.model, group.method, group.budget]
        numbers = [_tex(group, name) for name in shown]
        lines.append(f"  {' & '.join([*map(escaped, cells), str(len(group.runs)), *numbers])} \\\\")
        before = group.model
    return "\n".join([*lines, "  \\bottomrule", "\\end{tabular}", ""])


def escaped(text: str) -> str:
    r"""Return text in which LaTeX sees no commands.

    Example:
        >>> print(escaped("low_rank, 50 % of the MACs"))
        low\_rank, 50 \% of the MACs
    """
    made = "".join(_SPECIAL.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
    return made.replace("—", "---").replace("→", "$\\to$").replace("×", "$\\times$")


def _tex(group: Group, name: str) -> str:
    spread, metric = group.values.get(name), group.metric
    if spread is None:
        return "---"
    scale = metric.plotted(1.0) if name == "score" else 1.0 if name == "speedup" else 100.0
    form = ".2f" if name != "score" or metric.percent else ".4g"
    sd = "" if spread.sd is None else f" \\pm {scale * spread.sd:{form}}"
    return f"${scale * spread.mean:{form}}{sd}$"
