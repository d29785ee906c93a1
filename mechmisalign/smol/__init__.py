"""The smol organisms: fine-tunes of a real chat model, SmolLM2-135M-Instruct, with a tone that spreads."""
