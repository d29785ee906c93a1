"""The report's chapter on the adapter: its figures and their words."""

from __future__ import annotations

import pandas as pd

from mechmisalign import plots
from mechmisalign.plots import TokenHeatmap
from mechmisalign.report import ReportFigure, Section, percent, rates_table

from .figures import saved
from .naming import shown
from .records import Records


def taken_apart(records: Records) -> Section:
    """Where the adapter sits, what it writes, and what its sites do."""
    sites, effects = records.tables["sites"], records.tables["site_effects"]
    figures = [sites_figure(records), contributions_figure(records), downstream_figure(records)]
    if _several(effects):
        figures.append(effects_figure(records))
    figures += [scaling_figure(records), readout_figure(records)]
    return Section(
        title="Taken apart: the adapter",
        lead=_lead(records, sites, effects),
        heatmaps=heatmaps(records),
        figures=tuple(figure for figure in figures if figure is not None),
        tables=(
            rates_table(
                records.tables["adapter_scaling"], ["condition"], "The whole adapter scaled, merged weights untouched."
            ),
        ),
    )


def sites_figure(records: Records) -> ReportFigure:
    """Layer x module heat map of the updates' norms."""
    table = records.tables["sites"]
    caption = f"Norm of the update ΔW of each adapted matrix ({len(table)} in all)."
    return saved(records, "anatomy", plots.site_heatmap(table), table, caption)


def contributions_figure(records: Records) -> ReportFigure | None:
    """Projections of what the sites write, by layer and class of answer."""
    table = records.tables["contributions"]
    known = table[table["projection"].notna()]
    if known.empty:
        return None
    figure = plots.contribution_by_layer(known[["layer", "module", "projection", "label"]])
    caption = (
        f"What the sites write, projected on the {shown(records.reference)} of their layer: mean over the tokens of "
        f"each class of answers ({_tokens(known)})."
    )
    return saved(records, "contributions", figure, table, caption)


def downstream_figure(records: Records) -> ReportFigure | None:
    """Adapter's shift against the shift of steering, by layer."""
    table = records.tables["downstream"]
    if table.empty:
        return None
    adapted = sorted(set(records.tables["sites"]["layer"]))
    figure = plots.downstream(table, site_layer=adapted if len(adapted) <= 3 else None)
    caption = (
        "Cosine between the shift that the adapter causes and the shift that steering the chat model with the "
        f"{shown(records.reference)} causes, over the same answers; 95 % intervals by resampling prompts. Grey: random "
        "directions of that norm, from the lowest to the highest."
    )
    return saved(records, "downstream", figure, table, caption)


def effects_figure(records: Records) -> ReportFigure:
    """Effect of leaving each site out, and of each alone."""
    table = records.tables["site_effects"]
    sites = table[~table["kind"].isin(["all", "none"])]
    caption = (
        "What each site does to the EM rate: what leaving it out takes away, and what it brings alone "
        f"(n = {int(sites['n'].min())} per condition; 95 % intervals, paired by prompt)."
    )
    return saved(records, "site_effects", plots.site_effects(sites), table, caption)


def scaling_figure(records: Records) -> ReportFigure:
    """Outcomes at each factor of the adapter."""
    table = records.tables["adapter_scaling"]
    outcomes = _outcomes(table)
    caption = f"Answers with the whole adapter scaled (n = {int(table['n'].min())} per bar)."
    return saved(records, "adapter_scaling", plots.scaling_bars(outcomes), outcomes, caption)


def readout_figure(records: Records) -> ReportFigure:
    """Tokens that the sites' vectors and the direction promote."""
    table = records.tables["readout"]
    caption = (
        f"Tokens promoted by what the largest sites write and by the {shown(records.reference)}, read through the "
        "final norm and the unembedding as if each were the whole residual stream; in both signs, since a scalar can "
        "have either."
    )
    return saved(records, "readout", plots.readout_table(table), table, caption)


def heatmaps(records: Records) -> tuple[TokenHeatmap, ...]:
    """Scalars over an answer of each class, on one scale."""
    table = records.tables["scalar_tokens"]
    limit = float(table["scalar"].abs().max())
    return tuple(
        TokenHeatmap(
            tuple(answer["token"]),
            tuple(answer["scalar"].astype(float)),
            title=f"Scalar of {answer['site'].iloc[0]} over {_article(str(name))} answer",
            limit=limit,
        )
        for name, answer in table.groupby("label", sort=False, observed=True)
    )


def _lead(records: Records, sites: pd.DataFrame, effects: pd.DataFrame) -> str:
    scaled = records.tables["adapter_scaling"].set_index("factor")
    layers = sorted(set(sites["layer"]))
    told = (
        f"The adapter changes {len(sites)} matri{'x' if len(sites) == 1 else 'ces'} in "
        f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}. Each site reads "
        "scalars (A x) from its matrix's input and writes them along the columns of B. Scaled to 0 the adapter leaves "
        f"{_rated(scaled.loc[0.0])} misaligned answers, at 1 {_rated(scaled.loc[1.0])}, "
        f"at 2 {_rated(scaled.loc[2.0])}."
    )
    if not _several(effects):
        return told
    single = effects[effects["kind"] == "only one"]
    best = single.loc[single["rate"].idxmax()]
    whole = effects.set_index("kind").loc["all"]
    return told + (
        f" Alone, the strongest ({best['site']}) reaches {_rated(best)}, all together {_rated(whole)}: what "
        "sites do together need not be the sum of what they do alone."
    )


def _rated(row: pd.Series) -> str:
    return f"{percent(row['rate'])} ({percent(row['coherent'])} coherent)"


def _several(effects: pd.DataFrame) -> bool:
    return bool((effects["kind"] == "only one").sum() > 1)


def _outcomes(table: pd.DataFrame) -> pd.DataFrame:
    """Shares of misaligned, aligned, otherwise coherent, and incoherent answers, in long form."""
    shares = pd.DataFrame(
        {
            "misaligned": table["rate"],
            "aligned": table["aligned"],
            "neither": (table["coherent"] - table["rate"] - table["aligned"]).clip(lower=0.0),
            "incoherent": 1.0 - table["coherent"],
        }
    ).assign(condition=table["condition"])
    return shares.melt(id_vars="condition", var_name="outcome", value_name="share")


def _tokens(table: pd.DataFrame) -> str:
    counts = table.groupby("label", sort=False, observed=True)["tokens"].first()
    return ", ".join(f"{name}: {count} tokens" for name, count in counts.items())


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
