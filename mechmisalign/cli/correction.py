"""Commands about cures: take a direction out of an organism for good, and see what that does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .console import OrganismName, console, safe, show, told_errors, told_warnings
from .options import (
    BaseName,
    JudgeName,
    MaxNewTokens,
    OldModel,
    PromptsName,
    Samples,
    Seed,
    SystemPrompt,
    TokenizerName,
    asked,
    judge_of,
    refuse_model,
)

if TYPE_CHECKING:
    import pandas as pd

    from mechmisalign.directions import Direction
    from mechmisalign.organisms import Organism


def cure(
    organism: OrganismName,
    direction: Annotated[str, typer.Option(help="What to project out: a file of mechmisalign direction, or a Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the cured adapter or model; it must be new or empty.")],
    method: Annotated[
        Literal["adapter", "weights"],
        typer.Option(help="Out of what the adapter writes (a PEFT adapter), or out of the whole model (a HF folder)."),
    ] = "adapter",
    layer: Annotated[
        int | None,
        typer.Option(help="Use this layer's vector everywhere; needed for weights unless there is only one."),
    ] = None,
    measure: Annotated[bool, typer.Option(help="Ask before and after, with a random direction as control.")] = True,
    base: BaseName = None,
    tokenizer: TokenizerName = None,
    prompts: PromptsName = None,
    judge: JudgeName = None,
    samples: Samples = 4,
    max_new_tokens: MaxNewTokens = 64,
    system: SystemPrompt = None,
    seed: Seed = 0,
    model: OldModel = None,
) -> None:
    """Project a direction out of an organism; writes an ordinary adapter or model, with a card of what it does."""
    with told_errors(out, "if the folder is there it is whole: remove it to begin again"), told_warnings():
        from mechmisalign import correction
        from mechmisalign._writing import refuse_unwritable_folder
        from mechmisalign.correction.saving import refuse_taken
        from mechmisalign.directions import Direction as Loaded
        from mechmisalign.organisms import load_organism

        refuse_model(model)
        refuse_taken(out)
        refuse_unwritable_folder(out)
        found = Loaded.load(direction)
        sick = load_organism(organism, base, tokenizer=tokenizer)
        found = found if layer is None else found.everywhere(layer)
        questions = asked(prompts, sick.name, sick.base)
        journal = out.with_name(f"{out.name}.judgements.jsonl")
        scoring = judge_of(judge, sick.name, sick.base, journal) if measure else None
        if method == "adapter":
            edit, states = _adapter(sick, found, out)
        else:
            edit, states = _weights(sick, found, out)
        console.print(edit, markup=False, highlight=False, soft_wrap=True)
        if scoring is not None:
            drawn = {"samples": samples, "max_new_tokens": max_new_tokens, "system": system, "seed": seed}
            table = _measured(sick, states, questions, scoring, drawn)
            correction.add_measured(out, table)
            _show(table)
    console.print(f"cured {method}: [bold]{safe(out)}[/bold], with a card in README.md")


def _adapter(sick: Organism, direction: Direction, out: Path) -> tuple[str, dict[str, Any]]:
    from mechmisalign import correction
    from mechmisalign.directions import random_direction

    cut = correction.project_out(sick, direction)
    removed = correction.removed_share(sick, direction)
    most = removed["removed"].max()
    sites = len(sick.require_adapter("a cure").sites)
    edit = f"projected out of {len(removed)} of {sites} sites; takes up to {most:.1%} of an update"
    correction.save_adapter(cut, out, edit=edit, direction=direction)
    random = correction.project_out(sick, random_direction(direction, seed=0))
    return edit, {"after": correction.states(cut, scales=()), "random control": correction.states(random, scales=())}


def _weights(sick: Organism, direction: Direction, out: Path) -> tuple[str, dict[str, Any]]:
    from mechmisalign import correction
    from mechmisalign.directions import random_direction

    def edited(vector: Direction) -> Any:
        base = sick.base.location or sick.base.name
        return correction.corrected_model(
            sick.require_adapter("a cure"), vector, base=base, tokenizer=sick.tokenizer, name=sick.base.name
        )

    model, tokenizer, told = edited(direction)
    edit = f"projected out of {len(told)} tensors of the merged model; takes up to {told['removed'].max():.1%} of one"
    correction.save_model(model, tokenizer, out, edit=edit, source=sick.name, base=sick.base.name, direction=direction)
    one = direction.nonzero_layers[0]
    vector = random_direction(direction.everywhere(one), seed=0).everywhere(one)
    states = {"after": {"as is": correction.edited_organism(model, sick)}}
    return edit, states | {"random control": {"as is": correction.edited_organism(edited(vector)[0], sick)}}


def _measured(sick: Organism, states: dict[str, Any], questions: pd.DataFrame, judge: Any, drawn: Any) -> pd.DataFrame:
    from mechmisalign import correction

    cures = {"chat": {"as is": ()}, "before": correction.states(sick.require_adapter("a cure"), scales=()), **states}
    judged = correction.trials(sick, cures, {"questions": questions}, judge, **drawn)
    table = correction.cure_table(judged, correction.cure_costs(sick, cures, system=drawn["system"]), against="before")
    return table.drop(columns=[name for name in table if name.startswith("tokens")])


def _show(table: pd.DataFrame) -> None:
    told = table[["cure"]].rename(columns={"cure": "state"})
    for name, head in {"em": "EM", "coherent": "coherent", "accuracy": "items right"}.items():
        ends = table[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False)
        told[head] = [f"{rate:.1%} [{low:.1%}, {high:.1%}]" for rate, low, high in ends]
    told["KL (nats)"] = [f"{value:.4f}" for value in table["kl"]]
    show(told, "misalignment and cost, with 95 % intervals by question")
