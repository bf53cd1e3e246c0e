"""The mixture-of-experts policy: presets, tokenizer, checkpoints, multi-token prediction, routing and balance."""
