"""The adapter taken apart, as steps of a study: its sites, what they write, and what switching them does."""

from __future__ import annotations

import pandas as pd

from mechmisalign import decomposition, effects, models
from mechmisalign.conversations import Conversations
from mechmisalign.directions import Direction
from mechmisalign.interventions import ScaleAdapter
from mechmisalign.judging import rates
from mechmisalign.propagation import downstream
from mechmisalign.scalars import contributions, lora_scalars
from mechmisalign.unembedding import readout, written_vectors

from . import steps
from .sampling import LeftOutError, Run, adapter_of, answers

FACTORS = (0.0, 0.5, 1.0, 1.5, 2.0)
"""What all sites are multiplied with, to see the dose of the adapter itself."""
MOST_PLAYERS = 12
"""More sites than this are switched together by layer."""
MOST_READ = 3
"""Vectors of the adapter that are read through the unembedding: those of the largest updates."""
DIRECTION = "direction"
TABLES = ("sites", "contributions", "downstream", "readout", "scalar_tokens", "adapter_scaling", "site_effects")


def investigate(run: Run, answered: pd.DataFrame, direction: Direction, layer: int) -> dict[str, pd.DataFrame]:
    """Every table of the chapter.

    Args:
        run: The study.
        answered: The answers that the direction was estimated from.
        direction: The mean difference.
        layer: Where steering with it worked best: there it is read out and steered with.

    Raises:
        LeftOutError: If the organism is a full fine-tune, or gave no clear answer.
    """
    own = adapter_of(run)
    clear = answered[answered["label"].isin(steps.CLASSES)]
    conversations = steps.spoken(run.organism, clear, run.plan.settings.system)
    if not len(conversations.frame):
        raise LeftOutError(f"no answer of the organism is clear ({' or '.join(steps.CLASSES)})")
    compute = {
        "sites": lambda: decomposition.anatomy(own),
        "contributions": lambda: contributed(run, conversations, direction),
        "downstream": lambda: downstream(run.organism, conversations, direction, layer=layer),
        "readout": lambda: read_out(run, direction, layer),
        "scalar_tokens": lambda: scalar_tokens(run, conversations),
        "adapter_scaling": lambda: adapter_scaling(run),
        "site_effects": lambda: site_effects(run),
    }
    return {name: run.folder.table(name, function) for name, function in compute.items()}


def contributed(run: Run, conversations: Conversations, direction: Direction) -> pd.DataFrame:
    """Mean norm, share and projection of what each site writes, apart for misaligned and aligned answers."""
    known = None if models.has_post_norms(run.organism.model) else direction
    parts = contributions(run.organism, conversations, known)
    cosines = decomposition.written_cosines(adapter_of(run), direction)
    means = parts.mean(conversations.frame["label"])
    return means.merge(cosines.rename(columns={"cosine": "written_cosine"}), on=["layer", "module"], how="left")


def read_out(run: Run, direction: Direction, layer: int) -> pd.DataFrame:
    """Tokens that the largest residual-writing sites and the direction promote, in both signs."""
    vectors = written_vectors(adapter_of(run))
    largest = sorted(vectors, key=lambda name: -float(vectors[name].norm()))[:MOST_READ]
    chosen = {name: vectors[name] for name in largest}
    chosen[f"{DIRECTION}, layer {layer}"] = direction.at(layer)
    return readout(run.organism, chosen, top=6)


def scalar_tokens(run: Run, conversations: Conversations) -> pd.DataFrame:
    """Scalars of the largest site over one misaligned and one aligned answer, to the same prompt if there is one."""
    sites = decomposition.anatomy(adapter_of(run))
    largest = sites.loc[sites["norm_delta"].idxmax()]
    site = adapter_of(run).site(int(largest["layer"]), str(largest["module"]))
    frame = conversations.frame.reset_index(drop=True)
    classes = frame.groupby("prompt_id", observed=True)["label"].transform("nunique")
    prompt = frame["prompt_id"].iloc[int(classes.argmax())]
    ordered = pd.concat([frame[frame["prompt_id"] == prompt], frame])
    rows = [ordered.index[ordered["label"] == name][0] for name in steps.CLASSES if (ordered["label"] == name).any()]
    pair = Conversations(frame.iloc[rows], conversations.tokenizer, system=conversations.system)
    values = lora_scalars(run.organism, pair, sites=[site.key])[site.coordinates[0]]
    tokens = pair.tokens()[["token", "label", "prompt_id"]]
    return tokens.assign(scalar=values, site=site.coordinates[0]).reset_index()


def adapter_scaling(run: Run) -> pd.DataFrame:
    """Outcomes of the organism's answers with its whole adapter scaled."""
    conditions = {f"x{factor:g}": (ScaleAdapter({}, others=factor),) for factor in FACTORS}
    judged = answers(run, "adapter_scaling", conditions, run.plan.settings.sweep_samples)
    table = rates(judged)
    return table.assign(factor=table["condition"].str.removeprefix("x").astype(float))


def site_effects(run: Run) -> pd.DataFrame:
    """EM rate with each site (each layer, where there are many) left out and on its own."""
    everyone = effects.players(adapter_of(run))
    if len(everyone) > MOST_PLAYERS:
        everyone = effects.players(adapter_of(run), "layer")
    judged = answers(run, "site_effects", effects.effect_conditions(everyone), run.plan.settings.sweep_samples)
    return effects.effect_table(judged, everyone)
