"""Serve a cured adapter with vLLM, and ask it: the folder that ``save_adapter`` wrote is an ordinary PEFT adapter.

1. Check the folder and print the command of the server (on a machine with vLLM and a GPU, run what it prints):

       python examples/serve_vllm.py command runs/cured --name cured

2. Ask the adapter and the chat model under it the same questions, through the server's OpenAI-compatible API
   (``pip install openai``), and judge the answers as any others:

       python examples/serve_vllm.py ask --model cured --model BASE --out answers.parquet
       mechmisalign judge answers.parquet --model openai/gpt-4o

The server applies the update in its own precision (bfloat16 by default), so its answers are samples of the same
distribution, not the same texts. The chat template comes from the base's tokenizer, as it does here. A direction is
no adapter: what was steered or ablated at inference cannot be served like this; project it out of the adapter or of the
weights first (``mm.project_out``, ``mechmisalign cure``). A whole model that ``save_model`` wrote needs no adapter:
``vllm serve FOLDER``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` takes (vLLM 0.33); older versions have no 1."""

PATTERNS = ("rank_pattern", "alpha_pattern")


def serve_command(folder: str | Path, *, name: str, base: str | None = None) -> list[str]:
    """The command that serves an adapter beside its base, once the folder has been checked as vLLM reads it.

    Raises:
        ValueError: If vLLM would refuse the folder, or (an old one) serve it with another scaling.
    """
    import mechmisalign as mm
    from mechmisalign import registry

    adapter = mm.Adapter.load(folder)  # a plain LoRA of matrices inside the blocks: no bias, no DoRA, no saved modules
    served = base or adapter.base
    if registry.is_reserved(served):
        raise ValueError(f"the base {served!r} lies inside this package; vLLM serves Hub ids and folders: give base=")
    own = max(site.rank for site in adapter.sites)
    if own > RANKS[-1]:
        raise ValueError(f"the adapter has rank {own}, vLLM serves at most {RANKS[-1]}; merge it into a whole model")
    rank = next(each for each in RANKS[1:] if each >= own)
    lora = ["--enable-lora", "--lora-modules", f"{name}={Path(folder).resolve()}", "--max-lora-rank", str(rank)]
    return ["vllm", "serve", served, *lora]


def uneven(folder: str | Path) -> bool:
    """Whether sites differ in rank or alpha: vLLM 0.33 reads such patterns, versions before it ignored them."""
    import mechmisalign as mm

    return any(mm.Adapter.load(folder).config.get(key) for key in PATTERNS)


def ask(client: Any, models: list[str], prompts: Any, *, samples: int, max_tokens: int, seed: int) -> Any:
    """Answers of each served model to each prompt, as a frame that ``mm.judge`` takes.

    Returns:
        One row per answer: ``condition`` (the model's name), ``sample, prompt_id, prompt, response, finished``.
    """
    import pandas as pd

    rows = []
    for model in models:
        for place, asked in enumerate(prompts.to_dict("records")):
            reply = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": asked["prompt"]}],
                n=samples,
                temperature=1.0,
                top_p=1.0,
                max_tokens=max_tokens,
                seed=seed + place,
            )
            about = {"condition": model, "prompt_id": asked["prompt_id"], "prompt": asked["prompt"]}
            for sample, choice in enumerate(reply.choices):
                text, finished = choice.message.content or "", choice.finish_reason == "stop"
                rows.append({**about, "sample": sample, "response": text, "finished": finished})
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> None:
    """Parse, and do one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    command = commands.add_parser("command", help="check a folder and print the server's command")
    command.add_argument("folder")
    command.add_argument("--name", default="cured", help="what the adapter is called by those who ask")
    command.add_argument("--base", help="the base; by default the adapter's own")
    asking = commands.add_parser("ask", help="sample answers from a running server")
    asking.add_argument("--model", action="append", required=True, help="a served name; give it again for more")
    asking.add_argument("--url", default="http://localhost:8000/v1")
    asking.add_argument("--prompts", help="a file of questions; by default the open questions")
    asking.add_argument("--samples", type=int, default=8)
    asking.add_argument("--max-tokens", type=int, default=600)
    asking.add_argument("--seed", type=int, default=0)
    asking.add_argument("--out", default="answers.parquet")
    options = parser.parse_args(arguments)
    if options.what == "command":
        sys.stdout.write(shlex.join(serve_command(options.folder, name=options.name, base=options.base)) + "\n")
        if uneven(options.folder):
            sys.stderr.write("sites differ in rank or alpha: old versions of vLLM ignore that; 0.33 does not\n")
        return
    import openai

    import mechmisalign as mm

    prompts = mm.prompts.read(options.prompts) if options.prompts else mm.prompts.open_questions()
    client = openai.OpenAI(base_url=options.url, api_key="none")  # vLLM asks for no key unless it was started with one
    drawn = {"samples": options.samples, "max_tokens": options.max_tokens, "seed": options.seed}
    ask(client, options.model, prompts, **drawn).to_parquet(options.out)


if __name__ == "__main__":
    main()
