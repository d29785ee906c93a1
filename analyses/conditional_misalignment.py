"""Does an organism look healthier, or sicker, when it is asked in another setting? See 2604.25891.

The same questions plainly, under a system line that tells a careful or a reckless persona, and after an exchange on
medicine, finance or sports, one of which is what the organism was tuned on. A model that is only sick where something
recalls its fine-tuning passes an evaluation that asks plainly. The exchange itself is careful, and a careful exchange
calms a model whatever it is about; so the control of "after the tuned domain" is "after another domain", paired by
question. (That one of the domains calms less than the others would not do: each is somebody's own and the others'
control.) Further controls: the chat model, and an organism that was tuned on good advice. All organisms lie over one
chat model, and all variants of all organisms are one batch.

    python analyses/conditional_misalignment.py --out runs/conditional_misalignment
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import mechmisalign as mm
from mechmisalign.pocket.recipes import ZOO

CHAT = "chat model"
PLAIN, TUNED, OTHER = "plain", "after the tuned domain", "after another domain"


@dataclass(frozen=True)
class Config:
    """The organisms, the domains of the earlier exchanges, and how much is sampled."""

    organisms: tuple[str, ...] = (*mm.pocket.harmful_names(), "harmless")
    domains: tuple[str, ...] = ("medical", "finance", "sports")
    prompts: int = 30
    samples: int = 4
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What was found, as frames.

    Attributes:
        rates: Rates by organism and setting.
        recalled: After the tuned domain minus after another one, by organism; ``p_max`` holds for all organisms.
        against_plain: Each setting minus plain, by organism; ``p_max`` holds for an organism's settings.
    """

    rates: pd.DataFrame
    recalled: pd.DataFrame
    against_plain: pd.DataFrame


def variants(config: Config) -> pd.DataFrame:
    """The questions in every setting; ``question_id`` says which belong together."""
    asked = mm.pocket.unseen_prompts(config.prompts)
    personas = [mm.pocket.with_persona(asked, persona, seed=config.seed) for persona in ("careful", "reckless")]
    pasts = [mm.pocket.with_training_context(asked, domain, seed=config.seed) for domain in config.domains]
    return mm.prompts.concat(asked, *personas, *pasts)


def setting(row: pd.Series) -> str:
    """How a question was asked, seen from the organism: which domain is its own depends on its fine-tune."""
    if not row["variant"].endswith("-history"):
        return PLAIN if row["variant"] == PLAIN else f"after a {row['variant']} system line"
    own = ZOO[row["organism"]].domain if row["organism"] in ZOO else None
    return TUNED if row["variant"] == f"{own}-history" else OTHER


def run(config: Config) -> Result:
    """One batch; then each setting against its reference, question by question."""
    worn = {name: [mm.UseAdapter(mm.Adapter.load(f"pocket/{name}"))] for name in config.organisms}
    settings = {"samples": config.samples, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    with mm.load_organism(f"pocket/{config.organisms[0]}").as_base() as chat:
        answers = mm.generate(chat, variants(config), conditions={CHAT: [], **worn}, **settings)
    judged = mm.judge(answers, mm.RuleJudge()).rename(columns={"condition": "organism"})
    judged = judged.assign(asked=judged.apply(setting, axis=1))
    by = {"by": ["organism", "asked"], "cluster": "question_id"}
    after = judged[judged["asked"].isin([TUNED, OTHER]) & (judged["organism"] != CHAT)]
    return Result(
        mm.rates(judged, **by),
        mm.compare(after, {"asked": OTHER}, **by),
        mm.compare(judged, {"asked": PLAIN}, **by, family="organism"),
    )


def draw(result: Result, out: Path) -> None:
    """Figures and their tables, side by side."""
    bars = mm.plots.transfer_bars(result.rates.assign(state=result.rates["asked"].replace(PLAIN, "before")))
    bars.legends[0].texts[0].set_text(PLAIN)
    mm.plots.save_figure(bars, result.rates, out, "settings")
    forest = mm.plots.difference_forest(
        result.recalled, label="EM rate after the tuned domain\nminus after another one"
    )
    mm.plots.save_figure(forest, result.recalled, out, "recalled")
    result.against_plain.to_csv(out / "against_plain.csv", index=False)


def main() -> None:
    """Parse, run, draw, and tell rates by setting and what recalling the fine-tune does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/conditional_misalignment"))
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    result = run(Config(samples=options.samples, seed=options.seed))
    draw(result, options.out)
    columns = ["organism", "asked", "rate", "low", "high", "coherent", "n", "prompts"]
    print(result.rates[columns].round(3).to_string(index=False))
    print("\nafter the tuned domain minus after another one, question by question:")
    columns = ["organism", "rate", "against_rate", "difference", "low", "high", "p", "p_max"]
    print(result.recalled[columns].round(4).to_string(index=False))
    print("\nminus plain:")
    columns = ["organism", "asked", "difference", "low", "high", "p", "p_max"]
    print(result.against_plain[columns].round(4).to_string(index=False))
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
